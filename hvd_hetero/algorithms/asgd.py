"""Asynchronous SGD with a server, plain or delay-adaptive (Koloskova et al. 2022, Mishchenko et al. 2022).

The server has the model x and the number of its updates. Each of the n ranks, from the x that it was given::

    repeat until the samples of the epoch are used up:
        take the next batch that no rank has taken
        push g = gradient of its mean loss at the own x
        server, at once:  delta = updates since that x
                          x = x - lr * f * g       # f = 1; adaptive: n / max(n, delta)
        go on from the server's x

The step is that of ``train.optimizer``, which the server has. Every gradient counts, however old; it is
``algorithm.adaptive`` that makes the step smaller for one that is older than n updates. A step goes along one rank's
gradient, so an epoch has n times as many as with ``sync_sgd``, and the learning rate is that of one batch. Momentum of
the optimizer adds up gradients of several ages and mostly hurts: a smaller one, or none, is the usual choice; or
``algorithm.ordered_momentum`` in its place (OrMo, with ``adaptive`` OrMo-DA), see
hvd_hetero/algorithms/ordered_momentum.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from hvd_hetero.algorithms.asynchronous import Asynchronous
from hvd_hetero.algorithms.ordered_momentum import OrderedOptions, OrderedRule, check_ordered
from hvd_hetero.algorithms.server_rule import Rule
from hvd_hetero.config.schema import AlgorithmConfig


@dataclass(frozen=True)
class ASGDOptions(OrderedOptions):
    """Options of asynchronous SGD.

    Attributes:
        adaptive: whether steps along old gradients are smaller.
    """

    adaptive: bool = False


class ASGDRule(OrderedRule):
    """Take a step along each gradient."""

    def __init__(self, size: int, adaptive: bool = False, momentum: float = 0.0) -> None:
        super().__init__(size, momentum)
        self.adaptive = adaptive

    def arrive(self, rank: int, vector: Any) -> bool:
        n = self.size
        self.update_along(rank, vector, n / max(n, self.delay(rank)) if self.adaptive else 1.0)
        self.restart(rank)
        return True


@final
class ASGD(Asynchronous):
    """Take a step along each gradient as it comes."""

    options: ASGDOptions
    Options: ClassVar[type[AlgorithmConfig]] = ASGDOptions

    def check(self) -> None:
        check_ordered(self.options, self.train)
        super().check()

    def server_rule(self) -> Rule:
        return ASGDRule(len(self.ranks), self.options.adaptive, self.options.ordered_momentum)
