"""When a round of a partial collective starts, decided from what the ranks say. Pure: no threads, no sockets.

A *unit* is what arrives as a whole: a rank for eager-SGD, a device class for models averaged in rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_hetero.planning.quorum import QUORUM, Quorum

SOLO, MAJORITY, FULL = "solo", "majority", "full"
MODES = (SOLO, MAJORITY, FULL, QUORUM)
ARRIVED, CLAIM, FINISHED = 1, 2, 3
"""What a rank says: it has contributed and needs round N next; it wants N samples; its epoch is over."""
START, FINAL, OFFER, CLOSING = 11, 12, 13, 14
"""What a rank is told: join round N; join round N, the last of the epoch; samples from N on; stop soon."""

Command = tuple[int | None, int, int]
"""Whom (None: everybody), what, and a number."""


def initiator(seed: int, number: int, ranks: int) -> list[int]:
    """All ranks in the order in which they may start a round in mode majority: the first one that still trains does.

    A function of its arguments alone, so it is the same on all ranks and after a resumed run.
    """
    return [int(rank) for rank in np.random.default_rng((seed, number)).permutation(ranks)]


class Coordinator:
    """Hears every rank and says who is to do what.

    - ``solo``: the first unit to arrive at the next round starts it.
    - ``majority``: the unit of the round's initiator does, when it arrives.
    - ``quorum``: the rank does with which enough ranks have arrived.
    - ``full``: as solo; every rank joins when it has arrived itself, so that nobody is left out.

    A rank arrives at a round if it has had the results of all earlier ones; one that has not is late, and starts none.

    Args:
        rank_groups: all ranks, by what arrives as a whole.
        seed: of the initiators.
        first_round: its number.
        quorum: in that mode, what is enough.
    """

    def __init__(
        self, rank_groups: Sequence[Sequence[int]], mode: str, seed: int, first_round: int = 0,
        quorum: Quorum | None = None,
    ) -> None:  # fmt: skip
        assert mode in MODES and (mode == QUORUM) == (quorum is not None)
        self._quorum = quorum
        self._rank_groups = [frozenset(unit) for unit in rank_groups]
        self._group_of = {rank: unit for unit in self._rank_groups for rank in unit}
        self._mode, self._seed, self._next = mode, seed, first_round
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._arrived: set[int] = set()
        self._finished: set[int] = set()
        self._claimed = 0
        self._closing = False

    def handle(self, rank: int, what: int, number: int) -> list[Command]:
        """What follows from one message of a rank; messages of one rank come in the order in which it sent them."""
        if what == CLAIM:
            self._claimed += number
            return [(rank, OFFER, self._claimed - number)]
        if what == ARRIVED:
            assert number <= self._next, "a rank cannot have the result of a round that was not started"
            if number == self._next:
                self._arrived.add(rank)
            return self._started()
        assert what == FINISHED
        self._finished.add(rank)
        if len(self._finished) == len(self._group_of):
            self._begin_epoch()
            return [(None, FINAL, self._count())]
        orders: list[Command] = []
        if not self._closing and any(unit <= self._finished for unit in self._rank_groups):
            self._closing = True
            orders.append((None, CLOSING, 0))
        return orders + self._started()

    def _started(self) -> list[Command]:
        """Starts the next round if the right unit is there; ranks whose epoch is over are not waited for."""
        if self._quorum is not None:
            left = set(self._group_of) - self._finished
            return self._start() if self._quorum.reached(self._arrived & left, left) else []
        if self._mode == MAJORITY:
            order = initiator(self._seed, self._next, len(self._group_of))
            first = next(rank for rank in order if rank not in self._finished)
            rank_groups = [self._group_of[first]]
        else:
            rank_groups = self._rank_groups
        for unit in rank_groups:
            training = unit - self._finished
            if training and training <= self._arrived:
                return self._start()
        return []

    def _start(self) -> list[Command]:
        self._arrived.clear()
        return [(None, START, self._count())]

    def _count(self) -> int:
        self._next += 1
        return self._next - 1
