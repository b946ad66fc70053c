"""Partial collectives under real horovodrun: nothing lost, nothing sent twice, the same results everywhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from job_helpers import found_by_ranks
from ranks_methods.problem import model
from ranks_partial import schedules
from ranks_partial.schedules import CASES

pytestmark = pytest.mark.horovod

RANKS = Path(__file__).parents[1] / "ranks_partial"
SIZE, STEPS, EPOCHS = 4, 60, 2
MODES = ("solo", "majority", "full")
OTHERS_STAND_FOR = ("eager", "eager, AdamW", "merging", "merging, uniform",
                    "merging, now one first, now the other")


@pytest.fixture(scope="module")
def stress(horovodrun: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of one job found, by mode."""
    folder = tmp_path_factory.mktemp("stress")
    done = horovodrun(SIZE, [sys.executable, RANKS / "stress.py", folder, 5, STEPS, *MODES], timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.fixture(params=MODES)
def stressed(request: Any, stress: list[dict[str, Any]]) -> Any:
    """The mode, and what each rank found."""
    return request.param, [found[request.param] for found in stress]


def test_the_sum_of_all_that_was_sent_is_the_sum_of_all_that_was_computed(stressed: Any) -> None:
    """To the last bit, and by number of contributions."""
    for found in stressed[1]:
        assert found["exact"]
        assert found["weights"] == SIZE * STEPS * EPOCHS
        assert found["sent"] == STEPS * EPOCHS


def test_all_ranks_have_the_same_results_in_the_same_order(stressed: Any) -> None:
    digests = [found["digests"] for found in stressed[1]]
    assert all(other == digests[0] for other in digests)
    assert len(digests[0]) == stressed[1][0]["rounds"] >= STEPS * EPOCHS


def test_ranks_were_really_late(stressed: Any) -> None:
    """Or, with every round a full one, never."""
    mode, found = stressed
    late = sum(f["late"] + f["empty"] for f in found)
    assert late == 0 if mode == "full" else late > 0
    assert all(f["oldest"] <= (0 if mode == "full" else 33) for f in found)


def test_nothing_runs_on(stressed: Any) -> None:
    assert [found["threads_left"] for found in stressed[1]] == [[]] * SIZE


# ---- scripted: who is late for what is known beforehand -------------------------------------------------------------


@pytest.fixture(scope="module")
def scripted(horovodrun: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, request: Any) -> Any:
    """``scripted(name)``: what each rank of a case found; one job goes through all of the same number of ranks."""
    usual = [name for name in CASES if name not in OTHERS_STAND_FOR or request.config.getoption("--slow")]

    @cache
    def job(size: int) -> list[dict[str, Any]]:
        folder, names = tmp_path_factory.mktemp("scripted"), [name for name in usual if len(CASES[name].tau) == size]
        return found_by_ranks(horovodrun, size, RANKS / "scripted.py", folder, *names, timeout=60 * len(names))

    return lambda name: [found[name] for found in job(len(CASES[name].tau))]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in OTHERS_STAND_FOR else ()) for name in CASES
])  # fmt: skip
def test_a_scripted_course_of_events_as_in_one_process(name: str, scripted: Any) -> None:
    case, found = CASES[name], scripted(name)
    oracle = schedules.served if case.rule else schedules.eager if case.sums_gradients else schedules.merging
    oracle = schedules.grouped if case.method == "wagma_sgd" else oracle
    expected, rounds, dropped = oracle(case, [f["worked"] for f in found])
    for f, mine in zip(found, rounds, strict=True):
        torch.testing.assert_close(schedules.final(f["model"]), expected, rtol=1e-9, atol=1e-12)
        assert f["worked"][0][1].tolist() == mine, "the round of each step"
    told = found[0]["summary"]["partial"]
    assert [rank["dropped"] for rank in told["ranks"]] == dropped
    assert [rank["lost_samples"] for rank in told["ranks"]] == [
        times * f["worked"][0][0].shape[1] * (case.steps_a_turn(0) if case.method == "async_diloco" else 1)
        for times, f in zip(dropped, found, strict=True)
    ]
    if case.method == "m_sync_sgd":
        assert told["staleness"][1:] == [] and sum(dropped) > 5
    elif case.method in ("rennala_sgd", "malenia_sgd"):
        assert told["staleness"][1:] == [] and sum(dropped) > 2
    else:
        assert told["staleness"][1:] != [], "somebody was late"
    assert not torch.allclose(schedules.final(model("mlp").state_dict()), expected)
    everything = torch.cat([f["worked"][0][0].flatten() for f in found])
    assert len(set(everything.tolist())) == len(everything) or case.method == "biased_local_sgd"
    if case.sums_gradients:
        assert len(everything) > 115, "every sample once, but for less than a batch"
