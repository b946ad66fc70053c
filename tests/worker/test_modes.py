"""Evaluation mode for a while: every submodule is back in its own mode afterwards. Which optimizers have modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hvd_hetero.worker.modes import evaluating, has_modes, set_mode


class Merges(nn.Linear):
    """Takes its two weights together in evaluation mode, as adapters of low rank do."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.merged = 0

    def train(self, mode: bool = True) -> Merges:
        if mode != self.training:
            self.merged += -1 if mode else 1
        super().train(mode)
        return self


class AlwaysEvaluates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Dropout()
        self.train()

    def train(self, mode: bool = True) -> AlwaysEvaluates:
        super().train(mode)
        self.part.eval()
        return self


class Free(torch.optim.SGD):
    def train(self) -> None:
        """As schedule-free ones do."""

    def eval(self) -> None:
        """As schedule-free ones do."""


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def model() -> nn.Module:
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()), Merges())
    made = nn.Sequential(frozen, Merges(), AlwaysEvaluates(), frozen[1])
    frozen.eval()
    frozen[1][1].train()
    return made


@pytest.mark.parametrize("fails", [False, True])
def test_every_submodule_is_back_in_its_mode(fails: bool) -> None:
    made = model()
    before, merged = modes(made), [made[0][2].merged, made[1].merged]
    assert True in before and False in before and merged == [1, 0]
    try:
        with evaluating(made):
            assert not any(modes(made))
            assert [made[0][2].merged, made[1].merged] == [1, 1]
            if fails:
                raise OSError("in evaluation")
    except OSError:
        assert fails
    assert modes(made) == before
    assert [made[0][2].merged, made[1].merged] == merged, "their own train() was called, no more often than it must be"


def test_a_train_method_that_does_nothing_does_no_harm() -> None:
    made = nn.Sequential(nn.Dropout(), nn.Dropout())
    disabled: Any = lambda mode=True: made[1].eval() if False else made[1]  # noqa: E731
    made[1].eval()
    made[1].train = disabled  # type: ignore[method-assign]
    with evaluating(made):
        assert modes(made) == [False, False, False]
    assert modes(made) == [True, True, False]


def test_which_optimizers_have_modes() -> None:
    params = nn.Linear(2, 2).parameters()
    assert has_modes(Free(params, 0.1)) and not has_modes(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))
    set_mode(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), training=False)
