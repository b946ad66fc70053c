"""Weights by steps that turn into uniform ones (``aggregation.anneal_from``)."""

from __future__ import annotations

from typing import Any

import pytest

from hvd_hetero import algorithms
from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.config.load import device_classes, load
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import annealed_weight

TAUS = {"fast": 32, "slow": 4}


def policy(settings: dict[str, Any]) -> LocalSGD:
    facts = [RankFacts(rank, "here", rank, (), "cpu", (0, 1)) for rank in range(3)]
    cluster = assign(device_classes({"fast": {"ranks": [0]}, "slow": {"ranks": [1, 2]}}), facts)
    config = load((), {"train.tau": TAUS, "train.batch_size": 4} | settings, algorithms.method)
    made = algorithms.policy(config, cluster, 100000, 1)
    made.check()
    made.start(made.make_plan(None))
    assert isinstance(made, LocalSGD)
    return made


@pytest.mark.parametrize(("fraction", "expected"), [
    (0.0, 0.8), (0.5, 0.8), (0.75, 0.8), (0.875, (0.8 + 1 / 3) / 2), (1.0, 1 / 3), (1.5, 1 / 3),
])
def test_the_weight_of_a_rank_in_the_course_of_a_run(fraction: float, expected: float) -> None:
    """tau 32, 4, 4: 0.8 by steps, until three quarters of the run are done."""
    assert annealed_weight(0.8, 3, fraction, 0.75) == pytest.approx(expected)
    made = policy({"aggregation.anneal_from": 0.75})
    made.fraction_done = fraction
    fast, slow = (made.plan.of_rank(rank) for rank in (0, 1))
    assert made.weight_of(fast) == pytest.approx(expected)
    assert made.weight_of(fast) + 2 * made.weight_of(slow) == pytest.approx(1)


def test_weights_stay_as_they_are_unless_told_otherwise() -> None:
    made = policy({})
    made.fraction_done = 1.0
    assert made.weight_of(made.plan.of_rank(0)) == made.plan.of_rank(0).weight == pytest.approx(0.8)


def test_a_class_that_takes_no_steps_gets_no_weight() -> None:
    made = policy({"aggregation.anneal_from": 0.0})
    made.fraction_done = 1.0
    plan = made.plan
    idle = plan.classes[1].__class__(**{**vars(plan.classes[1]), "tau": 0, "weight": 0.0, "role": "idle"})
    assert made.weight_of(idle) == 0


@pytest.mark.parametrize(("settings", "problem"), [
    ({"aggregation.weights": "uniform"}, "aggregation.weights=uniform has no bias by steps that could end"),
    ({"aggregation.weights": "normalised"}, "aggregation.weights=normalised has no bias by steps that could end"),
    ({"aggregation.mode": "solo"}, "needs all ranks to be in the same round"),
    ({"cluster.too_slow": "wait_avoiding", "train.tau": 32}, "needs all ranks to be in the same round"),
    ({"algorithm.name": "sync_sgd"}, "sync_sgd averages gradients, not models"),
    ({"algorithm.name": "asgd"}, "asgd has a server"),
])
def test_what_it_does_not_go_with(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        policy({"aggregation.anneal_from": 0.5} | settings)
    assert str(caught.value).startswith(f"aggregation.anneal_from=0.5: {problem}")
