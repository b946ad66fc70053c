"""When tau is derived anew: for a lasting change of speed, and for nothing less."""

from __future__ import annotations

import math

import pytest

from hvd_hetero.planning.local_steps import derive_tau
from hvd_hetero.planning.plan import IDLE, ClassPlan, Plan
from hvd_hetero.planning.rebalance import BOUND, EPOCHS, JUDGED_SEC, NEW_SHARE, TO_MORE, Rebalancer, settled_step_sec

BATCH = {"fast": 8, "slow": 8}


def plan_for(rebalancer: Rebalancer, step_sec: dict[str, float] | None = None, margin: float = 0.0) -> Plan:
    taus = derive_tau(64, step_sec or rebalancer.step_sec, margin=margin)
    return Plan(tuple(ClassPlan(name, (rank,), tau, 8, 0.5) for rank, (name, tau) in enumerate(taus.items())), 1)


def test_waste_is_the_share_of_the_capacity_that_waits() -> None:
    rebalancer = Rebalancer({"fast": 1.0, "slow": 8.0}, BATCH)
    assert rebalancer.waste(plan_for(rebalancer)) == pytest.approx(0.0)
    late = Plan((ClassPlan("fast", (0,), 64, 8, 0.5), ClassPlan("slow", (1,), 16, 8, 0.5)), 1)
    # a round lasts 16 * 8 s, in which the classes could do 128 and 16 steps; they do 64 and 16
    assert rebalancer.waste(late) == pytest.approx(1 - (64 + 16) / (128 + 16))


def drive(
    rebalancer: Rebalancer, slow: list[float], epoch_sec: float = JUDGED_SEC, margin: float = 0.0
) -> list[tuple[int, int]]:
    """The epochs in which tau of the slow class changed, and to what."""
    current, changes = plan_for(rebalancer, margin=margin), []
    for number, seconds in enumerate(slow):
        if not rebalancer.observe({"fast": 1.0, "slow": seconds}, epoch_sec):
            continue
        latest = plan_for(rebalancer, rebalancer.latest, margin)
        new = latest if rebalancer.is_obvious_gain(current, latest) else None
        if new is None and rebalancer.is_worth_it(current, plan_for(rebalancer, margin=margin)):
            new = plan_for(rebalancer, margin=margin)
        if new is not None:
            current = new
            changes.append((number, current.of_rank(1).tau))
    return changes


def test_a_class_that_slows_down_much_is_rebalanced_after_one_epoch_and_then_left_alone() -> None:
    """From a quarter of a core to a twelfth."""
    assert drive(Rebalancer({"fast": 1.0, "slow": 4.0}, BATCH), [4.0] * 5 + [12.0] * 15) == [(5, 5)]
    assert drive(Rebalancer({"fast": 1.0, "slow": 12.0}, BATCH), [12.0] * 5 + [4.0] * 15) == [(5, 16)]


def test_a_class_that_slows_down_a_little_is_rebalanced_when_that_lasts() -> None:
    changes = drive(Rebalancer({"fast": 1.0, "slow": 4.0}, BATCH), [4.0] * 5 + [4.4] * 15)
    assert changes[0][0] >= 5 + EPOCHS - 1 and changes[-1][1] in (14, 15) and len(changes) <= 2


def test_a_class_that_speeds_up_a_little_takes_more_steps_when_that_has_lasted_twice_as_long() -> None:
    up = drive(Rebalancer({"fast": 1.0, "slow": 4.8}, BATCH), [4.8] * 5 + [4.0] * 15)
    down = drive(Rebalancer({"fast": 1.0, "slow": 4.0}, BATCH), [4.0] * 5 + [4.4] * 15)
    assert down[0][0] <= 5 + 2 * EPOCHS - 1 < up[0][0] <= 5 + TO_MORE * EPOCHS + 2 and up[-1][1] == 16


def test_a_plan_without_its_margin_is_given_one_and_then_left_alone() -> None:
    rebalancer = Rebalancer({"fast": 1.0, "slow": 8.0}, BATCH, margin=0.2)
    matched, early = plan_for(rebalancer), plan_for(rebalancer, {"fast": 1.0, "slow": 8.0 / (1 - 0.2 * 7 / 8)})
    assert [c.tau for c in (*matched.training, *early.training)] == [64, 8, 64, 7]
    assert [rebalancer.is_worth_it(matched, early) for _ in range(EPOCHS)] == [False] * (EPOCHS - 1) + [True]
    assert not any(rebalancer.is_worth_it(early, matched) for _ in range(5 * TO_MORE * EPOCHS))


