"""The threshold of DropCompute, from times that are made up."""

from __future__ import annotations

import numpy as np

from hvd_hetero.planning.compute_threshold import best_threshold


def ended(ranks: int, parts: int, tail: float = 0.0, steps: int = 40) -> list[np.ndarray]:
    """Micro-batches of 10 ms; in each step one rank's take ``tail`` seconds longer together."""
    made = [np.full((steps, parts), 0.01) for _ in range(ranks)]
    for step in range(steps):
        made[step % ranks][step] += tail / parts
    return [own.cumsum(axis=1) for own in made]


def test_where_no_rank_varies_nothing_is_left_out() -> None:
    """The published rule would leave an eighth out, and lose time by it."""
    assert best_threshold(ended(4, 8), 0.5) is None


def test_a_tail_is_cut_off() -> None:
    found = best_threshold(ended(8, 6, tail=0.2), 0.31, max_dropped=0.1)
    assert found is not None
    tau, gain, dropped = found
    assert 0.05 <= tau < 0.1 and gain > 0.5 and 0 < dropped <= 0.1
    more = best_threshold(ended(8, 6, tail=0.2), 0.31)
    assert more is not None and more[1] > gain and more[2] > 0.1, "the bound has bound"


def test_a_slow_class_does_what_it_can() -> None:
    """Of eight micro-batches that take eight times as long, about one, and the fast ranks all of theirs."""
    times = ended(2, 8)
    found = best_threshold([*times, *(8 * own for own in times)], 0.65)
    assert found is not None
    assert 0.07 <= found[0] < 0.16 and 0.35 < found[2] < 0.5


def test_ranks_may_have_other_numbers_of_micro_batches() -> None:
    assert best_threshold([ended(1, 8)[0], ended(1, 2)[0]], 0.1) is None


def test_what_a_step_takes_beyond_computing_makes_dropping_worth_less() -> None:
    times = ended(8, 6, tail=0.05)
    one, other = best_threshold(times, 0.12), best_threshold(times, 5.0)
    assert one is not None and other is None
