"""Rennala SGD (Tyurin and Richtarik, 2023): the next B gradients of one model, whoever they come from.

The server has the model x and waits at it until B gradients have come, of one rank as many as it makes::

    rank i: push g_i = gradient of its batch at its x
    server: if that x is the current one:  sum = sum + g_i;  count = count + 1
            else:                          ignore it
            if count = B:  x = x - (lr / B) sum;  sum = 0;  count = 0
            give rank i the current x

So nothing that is applied is stale. What is being computed when x changes is lost: it is counted, with its samples.
With B = n and equal speeds it is synchronous SGD. ``algorithm.gradients`` is B; null: the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, final

from hvd_hetero.algorithms.asynchronous import Asynchronous
from hvd_hetero.algorithms.server_rule import Rule, added
from hvd_hetero.config.schema import AlgorithmConfig


@dataclass(frozen=True)
class RennalaOptions(AlgorithmConfig):
    """Options of Rennala SGD.

    Attributes:
        gradients: B, of a step; None: the number of ranks.
    """

    gradients: Optional[int] = field(default=None, metadata={"at_least": 1})  # noqa: UP045


class RennalaRule(Rule):
    """Take a step along the mean of B gradients of the current model."""

    def __init__(self, size: int, gradients: int) -> None:
        super().__init__(size)
        self.gradients, self.count = gradients, 0
        self.total: Any = None

    def arrive(self, rank: int, vector: Any) -> bool:
        is_fresh = self.delay(rank) == 0
        if is_fresh:
            self.count, self.total = self.count + 1, added(self.total, vector)
            if self.count == self.gradients:
                self.update(self.total, 1 / self.count)
                self.count, self.total = 0, None
        self.restart(rank)
        return is_fresh


@final
class RennalaSGD(Asynchronous):
    """Collect gradients of one model, from whoever has them."""

    options: RennalaOptions
    Options: ClassVar[type[AlgorithmConfig]] = RennalaOptions

    def server_rule(self) -> Rule:
        return RennalaRule(len(self.ranks), self.options.gradients or len(self.ranks))
