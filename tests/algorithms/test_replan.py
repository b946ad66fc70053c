"""tau of the local-SGD methods: with which margin it is derived, and how it is derived anew; without a job."""

from __future__ import annotations

from typing import Any

import pytest
from method_helpers import TWO, method

from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.algorithms.stl_sgd import STLSGD

SPEEDS = {"fast": 0.001, "slow": 0.008}


def local(**settings: Any) -> LocalSGD:
    made = method({"algorithm.name": "biased_local_sgd", "train.batch_size": 1, "train.tau": 64, **settings}, TWO)
    assert isinstance(made, LocalSGD)
    return made


@pytest.mark.parametrize(("settings", "slow"), [
    ({}, 7),  # slower ranks are 3/19 of the cluster: 8 (1 - 0.2 (1 - 2 * 3/19) 7/8) = 7.04
    ({"train.tau_margin": 0}, 8),
    ({"aggregation.mode": "solo"}, 8),
    ({"aggregation.mode": "majority"}, 8),
    ({"cluster.too_slow": "wait_avoiding"}, 7),  # nobody is too slow: everybody is waited for
])
def test_the_margin_is_for_those_who_are_waited_for(settings: dict[str, Any], slow: int) -> None:
    made = local(**{"train.tau_margin": 0.2, **settings})
    assert made.taus(SPEEDS) == {"fast": 64, "slow": slow}
    assert made.is_blocking(SPEEDS) == ("aggregation.mode" not in settings)


def test_nobody_waits_for_a_class_that_is_too_slow_and_merged_when_it_comes() -> None:
    made = local(**{"cluster.too_slow": "wait_avoiding"})
    assert not made.is_blocking({"fast": 0.001, "slow": 0.1}) and made.taus({"fast": 0.001, "slow": 0.1})["slow"] == 1


def test_tau_is_derived_anew_with_the_margin_and_says_why() -> None:
    made = local()
    made.start(made.make_plan(SPEEDS))
    slowed = [0.001, 0.001, 0.024, 0.024, 0.024]
    for _ in range(200):
        if made.replan(slowed).classes[1].tau != 8:
            break
    # 64 / 24, less a margin: 2.4
    assert {c.name: c.tau for c in made.plan.classes} == {"fast": 64, "slow": 2}
    assert made.reason.endswith("of the cluster's capacity is no longer lost to waiting")
    before = made.plan
    assert all(made.replan(slowed) is before for _ in range(200)), "a stable one is left alone"


# ---- STL-SGD --------------------------------------------------------------------------------------------------------


def stl(**settings: Any) -> STLSGD:
    made = method({"algorithm.name": "stl_sgd", "train.batch_size": 1, "train.tau": {"fast": 8, "slow": 3}, **settings})
    assert isinstance(made, STLSGD)
    made.start(made.make_plan(None))
    made.follow_rate(0.1)
    return made


def taus_of(made: STLSGD, *rates: float) -> list[dict[str, int]]:
    """After each epoch, the next one's."""
    found = []
    for rate in rates:
        made.follow_rate(rate)
        found.append({c.name: c.tau for c in made.replan([0.001] * 5).classes})
    return found


def test_rounds_grow_as_the_rate_falls_and_the_classes_keep_their_ratio() -> None:
    assert taus_of(stl(), 0.1, 0.05, 0.025) == [
        {"fast": 8, "slow": 3}, {"fast": 16, "slow": 6}, {"fast": 32, "slow": 12}]
    assert taus_of(stl(**{"algorithm.growth": 0.5}), 0.025) == [{"fast": 16, "slow": 6}]
    assert taus_of(stl(**{"algorithm.growth": 0}), 0.025) == [{"fast": 8, "slow": 3}]


def test_growth_has_a_bound_and_a_rate_that_rises_again_makes_rounds_short_again() -> None:
    made = stl(**{"algorithm.max_growth": 3})
    assert taus_of(made, 0.0, 0.1, 0.2, 0.1) == [
        {"fast": 24, "slow": 9}, {"fast": 8, "slow": 3}, {"fast": 8, "slow": 3}, {"fast": 16, "slow": 6}]
    assert "3 times" not in made.reason and made.reason.endswith("2 times as long as at first")


def test_a_round_stays_within_the_data() -> None:
    """Of 1000 samples a round of 64 and 24 steps takes 200; one of eight times as many would take 1600."""
    made = stl(**{"train.tau": {"fast": 64, "slow": 24}, "algorithm.max_growth": 100})
    assert taus_of(made, 0.02, 0.01) == [{"fast": 320, "slow": 120}, {"fast": 320, "slow": 120}]


def test_derived_taus_grow_too_and_a_resumed_run_goes_on() -> None:
    settings = {"algorithm.name": "stl_sgd", "train.batch_size": 1, "train.tau": 16, "train.tau_margin": 0}
    first, second = method(settings), method(settings)
    assert isinstance(first, STLSGD) and isinstance(second, STLSGD)
    for made in (first, second):
        made.start(made.make_plan(SPEEDS))
    assert taus_of(first, 0.1, 0.05) == [{"fast": 16, "slow": 2}, {"fast": 32, "slow": 4}]
    second.start(first.plan)
    second.load_state_dict(first.state_dict())
    assert taus_of(second, 0.05, 0.025) == [{"fast": 32, "slow": 4}, {"fast": 64, "slow": 8}]


def test_rounds_whose_length_was_chosen_change_with_the_rate_alone() -> None:
    """And not with what an average happens to take in an epoch."""
    made = method({"algorithm.name": "stl_sgd", "train.batch_size": 4, "train.tau": "auto"}, samples=100_000)
    made.average_sec = 0.01
    made.start(made.make_plan({"fast": 0.01, "slow": 0.03}))
    first, found = made.plan.classes[0].tau, []
    for average_sec, rate in ((0.012, 0.1), (0.008, 0.1), (0.012, 0.05)):
        made.note_average(average_sec)
        made.follow_rate(rate)
        found.append(made.replan([0.01] * 2 + [0.03] * 3).classes[0].tau)
    assert found == [first, first, 2 * first]
