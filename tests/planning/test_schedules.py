"""Learning-rate schedules by progress."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.config.load import device_classes
from hvd_hetero.config.schema import TrainConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import Plan, make_plan
from hvd_hetero.planning.schedules import check_schedule, rate_factor, run_fraction
from hvd_hetero.planning.stop_criteria import RunProgress

SHARES = st.floats(0, 1)


def plan() -> Plan:
    """Ten rounds of 4 fast steps and 40 samples."""
    facts = [RankFacts(rank, "here", rank, (), "cpu", (0,)) for rank in range(2)]
    cluster = assign(device_classes({"fast": {"ranks": [0]}, "slow": {"ranks": [1]}}), facts)
    return make_plan(cluster, 400, {"fast": 4, "slow": 1}, {"fast": 8, "slow": 8})


def test_cosine_is_torchs() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    for step in range(21):
        assert rate_factor("cosine", step / 20, {"floor": 0.1}) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@given(st.sampled_from(["cosine", "linear"]), SHARES, st.floats(0, 0.9), SHARES)
def test_what_every_schedule_keeps_to(name: str, fraction: float, warmup: float, floor: float) -> None:
    args = {"warmup": warmup, "floor": floor}
    factor = rate_factor(name, fraction, args)
    assert 0 <= factor <= 1 + 1e-12
    assert rate_factor(name, 1.0, args) == pytest.approx(floor)
    assert rate_factor(name, warmup, args) == pytest.approx(1.0)
    if fraction >= warmup:
        assert factor >= floor - 1e-12 and rate_factor(name, min(1.0, fraction + 0.05), args) <= factor + 1e-12
    else:
        assert factor == pytest.approx(fraction / warmup)


@pytest.mark.parametrize(("limits", "fraction"), [
    ({"epochs": 4}, (1 + 5 / 11) / 4),
    ({"epochs": None, "max_fast_steps": 100}, (40 + 20) / 100),
    ({"epochs": None, "max_samples": 800}, (400 + 200) / 800),
    ({"epochs": None, "max_train_sec": 60.0}, 30.0 * 1.5 / 60),
    ({"epochs": 4, "max_fast_steps": 61}, 60 / 61),
    ({"epochs": None, "max_fast_steps": 50}, 1.0),
])
def test_the_fraction_goes_by_the_nearest_limit(limits: dict[str, Any], fraction: float) -> None:
    done = RunProgress(epochs=1, rounds=10, fast_steps=40, samples=400, train_sec=30.0)
    whole = replace(plan(), rounds=11) if limits == {"epochs": 4} else plan()
    assert run_fraction(replace(TrainConfig(), **limits), whole, done, 5) == pytest.approx(fraction)


def test_seconds_are_unknown_until_ranks_have_met() -> None:
    train = replace(TrainConfig(), epochs=None, max_train_sec=60.0)
    assert run_fraction(train, plan(), RunProgress(), 9) == 0.0
    met = RunProgress(epoch_rounds=4, epoch_sec=12.0)
    assert run_fraction(train, plan(), met, 4) == pytest.approx(12 / 60)
    assert run_fraction(train, plan(), met, 9) == pytest.approx(9 * 3 / 60)
    slow = RunProgress(epoch_rounds=1, epoch_sec=20.0)  # kernels were loaded
    assert run_fraction(train, plan(), slow, 4) == pytest.approx(40 / 60), "the rate does not fall to 0 at once"
    later = RunProgress(epochs=1, rounds=10, train_sec=20.0, epoch_rounds=2, epoch_sec=4.0)  # 2 s a round
    assert run_fraction(train, plan(), later, 5) == pytest.approx(30 / 60)


@pytest.mark.parametrize(("settings", "key"), [
    ({"scheduler": "cosine", "scheduler_args": {"T_max": 3}}, "train.scheduler_args.T_max"),
    ({"scheduler": "linear", "scheduler_args": {"warmup": 1.0}}, "train.scheduler_args.warmup"),
    ({"scheduler": "linear", "scheduler_args": {"floor": math.nan}}, "train.scheduler_args.floor"),
    ({"scheduler": "linear", "scheduler_args": {"floor": True}}, "train.scheduler_args.floor"),
    ({"scheduler_unit": "round"}, "train.scheduler_unit"),
])
def test_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_schedule(replace(TrainConfig(), **settings))
    assert caught.value.key == key
