"""States with functions in them, saved without pickle, and restored into newly made objects."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from store_helpers import around
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, SequentialLR, StepLR

from hvd_hetero.checkpoint import CheckpointError
from hvd_hetero.errors import UserError
from hvd_hetero.worker.optimizer_state import load_state, save_state


class Warmup(LRScheduler):
    """Keeps what people keep: a lambda, a table of functions and numbers, a logger, another schedule."""

    def __init__(self, optimizer: torch.optim.Optimizer, n: int = 3, after: Any = None) -> None:
        self.factor = lambda epoch: min(1.0, (epoch + 1) / n)
        self.table: list[Any] = [(0, self.half), {"rule": functools.partial(min, 1.0), "calls": 0}]
        self.log, self.kind, self.owner = logging.getLogger("x"), nn.Linear, optimizer
        self.after = after
        super().__init__(optimizer)

    @staticmethod
    def half(value: float) -> float:
        return value / 2

    def get_lr(self) -> list[float]:  # type: ignore[override]
        self.table[1]["calls"] += 1
        if self.after is not None and self.last_epoch >= 4:
            self.after.step()
            return list(self.after.get_last_lr())
        return [base * self.table[0][1](self.factor(self.last_epoch)) for base in self.base_lrs]


def made(kind: str) -> tuple[Any, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.8, momentum=0.9)
    makers: dict[str, Any] = {
        "own": lambda: Warmup(optimizer),
        "wrapping": lambda: Warmup(optimizer, after=CosineAnnealingLR(optimizer, 9)),
        "sequential": lambda: SequentialLR(optimizer, [Warmup(optimizer), StepLR(optimizer, 2)], [3]),
        "lambda": lambda: LambdaLR(optimizer, lambda epoch: 0.5**epoch),
    }
    return makers[kind](), optimizer


def rates(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("kind", ["own", "wrapping", "sequential", "lambda"])
def test_a_schedule_with_functions_goes_on_as_if_nothing_had_been(kind: str) -> None:
    scheduler, optimizer = made(kind)
    rates(scheduler, optimizer, 5)
    state = around({"scheduler": save_state(scheduler), "optimizer": save_state(optimizer)})
    expected = rates(scheduler, optimizer, 5)
    again, other = made(kind)
    load_state(other, state["optimizer"], "optimizer")
    load_state(again, state["scheduler"], "scheduler")
    assert rates(again, other, 5) == expected
    if kind == "own":
        assert again.table[1]["calls"] == scheduler.table[1]["calls"], "what is no function beside one is restored"
        assert again.factor is not scheduler.factor and again.owner is other


def test_an_optimizer_with_a_function_in_its_groups() -> None:
    def make() -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": nn.Linear(2, 1).parameters(), "rule": lambda step: step, "lr": 0.1}], lr=1.0)

    one, other = make(), make()
    one.param_groups[0]["lr"] = 0.7
    own = other.param_groups[0]["rule"]
    load_state(other, around(save_state(one)), "optimizer")
    assert other.param_groups[0]["lr"] == 0.7 and other.param_groups[0]["rule"] is own


class Callable:
    """No function: it may have a state that would be lost."""

    def __call__(self) -> None: ...


@pytest.mark.parametrize("value", [Callable(), object(), torch.Generator()])
def test_what_may_have_a_state_is_not_left_out(value: Any) -> None:
    scheduler, _ = made("own")
    scheduler.extra = {"inside": [value]}
    with pytest.raises(CheckpointError, match="the state's scheduler.extra.inside.0"):
        around({"scheduler": save_state(scheduler)})


def test_a_function_that_the_new_object_does_not_have_is_named() -> None:
    scheduler, _ = made("own")
    scheduler.later = [lambda: 1]
    state = around(save_state(scheduler))
    with pytest.raises(UserError, match=r"scheduler\.later\.0: was a function"):
        load_state(made("own")[0], state, "scheduler")
