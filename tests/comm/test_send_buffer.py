"""The send buffer of a partial collective, by hand; with the collective around it in test_partial."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from hvd_hetero.comm.partial.send_buffer import SendBuffer
from hvd_hetero.telemetry.staleness import Counts

pytestmark = pytest.mark.horovod


def buffer(**options: object) -> SendBuffer:
    settings = {"state_elements": 1, "weight_of": None, "pinned": False, **options}
    return SendBuffer(3, torch.float32, **settings)  # type: ignore[arg-type]


def test_contributions_add_up_but_for_the_states_at_the_end() -> None:
    mine, counts = buffer(), Counts()
    mine.add(torch.tensor([1.0, 2.0, 30.0]), 2, version=3)
    mine.add(torch.tensor([10.0, 20.0, 40.0]), 3, version=5)
    assert mine.has_part_in(7)
    item, steps = mine.drain(5, 0.0, False, counts)
    assert not mine.has_part_in(7) and (steps, item.contributions) == (5, 2)
    assert mine.payload(item, steps).tolist() == [11, 22, 40, 5], "the weight is the number of steps"
    assert item.total.tolist() == [11, 22, 40] and item.own is None
    assert (counts.fresh, counts.late, counts.empty) == (1, 0, 0) and counts.staleness == Counter({2: 1, 0: 1})


def test_what_is_sent_without_a_contribution_counts_for_nothing() -> None:
    mine, counts = buffer(), Counts()
    mine.add(torch.full((3,), torch.nan), 1, version=0)
    mine.release(mine.drain(1, 0.0, False, counts)[0])
    for number, final in ((2, False), (3, True)):
        item, steps = mine.drain(number, 0.0, final, counts)
        assert mine.payload(item, steps).tolist() == [0, 0, 0, 0], "whatever was in the memory before"
        mine.release(item)
    assert (counts.fresh, counts.late, counts.empty) == (0, 1, 1), "an epoch ends with a round that empties all buffers"


def test_a_weight_leaves_ones_own_contribution_as_it_was() -> None:
    mine = buffer(weight_of=lambda steps: 1 / (2 * steps))
    mine.add(torch.tensor([4.0, 8.0, 12.0]), 2, version=0)
    item, steps = mine.drain(0, 0.0, False, Counts())
    assert mine.payload(item, steps).tolist() == [1, 2, 3, 0.25]
    assert item.own is not None and item.own.tolist() == [4, 8, 12]
    places = {part.data_ptr() for part in item.buffers}
    assert len(places) == 2
    mine.release(item)
    again = [mine.drain(number, 0.0, False, Counts())[0].buffers[0].data_ptr() for number in (1, 2, 3)]
    assert places < set(again), "memory is used again"


def test_what_is_kept_is_sent_again_until_there_is_something_newer() -> None:
    mine, counts = buffer(state_elements=3, resends=True), Counts()
    mine.add(torch.tensor([1.0, 2.0, 3.0]), 1, version=-1)
    sent = []
    for number in range(4):
        if number == 1:
            mine.add(torch.tensor([4.0, 5.0, 6.0]), 1, version=1)
            assert mine.has_part_in(1) and not mine.has_part_in(2)
        item, steps = mine.drain(number, 0.0, number == 3, counts)
        sent.append((mine.payload(item, steps).tolist(), item.fresh))
        item.total.zero_()  # as the sum overwrites it
        mine.release(item)
    assert sent == [([1, 2, 3, 1], False), ([4, 5, 6, 1], True), ([4, 5, 6, 1], False), ([4, 5, 6, 1], False)]
    assert (counts.fresh, counts.late, counts.empty) == (1, 2, 0), "the last round of an epoch is not counted"
    assert counts.staleness == Counter({1: 2, 0: 1})
