"""The plan's arithmetic: local steps, weights, rounds of an epoch, integer shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.local_steps import derive_tau, planned_step_sec
from hvd_hetero.planning.plan import Plan, apportion, check_bias_to, check_least_round, make_plan, round_way


def cluster(**ranks: int) -> Cluster:
    """A cluster of CPU classes with so many ranks each."""
    start, classes = 0, []
    for name, count in ranks.items():
        classes.append(DeviceClass(name, "cpu", tuple(range(start, start + count))))
        start += count
    return Cluster(tuple(classes), tuple(RankFacts(r, "here", r, (), "cpu", (0,)) for r in range(start)))


Counts = Mapping[str, int]


def plan(samples: int, workers: Counts, tau: Counts, batch: Counts, **how: Any) -> Plan:
    return make_plan(cluster(**workers), samples, tau, batch, **how)


# ---- local steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "seconds", "expected"), [
    (32, {"fast": 1.0, "slow": 2.0}, {"fast": 32, "slow": 16}),
    (32, {"fast": 0.01, "slow": 0.08}, {"fast": 32, "slow": 4}),
    (32, {"slow": 32.0, "fast": 1.0}, {"slow": 1, "fast": 32}),
    (10, {"fast": 1.0, "slow": 4.0}, {"fast": 10, "slow": 3}),  # 2.5 goes up
    (10, {"fast": 1.0, "slow": 4.1}, {"fast": 10, "slow": 2}),
    (10, {"fast": 1.0, "slow": 6.6}, {"fast": 10, "slow": 2}),  # 1.515
    (8, {"a": 1.0, "b": 1.05, "c": 3.0}, {"a": 8, "b": 8, "c": 3}),
    (1, {"only": 5.0}, {"only": 1}),
    (49, {"fast": 1.0, "slow": 49.0}, {"fast": 49, "slow": 1}),  # 49 * (1 / 49) < 1 in floating point
])
def test_tau_follows_the_measured_ratio(tau: int, seconds: dict[str, float], expected: dict[str, int]) -> None:
    assert derive_tau(tau, seconds) == expected


def test_slower_classes_are_planned_to_be_done_early_by_a_margin() -> None:
    """t / (1 - margin (1 - r)): all of it for a very slow class, half of it for one half as fast, none at r = 1."""
    planned = planned_step_sec({"fast": 1.0, "same": 1.0, "half": 2.0, "slow": 1000.0}, 0.2)
    assert planned == pytest.approx({"fast": 1.0, "same": 1.0, "half": 2.0 / 0.9, "slow": 1000.0 / 0.8002})
    seconds = {"fast": 1.0, "half": 2.0, "slow": 10.0}
    assert derive_tau(100, seconds, margin=0.2) == {"fast": 100, "half": 45, "slow": 8}
    assert derive_tau(10, {"fast": 1.0, "slow": 10.0}, margin=0.5)["slow"] == 1, "a margin makes no class too slow"


def test_a_class_too_slow_for_one_step_is_refused_with_the_ways_out() -> None:
    with pytest.raises(ConfigError) as caught:
        derive_tau(4, {"fast": 0.010, "slow": 0.047})
    assert caught.value.key == "train.tau" and caught.value.value == 4
    assert "class slow is 4.7 times slower" in caught.value.problem
    assert "train.tau=5 or more" in caught.value.remedy and "train.batch_size for slow" in caught.value.remedy


@given(st.floats(1e-6, 1e3), st.integers(1, 5000), st.floats(1.0, 1.999))
def test_the_tau_that_the_error_proposes_is_enough(fastest: float, times: int, more: float) -> None:
    seconds = {"fast": fastest, "slow": fastest * times * more}
    try:
        derive_tau(1, seconds)
    except ConfigError as error:
        proposed = int(error.remedy.split("train.tau=")[1].split()[0])
        assert derive_tau(proposed, seconds)["slow"] >= 1
        with pytest.raises(ConfigError):
            derive_tau(proposed - 1, seconds)


@given(st.integers(1, 1000), st.lists(st.floats(1.0, 1.0e3), min_size=1, max_size=5))
def test_nobody_waits_longer_than_half_a_step(tau: int, ratios: list[float]) -> None:
    """A class's time in a round differs from the fastest's by half a step of its own, or it takes one step."""
    seconds = {str(i): 0.001 * ratio for i, ratio in enumerate(ratios)}
    fastest = min(seconds.values())
    assume(tau * fastest >= max(seconds.values()))
    for name, count in derive_tau(tau, seconds).items():
        assert count >= 1
        assert abs(count * seconds[name] - tau * fastest) <= seconds[name] / 2 * (1 + 1e-9)


# ---- weights and rounds ---------------------------------------------------------------------------------------------


def test_weights_by_steps_and_uniform() -> None:
    workers, tau, batch = {"fast": 1, "slow": 2}, {"fast": 32, "slow": 4}, {"fast": 8, "slow": 8}
    by_steps = plan(10_000, workers, tau, batch, weights="steps")
    assert [c.weight for c in by_steps.classes] == [32 / 40, 4 / 40]
    uniform = plan(10_000, workers, tau, batch, weights="uniform")
    assert [c.weight for c in uniform.classes] == [1 / 3, 1 / 3]


def test_how_far_a_round_moves() -> None:
    """Of 32 steps of a fast rank; two slow ranks take 4."""
    workers, tau, batch = {"fast": 1, "slow": 2}, {"fast": 32, "slow": 4}, {"fast": 8, "slow": 8}
    ways = {name: plan(10_000, workers, tau, batch, weights=name) for name in ("uniform", "steps", "normalised")}
    found = {name: round_way(made, name, 100.0) for name, made in ways.items()}
    assert found == pytest.approx({"uniform": 40 / 96, "steps": (1024 + 32) / (40 * 32), "normalised": 1.0})
    assert round_way(ways["normalised"], "normalised", 1.0) == pytest.approx(found["steps"]), "nothing beyond by steps"


CLASSES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 64)), min_size=1, max_size=4)


@settings(max_examples=200)
@given(CLASSES, st.integers(1, 10**6), st.sampled_from(["steps", "uniform"]),
       st.sampled_from(["dataset", "fast_steps"]))  # fmt: skip
def test_what_every_plan_keeps_to(
    classes: list[tuple[int, int, int]], samples: int, weights: str, epoch_length: str
) -> None:
    """Weights sum to 1; no class needs more samples than there are; an epoch leaves less than a round over."""
    names = [f"c{i}" for i in range(len(classes))]
    workers, tau, batch = (dict(zip(names, column, strict=True)) for column in zip(*classes, strict=True))
    in_round = sum(m * t * b for m, t, b in classes)
    fast_tau = max(tau.values())
    fast_batch = next(b for _, t, b in classes if t == fast_tau)
    counted = in_round if epoch_length == "dataset" else max(in_round, fast_batch * fast_tau * sum(workers.values()))
    if samples < counted:
        with pytest.raises(ConfigError, match=f"takes {counted} samples, the training set has {samples}"):
            plan(samples, workers, tau, batch, weights=weights, epoch_length=epoch_length)
        return
    made = plan(samples, workers, tau, batch, weights=weights, epoch_length=epoch_length)
    assert math.isclose(sum(c.weight for c in made.by_rank()), 1, rel_tol=1e-12)
    assert made.rounds == samples // counted >= 1
    assert sum(made.epoch_samples().values()) == made.rounds * in_round <= samples
    assert made.epoch_samples() == {n: made.rounds * workers[n] * tau[n] * batch[n] for n in names}
    assert [c.name for c in made.by_rank()] == [n for n in names for _ in range(workers[n])]


def test_the_papers_rounds_per_epoch() -> None:
    """CIFAR-10 (50 000 samples), 10 workers, B = 32, tau = 32: 4 rounds, whatever the slow workers do."""
    workers, batch = {"cpu": 2, "gpu": 8}, {"cpu": 32, "gpu": 32}
    for slow in (16, 4, 1):
        assert plan(50_000, workers, {"cpu": slow, "gpu": 32}, batch, epoch_length="fast_steps").rounds == 4
    # an epoch over the data has more rounds, since slow workers consume less: 50 000 // (32 * (8 * 32 + 2 * 4))
    assert plan(50_000, workers, {"cpu": 4, "gpu": 32}, batch, epoch_length="dataset").rounds == 5
    assert plan(50_000, workers, {"cpu": 1, "gpu": 32}, batch, epoch_length="dataset").rounds == 6


def test_check_before_the_speeds_are_known() -> None:
    """The least round: the class that could be fastest takes tau steps, every other class one."""
    workers, batch = cluster(a=1, b=2), {"a": 10, "b": 20}
    least = min(4 * 10 + 2 * 20, 10 + 4 * 2 * 20)
    check_least_round(workers, least, 4, batch)
    with pytest.raises(ConfigError, match=f"at least {least} samples, the training set has {least - 1}"):
        check_least_round(workers, least - 1, 4, batch)


def test_the_papers_epoch_needs_the_fastest_ranks_steps_on_every_rank() -> None:
    workers, batch = cluster(fast=1, slow=1), {"fast": 8, "slow": 8}
    check_least_round(workers, 8 * 4 * 2, 4, batch, "fast_steps")
    with pytest.raises(ConfigError, match="at least 64 samples"):
        check_least_round(workers, 8 * 4 * 2 - 1, 4, batch, "fast_steps")


# ---- who is fast ----------------------------------------------------------------------------------------------------


def test_fastest_and_slowest_by_measurement_or_by_steps() -> None:
    workers, batch = {"a": 1, "b": 1}, {"a": 8, "b": 8}
    by_steps = plan(1000, workers, {"a": 2, "b": 8}, batch)
    assert (by_steps.fastest.name, by_steps.slowest.name) == ("b", "a")
    measured = plan(1000, workers, {"a": 8, "b": 8}, batch, step_sec={"a": 0.3, "b": 0.2})
    assert (measured.fastest.name, measured.slowest.name) == ("b", "a")


def test_who_gets_the_hard_samples() -> None:
    ones = dict.fromkeys(("slow", "mid", "quick"), 1)
    made = plan(1000, ones, {"slow": 1, "mid": 2, "quick": 8}, ones)
    assert [made.biased(to) for to in ("fast", "slow", "mid", "quick")] == ["quick", "slow", "mid", "quick"]
    swapped = plan(1000, {"slow": 1, "fast": 1}, {"slow": 8, "fast": 2}, {"slow": 1, "fast": 1})
    assert swapped.biased("fast") == "fast", "a class's own name comes before the role"
    check_bias_to("mid", ["slow", "mid"])
    with pytest.raises(ConfigError, match="sampling.bias_to='midd'"):
        check_bias_to("midd", ["slow", "mid"])


def test_speed_is_samples_per_time() -> None:
    made = plan(1000, {"a": 1, "b": 1}, {"a": 8, "b": 2}, {"a": 4, "b": 16})
    assert [c.speed for c in made.classes] == [32, 32]
    timed = plan(1000, {"a": 1, "b": 1}, {"a": 8, "b": 2}, {"a": 4, "b": 16}, step_sec={"a": 0.5, "b": 4.0})
    assert [c.speed for c in timed.classes] == [8, 4]


def test_digest_tells_plans_apart() -> None:
    one = plan(1000, {"a": 1, "b": 1}, {"a": 8, "b": 2}, {"a": 4, "b": 4})
    same = plan(1000, {"a": 1, "b": 1}, {"a": 8, "b": 2}, {"a": 4, "b": 4})
    other = plan(1000, {"a": 1, "b": 1}, {"a": 8, "b": 3}, {"a": 4, "b": 4})
    assert one.digest() == same.digest() != other.digest()
    assert len(one.digest()) == 16


# ---- integer shares -------------------------------------------------------------------------------------------------


def test_apportion_by_largest_remainder() -> None:
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(7, [2.0, 1.0]) == [5, 2]
    assert apportion(0, [1, 2]) == [0, 0]
    assert apportion(5, [0, 1]) == [0, 5]


@given(st.integers(0, 10**6), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
def test_apportion_is_exact_and_fair(total: int, shares: list[float]) -> None:
    counts = apportion(total, shares)
    assert sum(counts) == total
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - total * share / sum(shares)) < 1 + 1e-6


@given(st.integers(1, 1000), st.lists(st.integers(1, 50), min_size=2, max_size=8))
def test_apportion_keeps_the_order_of_the_shares(total: int, shares: list[int]) -> None:
    counts = apportion(total, shares)
    for a, more in zip(counts, shares, strict=True):
        for b, less in zip(counts, shares, strict=True):
            assert more <= less or a >= b
