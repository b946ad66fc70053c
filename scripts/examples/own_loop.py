"""Your own training loop. On every rank: horovodrun -np 2 python scripts/examples/own_loop.py"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import hvd_hetero

x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
with hvd_hetero.Loop(
    nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
    (x[:1500].float() / 16, y[:1500]),
    {"train.tau": 32, "train.batch_size": 16, "train.epochs": 10},
    optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
) as loop:
    for round in loop:  # the first ones are measured: tau of the slower class comes of them
        for inputs, targets in round:
            loop.optimizer.zero_grad()
            losses = nn.functional.cross_entropy(loop.model(inputs), targets, reduction="none")
            losses.mean().backward()
            loop.optimizer.step()
            round.losses(losses)
    if loop.rank == 0:
        accuracy = (loop.model(x[1500:].float() / 16).argmax(1) == y[1500:]).float().mean()
        print(f"accuracy {accuracy:.4f}")
