"""The methods under real horovodrun, each against a single-process oracle: see ``ranks_methods/``.

One job of four ranks runs all cases; models are float64, so that "equal" means to rounding and nothing looser.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job_helpers import found_by_ranks
from ranks_methods import grouped_oracle, oracle
from ranks_methods.cases import CASES, CASES_SLOW, HALF, least_accuracy
from ranks_methods.problem import CLASSES, DIGITS_EPOCHS, SAMPLES, SIZE, data, marked, model

from hvd_hetero.algorithms import REGISTRY, get
from hvd_hetero.algorithms.grouped import Grouped
from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.algorithms.synchronous import Lockstep

pytestmark = pytest.mark.horovod

SCRIPT = Path(__file__).parents[1] / "ranks_methods" / "run_cases.py"
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
ROUNDED = {"float16": {"rtol": 1e-3, "atol": 1e-3}, "int8": {"rtol": 0.0, "atol": 0.05}}
"""Of what travels in fewer bits; weights are about 0.3, and each step moves them by 0.05."""
Found = list[dict[str, dict[str, Any]]]

SMALL = {name: case for name, case in CASES.items() if case.model != "digits"}
GROUPED = [name for name, case in SMALL.items() if issubclass(get(case.method), Grouped)]
LOCKSTEP = [name for name, case in SMALL.items() if issubclass(get(case.method), Lockstep) and name not in GROUPED]
LOCAL = [name for name, case in SMALL.items() if issubclass(get(case.method), LocalSGD)]


@pytest.fixture(scope="module")
def found(
    horovodrun: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Found:
    """What each rank found, by case."""
    folder = tmp_path_factory.mktemp("methods")
    slow = ["slow"] * request.config.getoption("--slow")
    return found_by_ranks(horovodrun, SIZE, SCRIPT, folder, *slow, timeout=450)


def final(found: Found, case: str) -> dict[str, torch.Tensor]:
    """Rank 0's model, which is the one that is saved."""
    return found[0][case]["model"]


def dealt(found: Found, case: str) -> dict[int, list[torch.Tensor]]:
    return {rank: found[rank][case]["dealt"] for rank in range(SIZE)}


def tolerance(case: str) -> dict[str, float]:
    return ROUNDED.get(CASES[case].settings.get("aggregation.wire", ""), TOLERANCE)


def moved(found: Found, case: str) -> bool:
    """Whether training did anything at all, without which equality would say nothing."""
    before = model(CASES[case].model).state_dict()
    return not any(torch.allclose(before[name], final(found, case)[name]) for name in before if name.endswith("weight"))


# ---- against the oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", marked(LOCKSTEP, CASES_SLOW))
def test_one_process_on_the_joined_batch(found: Found, case: str) -> None:
    """sync, byteps and dlb, on all ranks or a class, with any batches: the gradient is that of the joined batch."""
    expected = (oracle.normalized if CASES[case].model == "norm" else oracle.joined)(CASES[case], dealt(found, case))
    torch.testing.assert_close(final(found, case), expected, **tolerance(case))
    assert moved(found, case)


@pytest.mark.parametrize("case", marked(LOCAL, CASES_SLOW))
def test_local_sgd_as_in_one_process(found: Found, case: str) -> None:
    expects = oracle.delayed if CASES[case].settings.get("aggregation.delayed") else oracle.local
    expects = oracle.reduced if CASES[case].method == "bvr_l_sgd" else expects
    expected = expects(CASES[case], dealt(found, case))
    torch.testing.assert_close(final(found, case), expected, **tolerance(case))
    assert moved(found, case)


@pytest.mark.parametrize("case", marked(GROUPED, CASES_SLOW))
def test_averages_in_groups_as_in_one_process(found: Found, case: str) -> None:
    expected = getattr(grouped_oracle, CASES[case].method)(CASES[case], dealt(found, case))
    torch.testing.assert_close(final(found, case), expected, **tolerance(case))
    assert moved(found, case)


@pytest.mark.parametrize("case", [name for name, case in SMALL.items() if case.classes == "one"])
def test_one_class_and_tau_1_is_synchronous_sgd(found: Found, case: str) -> None:
    """Plain SGD: the mean of the models after one step is the step along the mean gradient."""
    torch.testing.assert_close(final(found, case), oracle.joined(CASES[case], dealt(found, case)), **TOLERANCE)


@pytest.mark.parametrize("case", marked(CASES, CASES_SLOW))
def test_all_training_ranks_hold_the_same_model(found: Found, case: str) -> None:
    """Bit for bit; and rank 0 holds it even where it does not train."""
    training = [rank for rank, epochs in dealt(found, case).items() if epochs[0].numel()]
    own = {rank: found[rank][case]["model"] for rank in {0, *training}}
    for rank, state in own.items():
        for name, value in state.items():
            assert torch.equal(value, own[0][name]), f"{name} of rank {rank}"


# ---- against one another --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [
    ("byteps, two servers", "sync, fast"),
    ("balanced", "unbalanced, equal tau"),
    ("biased, nothing biased", "unbalanced, separate"),
    ("delayed by nothing", "biased, hierarchical"),
    ("decentlam, complete", "sync"),
])  # fmt: skip
def test_two_names_for_the_same_thing(found: Found, one: str, other: str) -> None:
    torch.testing.assert_close(final(found, one), final(found, other), **TOLERANCE)


def test_outer_lr_1_is_no_outer_optimizer(found: Found) -> None:
    for name, value in final(found, "biased").items():
        assert torch.equal(value, final(found, "outer, lr 1")[name])


