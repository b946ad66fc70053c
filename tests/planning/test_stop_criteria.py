"""Where a run ends: at the first of its limits, at the end of a round, the same on all ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.config.schema import TrainConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import Plan, make_plan
from hvd_hetero.planning.stop_criteria import RunProgress, check_limits, expected_epochs, next_rounds, rest_rounds


@pytest.fixture
def plan() -> Plan:
    """Five rounds an epoch, of one fast and one slow rank; a round is 4 fast steps and 50 samples."""
    facts = tuple(RankFacts(rank, "here", rank, (), "cpu", (0,)) for rank in range(2))
    cluster = Cluster((DeviceClass("fast", "cpu", (0,)), DeviceClass("slow", "cpu", (1,))), facts)
    return make_plan(cluster, 250, {"fast": 4, "slow": 1}, {"fast": 10, "slow": 10})


@pytest.mark.parametrize(
    ("settings", "epochs", "rounds"),
    [
        ({"epochs": 2}, 2, 10),
        ({"epochs": None, "max_fast_steps": 27}, 2, 6),
        ({"epochs": 1, "max_fast_steps": 27}, 1, 5),
        ({"epochs": None, "max_samples": 349}, 2, 6),
        ({"epochs": None, "max_samples": 350, "max_fast_steps": 1000}, 2, 7),
    ],
)
def test_a_run_ends_at_the_first_limit(plan: Plan, settings: dict[str, Any], epochs: int, rounds: int) -> None:
    train = TrainConfig(**settings)
    check_limits(train, plan)
    assert expected_epochs(train, plan) == epochs
    done, taken = RunProgress(), []
    while part := next_rounds(train, plan, done):
        taken.append(part)
        done = RunProgress(done.epochs + 1, done.rounds + part, done.fast_steps + 4 * part, done.samples + 50 * part)
    assert (len(taken), sum(taken)) == (epochs, rounds)


def test_seconds_end_a_run_as_nearly_as_its_pace_tells(plan: Plan) -> None:
    train = TrainConfig(epochs=None, max_train_sec=10.0)
    assert expected_epochs(train, plan) is None and next_rounds(train, plan, RunProgress()) == 5
    assert next_rounds(train, plan, RunProgress(1, 5, 20, 250, 5.0)) == 5
    assert next_rounds(train, plan, RunProgress(1, 5, 20, 250, 6.4)) == 3  # 1.28 s a round, 3.6 s left
    assert next_rounds(train, plan, RunProgress(1, 5, 20, 250, 9.5)) == 0


@pytest.mark.parametrize(("done", "rounds"), [
    (RunProgress(1, 1, 4, 250, 5.0), 5),  # 250 samples in 5 s: 250 more, however many rounds they were made in
    (RunProgress(1, 40, 160, 250, 5.0), 5),
    (RunProgress(1, 5, 20, 125, 5.0), 2),  # 125 more are 2.5 rounds
    (RunProgress(1, 5, 20, 100, 5.0), 2),
    (RunProgress(1, 5, 20, 80, 8.0), 0),  # 20 more are less than half a round
    (RunProgress(1, 5, 20, 250, 10.0), 0),
    (RunProgress(1, 5, 20, 250, 12.0), 0),  # over it already
    (RunProgress(1, 5, 20, 0, 3.0), 5),  # nothing is known of its speed
])
def test_seconds_are_counted_in_samples(plan: Plan, done: RunProgress, rounds: int) -> None:
    """Rounds of a partial collective may be of any size, so only samples tell how fast a run is."""
    assert next_rounds(TrainConfig(epochs=None, max_train_sec=10.0), plan, done) == rounds


def test_the_nearest_of_several_limits_counts(plan: Plan) -> None:
    done = RunProgress(1, 5, 20, 250, 5.0)
    for settings, rounds in (
        ({"max_train_sec": 8.0}, 3),
        ({"max_train_sec": 8.0, "max_samples": 350}, 2),
        ({"max_train_sec": 6.0, "max_samples": 350}, 1),
        ({"max_train_sec": 8.0, "max_fast_steps": 27}, 1),
        ({"max_train_sec": 8.0, "epochs": 1}, 0),
    ):
        assert next_rounds(TrainConfig(**{"epochs": None, **settings}), plan, done) == rounds, settings


def test_limits_within_the_first_round_are_refused(plan: Plan) -> None:
    with pytest.raises(ConfigError, match=r"train\.max_samples=49: one round takes 50"):
        check_limits(TrainConfig(max_samples=49), plan)


def test_what_is_left_of_an_epoch_has_no_more_rounds_than_samples(plan: Plan) -> None:
    """The slow rank takes as many steps as the fast one from now on: 80 samples a round, and still 4 fast steps."""
    fast, slow = plan.classes
    new, done = Plan((fast, replace(slow, tau=4)), 3), RunProgress(0, 2, 8, 100)
    dataset, by_steps = TrainConfig(), TrainConfig(epoch_length="fast_steps")
    assert rest_rounds(dataset, plan, new, 3, 150, done) == 1
    assert rest_rounds(by_steps, plan, new, 3, 1000, done) == 3
    assert rest_rounds(by_steps, plan, new, 3, 250 - 100, done) == 1
    limited = TrainConfig(epoch_length="fast_steps", max_fast_steps=17, max_train_sec=1.0)
    assert rest_rounds(limited, plan, new, 3, 1000, replace(done, train_sec=0.9)) == 2, "seconds do not count"
