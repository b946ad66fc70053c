"""In which order the losses of an epoch are entered: by round, step and rank."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_hetero.planning.sampling import Sampler, newest_last

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


def test_newest_across_ranks() -> None:
    """Sample 0 is met by rank 1 in round 0, step 2, and by rank 0 in round 1, step 0: the later round counts."""
    indices = np.array([7, 0, 1, 2, 0, 3, 4, 5])
    losses = np.array([1.0, 2.0, 3.0, 4.0, 9.0, 5.0, 6.0, 7.0])
    order = newest_last([np.array([0, 1]), np.repeat([0, 1], 3)], [1, 1])
    made = Sampler(8, "separate", 0.5, "quick", 0)
    made.record(indices[order], losses[order])
    assert made.losses[0] == 2.0


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(2, 50), st.sampled_from(["separate", "uniform", "unified"]), st.data())
def test_samples_of_a_block_follow_one_another(n: int, block: int, scheme: str, data: st.DataObject) -> None:
    """The same samples are drawn, block by block, blocks in random order; in the rest of an epoch too."""
    fast = data.draw(st.integers(0, n))
    counts = {"quick": fast, "slow": data.draw(st.integers(0, n - fast))}
    plain, made = (Sampler(n, scheme, 0.5, "quick", 3, block=size) for size in (1, block))
    drawn, other = made.draw(counts), plain.draw(counts)
    for name in counts:
        assert sorted(drawn[name].tolist()) == sorted(other[name].tolist())
    rest = made.draw_rest({name: part[:1] for name, part in drawn.items()},
                          {name: part[1:] for name, part in drawn.items()}, {"quick": fast // 2, "slow": 0})
    for part in (*drawn.values(), rest["quick"]):
        blocks = part // block
        assert np.count_nonzero(np.diff(blocks)) == max(0, len(np.unique(blocks)) - 1)
