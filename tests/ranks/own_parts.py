"""Models, data and losses as a user would write them, good and bad; found by import path from this folder."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

RANK = int(os.environ.get("HOROVOD_RANK", "0"))


def norm_net(width: int = 24) -> nn.Module:
    """Takes digits; has BatchNorm, whose buffers are averaged too, and dropout, which differs from rank to rank."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 10)
    )


def of_any_width() -> nn.Module:
    """As wide as chance has it on each rank, whatever is seeded."""
    return norm_net(8 + 2 * RANK)


def model_unless_rank_1() -> Any:
    return norm_net() if RANK != 1 else "no model"


class AuxiliaryNet(nn.Module):
    """Has a second output, in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.out, self.second = nn.Flatten(), nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.flat(x)
        return (self.out(x), self.second(x)) if self.training else self.out(x)


class InPlaceNet(AuxiliaryNet):
    """Overwrites what its backward pass needs."""

    def forward(self, x: Tensor) -> Any:
        hidden = torch.sigmoid(self.out(self.flat(x)))
        hidden *= 2
        return hidden


class Onlooker(torch.optim.SGD):
    """Cannot step."""

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError("it only looks on")


def by_name(named_parameters: Any, lr: float, **args: Any) -> torch.optim.Optimizer:
    """Makes its groups itself, by names."""
    biases = [p for name, p in named_parameters if name.endswith("bias")]
    others = [p for name, p in named_parameters if not name.endswith("bias")]
    return torch.optim.SGD([{"params": others}, {"params": biases, "weight_decay": 0.5}], lr=lr, **args)


def no_parameters() -> nn.Module:
    return nn.Flatten()


def wrong_width() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(63, 10))


class breaks(nn.Linear):  # noqa: N801
    """Refers to what is not there, as a mistake in a forward function would."""

    def __init__(self) -> None:
        super().__init__(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """One number a batch: the sampling cannot work with it."""
    return nn.functional.cross_entropy(outputs, targets)


def number_loss(outputs: Tensor, targets: Tensor) -> float:
    return 1.0


def column() -> nn.Module:
    """One number a sample, ``[B, 1]``, where targets are ``[B]``."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))


def all_pairs(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).mean(1)


def first_column(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets) ** 2


def tokens_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A number for each of several targets, of which some may not count."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")[:, None].expand(-1, 7)


class fails_on_rank_1:  # noqa: N801 (called like a function)
    """A loss that raises on rank 1 in mid-run; the tried batch and the first steps go well."""

    calls = 0

    def __new__(cls, outputs: Tensor, targets: Tensor) -> Any:
        cls.calls += 1
        if RANK == 1 and cls.calls > 150:
            raise RuntimeError("the disk of rank 1 is on fire")
        return nn.functional.cross_entropy(outputs, targets, reduction="none")


def few_samples() -> Any:
    inputs, targets = torch.randn(100, 1, 8, 8), torch.arange(100) % 10
    return (inputs, targets), (inputs[:10], targets[:10])


def one_split() -> Any:
    return few_samples()[0][0]


def empty_test_split() -> Any:
    (inputs, targets), _ = few_samples()
    return (inputs, targets), (inputs[:0], targets[:0])


class bad_in_the_end:  # noqa: N801 (called like a function)
    """A loss that becomes NaN on all ranks, after so many calls that rounds were saved before."""

    calls, ranks = 0, (0, 1)

    def __new__(cls, outputs: Tensor, targets: Tensor) -> Any:
        cls.calls += 1
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return losses * float("nan") if RANK in cls.ranks and cls.calls > 300 else losses


class bad_on_rank_1(bad_in_the_end):  # noqa: N801
    calls, ranks = 0, (1,)


def bad_in_evaluation(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return losses if torch.is_grad_enabled() else losses * float("nan")


def detached_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """One number a sample, from which nothing can be learned."""
    return nn.functional.cross_entropy(outputs.detach(), targets, reduction="none")


def nan_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none") * float("nan")