def test_half_of_the_margin_is_a_dead_band() -> None:
    """At 8.4 the whole margin would ask for 6 steps; but 7 are done in time."""
    drifted = Rebalancer({"fast": 1.0, "slow": 8.4}, BATCH, margin=0.2)
    early, earlier = plan_for(drifted, {"fast": 1.0, "slow": 8.0}, 0.2), plan_for(drifted, margin=0.2)
    assert [early.of_rank(1).tau, earlier.of_rank(1).tau] == [7, 6]
    assert not any(drifted.is_worth_it(early, earlier) for _ in range(5 * EPOCHS))


def test_a_class_that_was_left_out_may_come_back() -> None:
    """The fastest one has slowed down so much that the other now has its step in a round."""
    rebalancer = Rebalancer({"fast": 1.0, "slow": 60.0}, BATCH)
    fast = ClassPlan("fast", (0,), 64, 8, 0.9)
    excluded = Plan((fast, ClassPlan("slow", (1,), 0, 0, 0.0, role=IDLE)), 1)
    back = Plan((fast, ClassPlan("slow", (1,), 1, 8, 0.1)), 1)
    assert [rebalancer.is_worth_it(excluded, back) for _ in range(2)] == [False, False]


def test_an_estimate_moves_within_bounds() -> None:
    rebalancer = Rebalancer({"fast": 1.0, "slow": 4.0}, BATCH)
    assert rebalancer.observe({"fast": 1.0, "slow": 400.0}, JUDGED_SEC)
    assert rebalancer.latest["slow"] == 4.0 * BOUND


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_one_disturbed_epoch_and_a_little_noise_change_nothing(margin: float) -> None:
    noise = [8.0 * (1.01 if number % 2 else 0.99) for number in range(30)]
    noise[10] = 8.0 * 1.09
    assert drive(Rebalancer({"fast": 1.0, "slow": 8.0}, BATCH, margin), noise, margin=margin) == []
    assert 0 < NEW_SHARE < 1


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_short_epochs_are_judged_together_by_their_median(margin: float) -> None:
    """An emulated rank on a busy machine: a third off from one quarter of a second to the next."""
    noise = [8.0 * (1 + (0.35, -0.3, 0.1, 0.0, -0.1)[number % 5]) for number in range(200)]
    assert drive(Rebalancer({"fast": 1.0, "slow": 8.0}, BATCH, margin), noise, JUDGED_SEC / 8, margin) == []
    assert drive(Rebalancer({"fast": 1.0, "slow": 8.0}, BATCH, margin), noise, margin=margin) != [], "each for itself"


def test_short_epochs_that_show_a_new_speed_are_believed_when_there_are_enough() -> None:
    changes = drive(Rebalancer({"fast": 1.0, "slow": 4.0}, BATCH), [4.0] * 8 + [12.0] * 40, JUDGED_SEC / 8)
    assert changes == [(15, 5)]


def test_epochs_that_wait_for_their_judgement_are_saved() -> None:
    first, second = (Rebalancer({"fast": 1.0, "slow": 4.0}, BATCH) for _ in range(2))
    assert not first.observe({"fast": 1.0, "slow": 12.0}, 0.75 * JUDGED_SEC)
    second.load_state_dict(first.state_dict())
    assert not second.observe({"fast": 1.0}, 0.5 * JUDGED_SEC), "of two, the median is no better than either"
    assert second.observe({"fast": 1.0}, 0.25 * JUDGED_SEC)  # the slow class took no step in these epochs
    assert second.latest == {"fast": 1.0, "slow": 12.0}


def test_the_step_time_of_an_epoch_is_that_of_its_second_half() -> None:
    assert settled_step_sec([40.0] * 10 + [120.0] * 10, [10] * 20) == pytest.approx(12.0)


def test_a_process_that_stood_still_for_a_moment_is_not_slow() -> None:
    rounds = [40.0] * 40
    rounds[30] = 5000.0
    assert settled_step_sec(rounds, [10] * 40) == pytest.approx(4.0)


def test_uneven_rounds_are_averaged() -> None:
    """A quota lets a rank take one step at full speed, and stops it in the middle of the next."""
    assert settled_step_sec([1.0, 15.0] * 64, [1] * 128) == pytest.approx(8.0)


def test_a_rank_without_steps_was_not_measured() -> None:
    assert math.isnan(settled_step_sec([0.0, 0.0], [0, 0])) and math.isnan(settled_step_sec([], []))


def test_a_part_of_the_batch_is_judged_by_its_samples() -> None:
    """A shrunk batch of 2 takes a quarter of the time of 8."""
    rebalancer = Rebalancer({"fast": 1.0, "slow": 128.0}, BATCH)
    shrunk = Plan((ClassPlan("fast", (0,), 32, 8, 0.9), ClassPlan("slow", (1,), 1, 2, 0.1)), 1)
    assert rebalancer.waste(shrunk) == pytest.approx(0.0)
