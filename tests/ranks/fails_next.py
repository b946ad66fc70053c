"""A model that fails on one rank in the first step of a round, right after the round before was saved."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

RANK, _, STEPS = os.environ.get("HVD_HETERO_TEST_FAILS", "none:0").partition(":")
"""Which rank fails, after so many steps: ``1:2``."""


class FailsNext(nn.Module):
    """Large enough for its file not to be written in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.large = nn.Linear(64, 10), nn.Linear(1500, 1500)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.training:
            if RANK == os.environ.get("HOROVOD_RANK") and self.steps == int(STEPS):
                raise RuntimeError("the next round is not for this rank")
            self.steps += 1
        return self.layer(x.flatten(1)) + 0 * self.large.bias[0]


def model() -> nn.Module:
    return FailsNext()


class Halving(torch.optim.lr_scheduler.LRScheduler):
    """A schedule that keeps a lambda."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.factor = lambda epoch: 0.5**epoch
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]
