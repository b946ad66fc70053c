"""What the methods are tried on: small float64 problems, and the classes of ranks that train them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hvd_hetero.planning.groups import by_bits, sets_of

SIZE = 4
CLASSES: dict[str, dict[str, list[int]]] = {
    "two": {"fast": [0, 1], "slow": [2, 3]},
    "three_fast": {"fast": [0, 1, 2], "slow": [3]},
    "one": {"every": [0, 1, 2, 3]},
    "rank0_slow": {"slow": [0, 1], "fast": [2, 3]},
    "alone": {"fast": [0], "slow": [1, 2, 3]},
    "of three": {"fast": [0, 1], "slow": [2]},
    "of two": {"fast": [0], "slow": [1]},
    "one beside two": {"fast": [0], "slow": [1, 2]},
    "three classes": {"fast": [0], "slow": [1], "other": [2]},
}
SAMPLES, FEATURES, TARGETS = 120, 5, 3
BASE: dict[str, Any] = {
    "train.epochs": 2,
    "train.batch_size": 4,
    "train.tau": {"fast": 3, "slow": 3},
    "train.lr": 0.1,
    "train.loss_args": {},
    "train.optimizer_args": {"momentum": 0.9},
    "eval.batch_size": 64,
    "run.trace_rounds": 0,
    "eval.every_epochs": 10,
}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        method: its name.
        settings: beyond :data:`BASE`.
        classes: key of :data:`CLASSES`.
        model: ``mlp``, or ``norm``, which has BatchNorm, or ``noisy``, which draws from all generators; ``digits``: the
            built-in default problem in place of these.
        path: how weighted sums travel.
        poisoned: samples of which a number is NaN.
        half: whether every second rank computes in float16, and begins with losses scaled too much.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    classes: str = "two"
    model: str = "mlp"
    path: str = "auto"
    poisoned: tuple[int, ...] = ()
    half: bool = False

    def overrides(self) -> dict[str, Any]:
        classes = {name: {"device": "cpu", "ranks": ranks} for name, ranks in CLASSES[self.classes].items()}
        method = {"algorithm.name": self.method, "cluster.classes": classes, "aggregation.path": self.path}
        if self.model == "digits":
            return {**method, "train.batch_size": 8, "train.epochs": DIGITS_EPOCHS, "train.tau": 8, **self.settings}
        tau = {name: 3 for name in classes}
        return {**BASE, "train.tau": tau, **method, **self.settings}


DIGITS_EPOCHS = 1
PLAIN = {"train.optimizer_args": {}}
UNEVEN = {"train.batch_size": {"fast": 5, "slow": 2}}
TAU31 = {"train.tau": {"fast": 3, "slow": 1}}
ADAMW = {"train.optimizer": "AdamW", "train.lr": 0.01, "train.optimizer_args": {}}
NESTEROV = {"aggregation.outer_lr": 0.5, "aggregation.outer_momentum": 0.9, "aggregation.outer_nesterov": True}
BY_THE_CLOCK = ("dlb", "eager_sgd", "m_sync_sgd", "asgd", "ringmaster_asgd", "rennala_sgd", "malenia_sgd",
                "ringleader_asgd", "async_diloco", "nonblocking_sgd", "omnilearn_asp", "wagma_sgd")
"""Methods that do not come to the same again, since real time has a say in what they do."""


def chosen(cases: Mapping[str, Case], others_stand_for: Collection[str], slow: bool) -> dict[str, Case]:
    """Return the cases that are tried: all of them if ``slow``."""
    assert not set(others_stand_for) - set(cases)
    return {name: case for name, case in cases.items() if slow or name not in others_stand_for}


def marked(names: Iterable[str], others_stand_for: Collection[str]) -> list[Any]:
    """Return parameters of a test, with those marked as slow that others stand for."""
    import pytest

    return [pytest.param(name, marks=pytest.mark.slow) if name in others_stand_for else name for name in names]


def pairs(size: int) -> tuple[tuple[int, ...], ...]:
    """Groups of two, by bits of the ranks' numbers, of a power of two of ranks."""
    return () if size & (size - 1) else sets_of(by_bits(size, 2), size)


def data(poisoned: tuple[int, ...] = ()) -> Any:
    """(inputs ``[SAMPLES, FEATURES]``, targets ``[SAMPLES]``)."""
    import torch

    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    inputs[list(poisoned), 1] = math.nan
    return inputs, torch.randint(TARGETS, (SAMPLES,), generator=generator)


def weights(dataset: Any) -> Any:
    """How much each sample counts, by its target."""
    return dataset.targets.numpy() + 1.0


def model(name: str) -> Any:
    """The same weights each time."""
    import random

    import numpy as np
    import torch
    from torch import nn

    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + random.random() + float(np.random.rand()) + torch.rand_like(x)

    torch.manual_seed(3)
    more = {"norm": [nn.BatchNorm1d(6)], "noisy": [Noise()]}.get(name, [])
    return nn.Sequential(nn.Linear(FEATURES, 6), *more, nn.Tanh(), nn.Linear(6, TARGETS)).double()
