"""The coordinator of partial collectives against hand-written courses of events, and its initiators."""

from __future__ import annotations

from collections import Counter

import pytest

from hvd_hetero.comm.partial.coordinator import (
    ARRIVED,
    CLAIM,
    CLOSING,
    FINAL,
    FINISHED,
    FULL,
    MAJORITY,
    OFFER,
    SOLO,
    START,
    Coordinator,
    initiator,
)
from hvd_hetero.planning.quorum import QUORUM, Quorum

EACH = [(0,), (1,), (2,)]
CLASSES = [(0, 1), (2, 3)]


def test_solo_the_first_to_arrive_starts_and_a_late_one_does_not() -> None:
    coordinator = Coordinator(EACH, SOLO, seed=0)
    assert coordinator.handle(1, ARRIVED, 0) == [(None, START, 0)]
    assert coordinator.handle(0, ARRIVED, 0) == [], "round 0 was started without it"
    assert coordinator.handle(0, ARRIVED, 1) == [(None, START, 1)]
    assert coordinator.handle(1, ARRIVED, 1) == []
    assert coordinator.handle(2, ARRIVED, 0) == [], "two rounds behind"
    assert coordinator.handle(2, ARRIVED, 2) == [(None, START, 2)]


def test_a_class_arrives_as_a_whole() -> None:
    coordinator = Coordinator(CLASSES, SOLO, seed=0)
    assert coordinator.handle(0, ARRIVED, 0) == []
    assert coordinator.handle(2, ARRIVED, 0) == []
    assert coordinator.handle(1, ARRIVED, 0) == [(None, START, 0)]
    assert coordinator.handle(3, ARRIVED, 0) == []
    assert coordinator.handle(3, ARRIVED, 1) == []
    assert coordinator.handle(2, ARRIVED, 1) == [(None, START, 1)]


def test_majority_waits_for_the_initiator() -> None:
    coordinator = Coordinator(EACH, MAJORITY, seed=7)
    for number in range(20):
        first = initiator(7, number, 3)[0]
        others = [rank for rank in range(3) if rank != first]
        assert [coordinator.handle(rank, ARRIVED, number) for rank in others] == [[], []]
        assert coordinator.handle(first, ARRIVED, number) == [(None, START, number)]


def test_majority_goes_on_without_an_initiator_that_has_finished() -> None:
    coordinator = Coordinator(EACH, MAJORITY, seed=7)
    first, second, third = initiator(7, 0, 3)
    assert coordinator.handle(second, ARRIVED, 0) == []
    orders = coordinator.handle(first, FINISHED, 0)
    assert orders == [(None, CLOSING, 0), (None, START, 0)], "the next in order is already there"
    later = next(rank for rank in initiator(7, 1, 3) if rank != first)
    assert coordinator.handle(later, ARRIVED, 1) == [(None, START, 1)]


def test_initiators_are_the_same_everywhere_and_about_equally_often_each() -> None:
    firsts = [initiator(3, number, 4)[0] for number in range(4000)]
    assert firsts == [initiator(3, number, 4)[0] for number in range(4000)]
    assert firsts != [initiator(4, number, 4)[0] for number in range(4000)]
    assert all(900 < times < 1100 for times in Counter(firsts).values())


def test_a_resumed_run_has_the_same_initiators() -> None:
    resumed = Coordinator(EACH, MAJORITY, seed=7, first_round=11)
    assert resumed.handle(initiator(7, 11, 3)[0], ARRIVED, 11) == [(None, START, 11)]


@pytest.mark.parametrize("mode", [SOLO, MAJORITY, FULL])
def test_the_last_round_starts_when_all_have_finished(mode: str) -> None:
    coordinator = Coordinator(EACH, mode, seed=0)
    assert coordinator.handle(2, FINISHED, 0) == [(None, CLOSING, 0)]
    assert coordinator.handle(0, FINISHED, 0) == [], "closing is said once"
    assert coordinator.handle(1, FINISHED, 0) == [(None, FINAL, 0)]
    assert coordinator.handle(1, FINISHED, 0) == [(None, CLOSING, 0)], "the next epoch"


