"""Groups of ranks by phase, and which are refused."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.groups import (
    MOST_SETS,
    Partition,
    across,
    by_bits,
    check_by_bits,
    check_number,
    consecutive,
    group_of,
    sets_of,
)


def averaged(values: np.ndarray, partition: Partition) -> np.ndarray:
    """Give every rank the mean of its group."""
    return np.array([values[list(group_of(partition, rank))].mean() for rank in range(len(values))])


def test_four_ranks_in_pairs() -> None:
    assert by_bits(4, 2) == (((0, 1), (2, 3)), ((0, 2), (1, 3)))
    assert by_bits(4, 4) == by_bits(4, 4) == (((0, 1, 2, 3),),) and by_bits(3, 3) == (((0, 1, 2),),)


@pytest.mark.parametrize(("size", "group_size", "phases"), [(4, 2, 2), (8, 2, 3), (16, 4, 2), (64, 8, 2), (64, 4, 3)])
def test_after_all_phases_every_rank_has_the_mean_of_all(size: int, group_size: int, phases: int) -> None:
    """And not before; each partition has every rank once."""
    values, partitions = np.arange(size) ** 2.0, by_bits(size, group_size)
    assert len(partitions) == phases
    now = values
    for partition in partitions:
        assert np.ptp(now) > 0
        assert sorted(rank for group in partition for rank in group) == list(range(size))
        assert {len(group) for group in partition} == {group_size}
        now = averaged(now, partition)
        assert now.mean() == pytest.approx(values.mean())
    assert now == pytest.approx(np.full(size, values.mean()))


def test_a_window_that_does_not_divide_the_bits_wraps_around() -> None:
    """Three bits in windows of two: bits 0 and 1, 2 and 0, 1 and 2."""
    first, second, third = by_bits(8, 4)
    assert first == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert second == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert third == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_hosts_and_what_lies_across_them() -> None:
    assert consecutive(6, 2) == ((0, 1), (2, 3), (4, 5))
    assert across(6, 2) == ((0, 2, 4), (1, 3, 5))
    assert sets_of((consecutive(6, 1), across(6, 1)), 6) == (), "one rank needs no set, and all have one"
    assert sets_of(by_bits(4, 2) * 2, 4) == ((0, 1), (2, 3), (0, 2), (1, 3)), "each once"


@pytest.mark.parametrize(("size", "group_size", "output"), [
    (4, 3, "does not divide the 4 ranks into groups of one size; set one of 1, 2, 4"),
    (6, 2, "take a power of two of ranks, and there are 6; start 4 or 8 ranks, or set key=6"),
])  # fmt: skip
def test_what_cannot_be_grouped_is_refused(size: int, group_size: int, output: str) -> None:
    with pytest.raises(ConfigError, match="key") as error:
        check_by_bits("key", group_size, size)
    assert output in str(error.value)
    for fits in ((6, 6), (8, 2)):
        check_by_bits("key", *fits[::-1])


def test_more_groups_than_process_sets_are_worth_are_refused() -> None:
    check_number("key", 2, [(0, 1)] * MOST_SETS)
    with pytest.raises(ConfigError, match=f"makes {MOST_SETS + 1} groups"):
        check_number("key", 2, [(0, 1)] * (MOST_SETS + 1))
