"""Every method on one GPU rank beside two CPU ranks: equal to its single-process oracle, and the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks_gpu.cases import DIGITS, ORACLE
from ranks_gpu.kinds import COMPILED, KINDS
from ranks_methods import oracle
from ranks_methods.cases import least_accuracy
from ranks_methods.problem import Case

from hvd_hetero.algorithms import get
from hvd_hetero.algorithms.synchronous import Lockstep

GROUPS = ("oracle", "digits", "kinds")
TOLERANCE = 1e-5
"""Of the largest number of a tensor: what cancels to almost nothing keeps the rounding of what it was made from."""
Ran = Callable[..., Any]


def expected(case: Case, dealt: dict[int, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """In float64, from what the ranks were dealt."""
    if issubclass(get(case.method), Lockstep):
        return (oracle.normalized if case.model == "norm" else oracle.joined)(case, dealt)
    return (oracle.delayed if case.settings.get("aggregation.delayed") else oracle.local)(case, dealt)


def assert_same(found: list[dict[str, Any]], ranks: list[int]) -> None:
    """Bit for bit."""
    for rank in ranks:
        for name, value in found[ranks[0]]["model"].items():
            own = found[rank]["model"][name]
            assert torch.equal(own, value), f"{name} of rank {rank}: {(own.float() - value.float()).abs().max()} apart"


def assert_close(value: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    apart = (value.double() - wanted.double()).abs().max()
    assert apart <= TOLERANCE * max(0.1, float(wanted.abs().max())), f"{name}: {apart} apart"


def training(found: list[dict[str, Any]]) -> list[int]:
    return [rank for rank, mine in enumerate(found) if any(rows.numel() for rows in mine["dealt"])]


@pytest.mark.parametrize("name", ORACLE)
def test_as_in_one_process_and_the_same_on_all_ranks(ran: Ran, name: str) -> None:
    found, case = ran(*GROUPS).of(name), ORACLE[name]
    assert_same(found, training(found))
    wanted = expected(case, {rank: mine["dealt"] for rank, mine in enumerate(found)})
    for tensor, value in found[training(found)[0]]["model"].items():
        assert_close(value, wanted[tensor], name)
    assert bool(case.poisoned) == any(mine["excluded"] for mine in found)
    if case.poisoned:
        assert found[0]["excluded"], "the GPU rank was given a bad sample"


@pytest.mark.parametrize("name", DIGITS)
def test_it_trains_on_digits(ran: Ran, name: str) -> None:
    found = ran(*GROUPS).of(name)
    summary = found[0]["summary"]
    assert summary["eval"]["final_accuracy"] > least_accuracy(summary["algorithm"], summary["rounds"])
    assert_same(found, [0, *training(found)])


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_models_and_settings(ran: Ran, name: str) -> None:
    found = ran(*GROUPS).of(name)
    assert_same(found, [0, 1, 2])
    if KINDS[name].resumed:
        for tensor, value in found[0]["model"].items():
            assert torch.equal(value, found[0]["pieces"][tensor]), f"{tensor} after being stopped and resumed"


@pytest.mark.parametrize("name", COMPILED)
def test_steps_are_compiled_once_and_in_one_graph(ran: Ran, name: str) -> None:
    mine = ran(*GROUPS).of(name)[0]
    assert mine["is_compiled"], "it went on without"
    assert mine["graphs"][-1]["breaks"] == 0
    assert mine["graphs"][0]["graphs"] == mine["graphs"][-1]["graphs"] > 0, "all is compiled before the first epoch"