def test_closing_waits_for_a_whole_class() -> None:
    coordinator = Coordinator(CLASSES, SOLO, seed=0)
    assert coordinator.handle(0, FINISHED, 0) == []
    assert coordinator.handle(2, FINISHED, 0) == []
    assert coordinator.handle(1, FINISHED, 0) == [(None, CLOSING, 0)]


def test_a_class_starts_a_round_without_its_finished_ranks() -> None:
    coordinator = Coordinator(CLASSES, SOLO, seed=0)
    assert coordinator.handle(0, ARRIVED, 0) == []
    assert coordinator.handle(1, FINISHED, 0) == [(None, START, 0)]


# ---- quorums --------------------------------------------------------------------------------------------------------


def of(value: float, weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0), **options: int) -> Coordinator:
    return Coordinator(CLASSES, QUORUM, seed=0, quorum=Quorum.of(value, weights), **options)


def test_a_quorum_of_ranks_starts_a_round_whoever_they_are() -> None:
    coordinator = of(3)
    assert coordinator.handle(3, ARRIVED, 0) == coordinator.handle(0, ARRIVED, 0) == []
    assert coordinator.handle(0, ARRIVED, 0) == [], "nobody counts twice"
    assert coordinator.handle(2, ARRIVED, 0) == [(None, START, 0)]
    assert coordinator.handle(1, ARRIVED, 0) == [], "late"
    assert coordinator.handle(0, ARRIVED, 1) == coordinator.handle(2, ARRIVED, 1) == [], "it does not count for round 1"
    assert coordinator.handle(1, ARRIVED, 1) == [(None, START, 1)]


def test_a_quorum_of_one_is_solo_by_rank_and_one_of_all_waits_for_everybody() -> None:
    one, every = of(1), of(4)
    assert one.handle(2, ARRIVED, 0) == [(None, START, 0)]
    assert [every.handle(rank, ARRIVED, 0) for rank in range(4)] == [[], [], [], [(None, START, 0)]]


def test_a_quorum_may_be_a_share_of_the_weights() -> None:
    """Ranks 0 and 1 have 0.8 of them: both are enough for 0.75, one with both others is not."""
    weights = (0.4, 0.4, 0.1, 0.1)
    coordinator = of(0.75, weights)
    assert [coordinator.handle(rank, ARRIVED, 0) for rank in (2, 3, 1)] == [[], [], []]
    assert coordinator.handle(0, ARRIVED, 0) == [(None, START, 0)]
    assert coordinator.handle(1, ARRIVED, 1) == []
    assert coordinator.handle(0, ARRIVED, 1) == [(None, START, 1)]
    assert of(0.8, weights).handle(0, ARRIVED, 0) == []


def test_a_quorum_shrinks_with_the_ranks_that_still_train() -> None:
    coordinator = of(3)
    assert coordinator.handle(2, ARRIVED, 0) == coordinator.handle(1, ARRIVED, 0) == []
    assert coordinator.handle(0, FINISHED, 0) == [], "ranks 1, 2 and 3 still train, and 3 of them are wanted"
    orders = coordinator.handle(1, FINISHED, 0)
    assert orders == [(None, CLOSING, 0)], "rank 1 has nothing to wait for; 2 and 3 are left"
    assert coordinator.handle(3, ARRIVED, 0) == [(None, START, 0)]
    assert coordinator.handle(3, FINISHED, 0) == []
    assert coordinator.handle(2, FINISHED, 0) == [(None, FINAL, 1)]
    assert coordinator.handle(0, ARRIVED, 2) == [], "the next epoch wants three again"


def test_no_sample_is_offered_twice() -> None:
    coordinator = Coordinator(EACH, SOLO, seed=0)
    assert coordinator.handle(0, CLAIM, 32) == [(0, OFFER, 0)]
    assert coordinator.handle(2, CLAIM, 8) == [(2, OFFER, 32)]
    assert coordinator.handle(0, CLAIM, 32) == [(0, OFFER, 40)]
    for rank in range(3):
        coordinator.handle(rank, FINISHED, 0)
    assert coordinator.handle(1, CLAIM, 8) == [(1, OFFER, 0)], "a new epoch"


def test_nobody_can_be_ahead_of_the_rounds() -> None:
    with pytest.raises(AssertionError):
        Coordinator(EACH, SOLO, seed=0).handle(0, ARRIVED, 1)
