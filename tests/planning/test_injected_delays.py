"""Delays for experiments: their laws, and that they can be repeated."""

from __future__ import annotations

from itertools import islice
from statistics import median

import pytest

from hvd_hetero.config.schema import DelaysConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.injected_delays import check_delays, delays

STEPS, SIZE = 400, 4


def drawn(spec: DelaysConfig) -> list[list[float]]:
    """Seconds ``[ranks][steps]``."""
    streams = [delays(spec, rank, SIZE) for rank in range(SIZE)]
    assert all(stream is not None for stream in streams)
    return [list(islice(stream, STEPS)) for stream in streams if stream is not None]


def test_none_unless_asked_for() -> None:
    assert delays(DelaysConfig(), 0, SIZE) is None


def test_random_ranks_delays_one_or_two_of_them_in_every_step() -> None:
    columns = list(zip(*drawn(DelaysConfig("random_ranks", seed=1, sec=0.3)), strict=True))
    late = [sum(sec > 0 for sec in column) for column in columns]
    assert set(late) == {1, 2} and {sec for column in columns for sec in column} == {0.0, 0.3}
    assert 0.15 < late.count(1) / STEPS < 0.35, "the same rank twice: a quarter of the steps"
    assert all(any(column[rank] for column in columns) for rank in range(SIZE))


def test_lognormal_has_the_median_that_was_asked_for() -> None:
    rows = drawn(DelaysConfig("lognormal", seed=1, sec=0.1, sigma=0.5))
    assert median(sec for row in rows for sec in row) == pytest.approx(0.1, rel=0.1)
    assert rows[0] != rows[1] and min(sec for row in rows for sec in row) > 0


def test_linear_skew_goes_round() -> None:
    rows = drawn(DelaysConfig("linear_skew", seed=1, sec=0.3))
    assert [row[0] for row in rows] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [row[1] for row in rows] == pytest.approx([0.1, 0.2, 0.3, 0])


@pytest.mark.parametrize("distribution", ["random_ranks", "lognormal"])
def test_the_seed_decides(distribution: str) -> None:
    one, same, other = (drawn(DelaysConfig(distribution, seed=seed)) for seed in (3, 3, 4))
    assert one == same != other


def test_without_a_seed_they_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"delays\.seed"):
        check_delays(DelaysConfig("lognormal"))
