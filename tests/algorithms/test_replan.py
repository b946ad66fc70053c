"""tau of the local-SGD methods: with which margin it is derived, and how it is derived anew; without a job."""

from __future__ import annotations

from typing import Any

import pytest
from method_helpers import TWO, method

from hvd_hetero.algorithms.local_sgd import LocalSGD

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
    assert made.reason.endswith("wait no more")
    before = made.plan
    assert all(made.replan(slowed) is before for _ in range(200)), "a stable one is left alone"
