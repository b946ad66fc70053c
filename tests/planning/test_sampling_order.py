"""In which order the losses of an epoch are entered: by round, step and rank."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_hetero.planning.sampling import Sampler, in_order, newest_last

TAU_AND_BATCH = st.tuples(st.integers(1, 5), st.integers(1, 3))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.dictionaries(st.integers(0, 5), TAU_AND_BATCH, min_size=1))
def test_order_of_losses_against_plain_loops(rounds: int, ranks: dict[int, tuple[int, int]]) -> None:
    """What each rank saw, in its order of training, becomes one sequence by (round, step, rank)."""
    values, expected, next_value = {}, [], iter(range(10_000))
    made: dict[tuple[int, int, int], list[int]] = {}
    for rank, (tau, batch) in ranks.items():
        for turn in range(rounds):
            for step in range(tau):
                made[turn, step, rank] = [next(next_value) for _ in range(batch)]
    for rank in ranks:
        values[rank] = np.array([x for key, part in made.items() if key[2] == rank for x in part])
    for key in sorted(made):
        expected += made[key]
    shuffled = dict(reversed(values.items()))
    assert in_order(shuffled, rounds, {rank: tau for rank, (tau, _) in ranks.items()}).tolist() == expected


STEPS_AND_BATCH = st.tuples(st.lists(st.integers(0, 6), max_size=8).map(sorted), st.integers(1, 3))


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS_AND_BATCH, min_size=1, max_size=4))
def test_order_of_steps_that_ranks_took_as_they_could(ranks: list[tuple[list[int], int]]) -> None:
    """By round, by step within it, by rank; within a batch as it was. Rounds may have any number of steps, or none."""
    places, keys = iter(range(10_000)), []
    for rank, (at, batch) in enumerate(ranks):
        for i, number in enumerate(at):
            step = at[:i].count(number)
            keys += [(number, step, rank, next(places)) for _ in range(batch)]
    order = newest_last([np.array(at, np.int64) for at, _ in ranks], [batch for _, batch in ranks])
    assert order.tolist() == [place for *_, place in sorted(keys)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.lists(TAU_AND_BATCH, min_size=1, max_size=4))
def test_both_orders_agree_where_all_ranks_keep_to_the_plan(rounds: int, ranks: list[tuple[int, int]]) -> None:
    values, first = {}, 0
    for rank, (tau, batch) in enumerate(ranks):
        values[rank] = np.arange(first, first := first + rounds * tau * batch)
    at = [np.repeat(np.arange(rounds), tau) for tau, _ in ranks]
    expected = in_order(values, rounds, {rank: tau for rank, (tau, _) in enumerate(ranks)})
    assert newest_last(at, [batch for _, batch in ranks]).tolist() == expected.tolist()


def test_newest_across_ranks() -> None:
    """Sample 0 is met by rank 1 in round 0, step 2, and by rank 0 in round 1, step 0: the later round counts."""
    tau, rounds = {0: 1, 1: 3}, 2
    indices = {0: np.array([7, 0]), 1: np.array([1, 2, 0, 3, 4, 5])}
    losses = {0: np.array([1.0, 2.0]), 1: np.array([3.0, 4.0, 9.0, 5.0, 6.0, 7.0])}
    made = Sampler(8, "separate", 0.5, "quick", 0)
    made.record(in_order(indices, rounds, tau), in_order(losses, rounds, tau))
    assert made.losses[0] == 2.0
