"""A stream of your own, without end. On every rank: horovodrun -np 2 python scripts/examples/stream_loop.py"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import hvd_hetero


class Spirals(IterableDataset[tuple[Tensor, int]]):
    """Points of two spirals; all ranks draw the same ones, and each trains on a share by its speed."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        while True:
            label, radius = int(torch.rand(()) < 0.5), torch.rand(())
            angle = 6 * radius + torch.pi * label
            yield radius * torch.stack([angle.cos(), angle.sin()]) + 0.02 * torch.randn(2), label


with hvd_hetero.Loop(
    nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)),
    Spirals(),
    {"train.tau": {"fast": 16, "slow": 2}, "train.batch_size": 16, "train.epochs": 3, "run.dir": "spirals"},
    samples=5000,  # what counts as an epoch
    optimizer=lambda params: torch.optim.AdamW(params, lr=0.005),
) as loop:
    for round in loop:
        for points, labels in round:
            loop.optimizer.zero_grad()
            losses = nn.functional.cross_entropy(loop.model(points), labels, reduction="none")
            losses.mean().backward()
            loop.optimizer.step()
            round.losses(losses)
