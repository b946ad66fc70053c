"""How many ranks m-Synchronous SGD should wait for."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_hetero.planning.quorum import Quorum, best_quorum


@pytest.mark.parametrize(("step_sec", "noise", "m"), [
    ([1, 1, 1, 1], 4, 4),
    ([1, 1, 1, 8], 4, 3),
    ([1, 1, 1, 1.1], 4, 4),
    ([1, 1, 8, 8], 1e9, 2),
    ([1, 3, 3, 3], 0, 1),
])  # fmt: skip
def test_the_m_of_the_least_time_for_fixed_speeds(step_sec: list[float], noise: float, m: int) -> None:
    """t_m (1 + s / m), by hand: with much noise t_m / m counts alone, with none t_m."""
    assert best_quorum(np.array([step_sec]), noise) == m


def test_random_delays_make_it_worth_while_to_leave_the_latest_out() -> None:
    """One rank of eight, another one each time, takes four times as long: E[T_(8)] = 4, E[T_(7)] = 1."""
    draws = np.ones((1000, 8))
    draws[np.arange(1000), np.arange(1000) % 8] = 4
    assert best_quorum(draws, 8) == 7
    assert best_quorum(np.ones((1000, 8)), 8) == 8


def test_a_share_is_of_the_weights_and_a_number_of_ranks() -> None:
    assert Quorum.of(0.5, (3.0, 1.0)) == Quorum(2.0, (3.0, 1.0))
    assert Quorum.of(1, (3.0, 1.0)) == Quorum(1, (1.0, 1.0))
