"""Bias that ends, falls, or is soft; losses that are smoothed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_hetero.planning.sampling import Sampler, _softly

FAST, SLOW = "quick", "slow"


def made(n: int, **options: float | bool) -> Sampler:
    sampler = Sampler(n, "separate", 0.5, FAST, 0, **options)  # type: ignore[arg-type]
    sampler.losses[:] = np.arange(n)
    return sampler


def hard_of(sampler: Sampler, fraction: float, count: int = 100) -> int:
    """How many of the highest losses the biased class is dealt."""
    sampler.fraction_done = fraction
    n = len(sampler.losses)
    drawn = sampler.draw({FAST: count, SLOW: count})
    return int(np.count_nonzero(drawn[FAST] >= n - count // 2))


def test_it_ends_where_it_is_told_to() -> None:
    sampler = made(10_000, until=0.8)
    assert [hard_of(sampler, fraction) for fraction in (0.0, 0.5, 0.79)] == [50, 50, 50]
    assert hard_of(sampler, 0.8) < 10
    drawn = sampler.draw({FAST: 5_000, SLOW: 5_000})
    assert sorted(np.concatenate(list(drawn.values()))) == list(range(10_000)), "then no sample is in two classes"


def test_it_falls_linearly() -> None:
    sampler = made(10_000, until=0.8, anneal=True)
    for fraction, ratio in ((0.0, 0.5), (0.2, 0.375), (0.4, 0.25), (0.79, 0.00625)):
        sampler.fraction_done = fraction
        assert sampler.ratio == pytest.approx(ratio)
    assert hard_of(sampler, 0.4) in range(25, 35)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.data())
def test_soft_selection_draws_as_many_as_it_should(n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    losses = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0, math.inf, -math.inf]), min_size=n, max_size=n)))
    chosen = _softly(np.random.default_rng(0), losses.astype(np.float32), count)
    assert chosen.dtype == bool and np.count_nonzero(chosen) == count


def test_soft_selection_prefers_high_losses_and_takes_others_too() -> None:
    """Half of 1000: first picks are in proportion to (rank + 1/2) / n, whose mean over the upper half is 3/4."""
    losses, times = np.arange(1000, dtype=np.float32), np.zeros(1000)
    for seed in range(300):
        times += _softly(np.random.default_rng(seed), losses, 500)
    quarters = times.reshape(4, 250).mean(1) / 300
    assert (np.diff(quarters) > 0.05).all() and 0.1 < quarters[0] and quarters[3] < 0.95
    single = np.zeros(10)
    for seed in range(20_000):
        single += _softly(np.random.default_rng(seed), np.arange(10, dtype=np.float32), 1)
    weights = ((np.arange(10) + 0.5) / 10) ** 9
    assert np.abs(single / 20_000 - weights / weights.sum()).max() < 0.01


def test_losses_are_smoothed_where_there_are_two() -> None:
    sampler = Sampler(5, "separate", 0.5, FAST, 0, smoothing=0.75)
    sampler.losses[:] = [1.0, np.inf, -np.inf, 2.0, 3.0]
    sampler.record(np.array([0, 1, 2, 3]), np.array([5.0, 5.0, 5.0, np.nan], np.float32))
    assert sampler.losses.tolist() == [2.0, 5.0, 5.0, math.inf, 3.0]
