"""Malenia SGD (Tyurin and Richtarik, 2023): gradients of one model, enough from each rank.

For classes that draw from different data (``sampling.scheme=separate``): each rank's mean counts the same, however many
gradients it has made. The server has the model x, and b_i gradients of rank i at it::

    rank i: push g = gradient of its batch at its x
    server: if that x is the current one:  sum_i = sum_i + g;  b_i = b_i + 1
            else:                          ignore it
            if all b_i >= 1 and n / (sum_i 1 / b_i) >= S:
                x = x - lr * (1/n) sum_i sum_i / b_i;  all sums and counts = 0
            give rank i the current x

Each step waits for the slowest rank; the others use the time to make their means better. What is being computed when x
changes is lost: it is counted, with its samples. ``algorithm.harmonic_mean`` is S; at 1 one gradient of each is enough.
The server holds a sum for every rank. An epoch ends with the first rank that has had its samples: without it there
would be no more steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from hvd_hetero.algorithms.asynchronous import AsynchronousLocal
from hvd_hetero.algorithms.server_rule import Rule, added
from hvd_hetero.config.schema import AlgorithmConfig


@dataclass(frozen=True)
class MaleniaOptions(AlgorithmConfig):
    """Options of Malenia SGD.

    Attributes:
        harmonic_mean: S, of the numbers of gradients that the ranks have made for a step.
    """

    harmonic_mean: float = field(default=1.0, metadata={"at_least": 1})


class MaleniaRule(Rule):
    """Take a step along the mean of all ranks' means."""

    needs_every_rank = True

    def __init__(self, size: int, harmonic_mean: float = 1.0) -> None:
        super().__init__(size)
        self.harmonic_mean = harmonic_mean
        self.counts, self.sums = self._empty()

    def _empty(self) -> tuple[list[int], list[Any]]:
        return [0] * self.size, [None] * self.size

    def arrive(self, rank: int, vector: Any) -> bool:
        is_fresh = self.delay(rank) == 0
        if is_fresh:
            self.counts[rank] += 1
            self.sums[rank] = added(self.sums[rank], vector)
            if all(self.counts) and self.size / sum(1 / b for b in self.counts) >= self.harmonic_mean * (1 - 1e-9):
                self.update(sum(s / b for s, b in zip(self.sums, self.counts, strict=True)), 1 / self.size)
                self.counts, self.sums = self._empty()
        self.restart(rank)
        return is_fresh


@final
class MaleniaSGD(AsynchronousLocal):
    """Collect gradients of one model until every rank has made enough."""

    options: MaleniaOptions
    Options: ClassVar[type[AlgorithmConfig]] = MaleniaOptions

    def server_rule(self) -> Rule:
        return MaleniaRule(self.cluster.size, self.options.harmonic_mean)
