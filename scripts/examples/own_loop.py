"""Your own training loop. On every rank: horovodrun -np 2 python scripts/examples/own_loop.py"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import hvd_hetero

x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
with hvd_hetero.Loop(
    nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
    (x[:1500].float() / 16, y[:1500]),
    {"train.tau": {"fast": 32, "slow": 4}, "train.batch_size": 16, "train.epochs": 10},
) as loop:
    optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1, momentum=0.9)
    for round in loop:
        for inputs, targets in round:
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(loop.model(inputs), targets, reduction="none")
            losses.mean().backward()
            optimizer.step()
            round.losses(losses)
    if loop.rank == 0:
        accuracy = (loop.model(x[1500:].float() / 16).argmax(1) == y[1500:]).float().mean()
        print(f"accuracy {accuracy:.4f}")
