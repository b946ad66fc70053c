"""When tau is derived anew: for a lasting change of speed, and for nothing less."""

from __future__ import annotations

import pytest

from hvd_hetero.pacing import NEW_SHARE, PASSES, Pacing
from hvd_hetero.plan import ClassPlan, Plan, derive_tau


def plan_for(pacing: Pacing) -> Plan:
    taus = derive_tau(64, pacing.step_sec)
    return Plan(tuple(ClassPlan(name, (rank,), tau, 8, 0.5) for rank, (name, tau) in enumerate(taus.items())), 1)


def test_waste_is_the_share_of_the_capacity_that_waits() -> None:
    pacing = Pacing({"fast": 1.0, "slow": 8.0})
    assert pacing.waste(plan_for(pacing)) == pytest.approx(0.0)
    late = Plan((ClassPlan("fast", (0,), 64, 8, 0.5), ClassPlan("slow", (1,), 16, 8, 0.5)), 1)
    # a round lasts 16 * 8 s, in which the classes could do 128 and 16 steps; they do 64 and 16
    assert pacing.waste(late) == pytest.approx(1 - (64 + 16) / (128 + 16))


def test_a_class_that_slows_down_is_rebalanced_after_a_few_passes_and_then_left_alone() -> None:
    pacing = Pacing({"fast": 1.0, "slow": 4.0})
    current, changes = plan_for(pacing), []
    for number in range(20):
        pacing.observe({"fast": 1.0, "slow": 4.0 if number < 5 else 12.0})
        if pacing.worth(current, plan_for(pacing)):
            current = plan_for(pacing)
            changes.append(number)
    assert current.of_rank(1).tau == round(64 / 12)
    assert changes and min(changes) == 5 + PASSES - 1 and max(changes) < 14


def test_one_disturbed_pass_and_a_little_noise_change_nothing() -> None:
    pacing = Pacing({"fast": 1.0, "slow": 8.0})
    current = plan_for(pacing)
    for number in range(30):
        noise = 1.01 if number % 2 else 0.99
        pacing.observe({"fast": 1.0, "slow": 8.0 * (1.1 if number == 10 else noise)})
        assert not pacing.worth(current, plan_for(pacing)), number
    assert 0 < NEW_SHARE < 1
