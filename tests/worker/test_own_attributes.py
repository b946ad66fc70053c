"""Plain attributes of modules that training changes are told of."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from hvd_hetero.worker.own_attributes import attributes_of, warn_of_changes


class Counts(nn.Linear):
    """Counts, keeps a mean that is no buffer, and looks at its activations."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.count, self.name, self.mean, self.seen = 0, "one", torch.zeros(2), torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.mean = 0.9 * self.mean + x.mean(0)
        self.seen = super().forward(x)
        return self.seen


class Saves(Counts):
    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


def test_what_changes_is_told_by_its_name() -> None:
    model = nn.Sequential(Counts(), Saves(), nn.Dropout())
    before = attributes_of(model)
    assert {"0.count", "0.name", "0.mean", "2.p"} <= before.keys() and "1.count" not in before
    model(torch.ones(3, 2))
    with pytest.warns(UserWarning, match=r"the model's 0.count, 0.mean change in training"):
        warn_of_changes(before, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_changes(attributes_of(model), model)