@pytest.mark.parametrize(("one", "other"), [
    ("biased, weights", "unbalanced"),
    ("biased, samples that weigh", "biased, hierarchical"),
    ("sync, samples that weigh", "sync"),
    ("biased, sampling", "unbalanced"),
    ("outer, lr 0.5", "biased, hierarchical"),
    ("outer, momentum", "unbalanced"),
    ("momentum averaged", "momentum reset"),
    ("momentum averaged", "biased, hierarchical"),
    ("AdamW averaged", "AdamW"),
    ("sync, clipped", "sync"),
    ("sync, label smoothing", "sync"),
    ("decentlam, without momentum", "sync, plain SGD"),
])  # fmt: skip
def test_a_setting_changes_something(found: Found, one: str, other: str) -> None:
    assert not torch.allclose(final(found, one)["0.weight"], final(found, other)["0.weight"], rtol=1e-6)


# ---- who does what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["sync, fast", "byteps, two servers"])
def test_ranks_that_do_not_train_take_no_samples_and_no_time_of_their_own(found: Found, case: str) -> None:
    fast, slow = found[0][case]["summary"]["classes"]
    assert (slow["tau"], slow["batch_size"], slow["weight"], slow["steps"], slow["samples"]) == (0, 0, 0.0, 0, 0)
    assert slow["step_sec"] is None
    assert slow["time_sec"]["compute"] == slow["time_sec"]["data"] == 0
    assert slow["time_sec"]["blocked"] + slow["time_sec"]["comm"] > 0, "waiting for the next epoch, or for gradients"
    assert fast["weight"] == 0.5 and fast["steps"] == 2 * 2 * (SAMPLES // 8) and fast["time_sec"]["compute"] > 0


def test_idle_ranks_transfer_nothing_while_they_idle(found: Found) -> None:
    """Their time is waiting for the epoch to end; they are in those collectives only that all ranks share around it."""
    met = [sum(kind == "comm" for kind, _, _ in laps) for laps in found[0]["sync, fast"]["trace"]]
    assert max(met[rank] for rank in CLASSES["two"]["slow"]) < min(met[rank] for rank in CLASSES["two"]["fast"])


def test_dlb_keeps_the_global_batch(found: Found) -> None:
    for number in range(4):
        batches = [found[rank]["dlb"]["dealt"][number].shape for rank in range(SIZE)]
        assert sum(b for _, b in batches) == 13 and min(b for _, b in batches) >= 1
        assert {steps for steps, _ in batches} == {SAMPLES // 13}


def samples(found: Found, case: str, number: int, name: str) -> set[int]:
    """The samples that a class was dealt in an epoch."""
    ranks = CLASSES[CASES[case].classes][name]
    return {int(i) for rank in ranks for i in found[rank][case]["dealt"][number].flatten()}


@pytest.mark.parametrize("case", marked(["separate, to slow", "unified, to slow", "unified, to fast"], CASES_SLOW))
def test_the_biased_class_gets_the_samples_never_seen(found: Found, case: str) -> None:
    """They count as hardest. In three rounds the fast class takes 72 of the 120 samples, the slow one 24."""
    first, biased = set(range(SAMPLES)), case.split()[-1]
    unseen = first - samples(found, case, 0, "fast") - samples(found, case, 0, "slow")
    hard = samples(found, case, 1, biased)
    assert len(unseen) >= 24
    if biased == "slow":
        assert hard <= unseen and len(hard) == 24
    else:
        assert unseen <= hard
    if case.startswith("unified"):
        for number in (0, 1):
            assert not samples(found, case, number, "fast") & samples(found, case, number, "slow")


# ---- every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", marked([f"digits, {method}" for method in REGISTRY], CASES_SLOW))
def test_every_method_trains(found: Found, case: str) -> None:
    """On digits, with the built-in settings and a tau that is measured where the method asks for one."""
    summary, method = found[0][case]["summary"], CASES[case].method
    assert summary["algorithm"] == method
    updates = summary["rounds"]
    assert summary["eval"]["final_accuracy"] > least_accuracy(method, updates), f"after {updates} updates"
    classes = summary["classes"]
    assert sum(c["weight"] * len(c["ranks"]) for c in classes) == pytest.approx(1)
    assert summary["samples_seen"] == sum(c["samples"] for c in classes) <= DIGITS_EPOCHS * 1437
    assert all(value >= 0 for c in classes for value in c["time_sec"].values())
    for c in classes:
        assert sum(c["time_sec"].values()) == pytest.approx(summary["train_sec"], rel=0.2, abs=0.3)


@pytest.mark.parametrize("case", marked([f"digits, half, {method}" for method in HALF], CASES_SLOW))
def test_some_ranks_compute_in_float16(found: Found, case: str) -> None:
    """Overflows are counted; they leave out nobody and skip no step, so that weights are those of the plan."""
    summary = found[0][case]["summary"]
    assert summary["eval"]["final_accuracy"] > least_accuracy(CASES[case].method, summary["rounds"])
    for c in summary["classes"]:
        assert c["excluded"] == 0 and bool(c["overflows"]) == bool(c["steps"])
    fast, slow = summary["classes"]
    if CASES[case].method == "biased_local_sgd":
        assert fast["steps"] == 4 * slow["steps"] and fast["weight"] == 4 * slow["weight"]


def test_data_is_not_learned_by_chance() -> None:
    """The small problem has all its classes, so that a gradient says something."""
    assert set(data()[1].tolist()) == {0, 1, 2}
