"""Ringleader ASGD (Maranjyan and Richtarik, ICLR 2026): asynchronous, and every rank counts the same.

For classes that draw from different data (``sampling.scheme=separate``). The server has the model x and two tables,
CURRENT and NEXT, which have for every rank the mean of its gradients and their number::

    rank i: push g = gradient of its batch at its x
    server, phase 1: fold g into CURRENT_i; rank i goes on at the x it has, until every rank has a gradient in CURRENT.
                     The rank that completes the table is the first one that is served.
            phase 2: from a rank not yet served in this round: fold g into CURRENT_i, serve it
                     from one that was: fold g into NEXT_i; it goes on from the current x
            serve i: x = x - lr * (1/n) sum_j mean(CURRENT_j); rank i goes on from it
            all have been served: CURRENT = NEXT, NEXT is empty, phase 1

n updates a round, no gradient is lost, and none that is applied is older than 2 n - 2 updates. With equal speeds it is
not synchronous SGD: the table is renewed rank by rank. The server holds two means for every rank. Where all ranks
meet, at the end of an epoch or to save, all go on from the current x; the tables stay. An epoch
ends with the first rank that has had its samples: without it there would soon be no more steps.
"""

from __future__ import annotations

from typing import Any, final

from hvd_hetero.algorithms.asynchronous import AsynchronousLocal
from hvd_hetero.algorithms.server_rule import Rule


class RingleaderRule(Rule):
    """Keep two tables of the ranks' means, each with its number; ``is_serving`` in phase 2, with the sum of means."""

    needs_every_rank = True

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.current, self.next = self._empty(), self._empty()
        self.is_serving, self.served = False, set[int]()
        self.total: Any = None
        self.missing = size

    def _empty(self) -> list[Any]:
        return [None] * self.size

    @staticmethod
    def _fold(table: list[Any], rank: int, vector: Any) -> None:
        before, count = table[rank] or (vector, 0)
        table[rank] = (before + (vector - before) / (count + 1), count + 1)

    def arrive(self, rank: int, vector: Any) -> bool:
        if rank in self.served:
            self._fold(self.next, rank, vector)
            self.restart(rank)
            return True
        before = self.current[rank]
        self._fold(self.current, rank, vector)
        if self.is_serving:
            self.total = self.total + (self.current[rank][0] - before[0])
        elif before is None:
            self.missing -= 1
        if self.missing == 0 and not self.is_serving:
            self.is_serving, self.total = True, sum(weight for weight, _ in self.current)
        if self.is_serving:
            self._serve(rank)
        return True

    def _serve(self, rank: int) -> None:
        self.update(self.total, 1 / self.size)
        self.restart(rank)
        self.served.add(rank)
        if len(self.served) == self.size:
            self.current, self.next = self.next, self._empty()
            self.is_serving, self.served, self.total = False, set(), None
            self.missing = self.current.count(None)

    def skip(self, rank: int) -> None:
        """Let it go on at the x it has: its mean is of gradients there."""


@final
class RingleaderASGD(AsynchronousLocal):
    """Serve every rank once a round, along the mean of all ranks' means."""

    def server_rule(self) -> Rule:
        return RingleaderRule(self.cluster.size)
