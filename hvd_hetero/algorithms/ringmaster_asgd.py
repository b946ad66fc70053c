"""Ringmaster ASGD (Maranjyan, Tyurin, Richtarik, ICML 2025): asynchronous SGD that ignores gradients that are too old.

The server has the model x; delta_i counts the updates since rank i was given the x that it computes on::

    rank i: push g_i = gradient of its batch at its x
    server: if delta_i < R:  x = x - lr * g_i;  delta_j = delta_j + 1 for all others
            else:            ignore it
            give rank i the current x;  delta_i = 0

This is Algorithm 4. Algorithm 5 also stops a rank as soon as its delta reaches R; a step of torch cannot be broken off,
and what is stopped is thrown away either way, so here both are the same. R = 1 takes gradients of the current x alone,
that is the fastest rank's; without a bound it is ``asgd``. In theory R = max(1, sigma^2 / eps).

``algorithm.max_delay`` is R; null: the number of ranks. What is ignored is counted, with its samples. Momentum of
gradients of several ages: ``algorithm.ordered_momentum``, see hvd_hetero/algorithms/ordered_momentum.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, final

from hvd_hetero.algorithms.asynchronous import Asynchronous
from hvd_hetero.algorithms.ordered_momentum import OrderedOptions, OrderedRule, check_ordered
from hvd_hetero.algorithms.server_rule import Rule
from hvd_hetero.config.schema import AlgorithmConfig


@dataclass(frozen=True)
class RingmasterOptions(OrderedOptions):
    """Options of Ringmaster ASGD.

    Attributes:
        max_delay: R, the delay from which on a gradient is ignored; None: the number of ranks.
    """

    max_delay: Optional[int] = field(default=None, metadata={"at_least": 1})  # noqa: UP045


class RingmasterRule(OrderedRule):
    """Take a step along each gradient that is younger than R updates."""

    def __init__(self, size: int, max_delay: int, momentum: float = 0.0) -> None:
        super().__init__(size, momentum)
        self.max_delay = max_delay

    def arrive(self, rank: int, vector: Any) -> bool:
        is_young = self.delay(rank) < self.max_delay
        if is_young:
            self.update_along(rank, vector)
        self.restart(rank)
        return is_young


@final
class RingmasterASGD(Asynchronous):
    """Take a step along each gradient that is not too old."""

    options: RingmasterOptions
    Options: ClassVar[type[AlgorithmConfig]] = RingmasterOptions

    def check(self) -> None:
        check_ordered(self.options, self.train)
        super().check()

    def server_rule(self) -> Rule:
        most = self.options.max_delay or len(self.ranks)
        return RingmasterRule(len(self.ranks), most, self.options.ordered_momentum)
