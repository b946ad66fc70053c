"""Asynchronous DiLoCo with delayed Nesterov momentum (Liu et al., "Asynchronous Local-SGD Training for Language
Modeling", 2024), and dynamic local updates.

Each rank trains on its own and pushes its progress. With e = ``aggregation.outer_lr``, b =
``aggregation.outer_momentum``, N = ``algorithm.buffer``, c = ``algorithm.activation``, on the server t = m = D = 0::

    rank i: x_i = x;  tau_g(i) local steps on x_i;  push g = x - x_i;  go on from the server's x
    server: D = D + g;  t = t + 1
            if t mod N = 0:  m = b m + D / N;  x = x - e ((1 - c N + c) b m + g / N);  D = 0
            else:            x = x - e (c b m + g / N)

With c = 0 momentum acts with each N-th push alone, and between them each push is a plain step along g / N: momentum of
pushes that come one by one, from models of several ages, would add up. N = 1 is the outer optimizer of synchronous
DiLoCo with Nesterov momentum. tau_g follows speed (DyLU: floor(v / v_max H) there, rounded here), so that pushes of all
classes are about as old. The inner optimizer's state stays each rank's own.

``algorithm.buffer`` null: the number of ranks. c is at most 1 / N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, final

from hvd_hetero.algorithms.asynchronous import WAITING, AsynchronousLocal, neutral
from hvd_hetero.algorithms.server_rule import Rule, added
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.errors import ConfigError


@dataclass(frozen=True)
class DiLoCoOptions(AlgorithmConfig):
    """Options of asynchronous DiLoCo.

    Attributes:
        buffer: N, pushes between two updates of the momentum; None: the number of ranks.
        activation: c, the share of the momentum that acts with each push.
    """

    buffer: Optional[int] = field(default=None, metadata={"at_least": 1})  # noqa: UP045
    activation: float = field(default=0.0, metadata={"at_least": 0, "at_most": 1})


class DelayedNesterov(Rule):
    """Take a step along each push, and momentum up every N-th time."""

    is_outer = True

    def __init__(self, size: int, lr: float, momentum: float, buffer: int, activation: float = 0.0) -> None:
        super().__init__(size)
        self.lr, self.momentum, self.buffer, self.activation = lr, momentum, buffer, activation
        self.velocity: Any = None
        self.total: Any = None

    def arrive(self, rank: int, vector: Any) -> bool:
        n, b, c = self.buffer, self.momentum, self.activation
        g, factor = vector / n, c * b
        self.total = added(self.total, vector)
        if (self.version + 1) % n == 0:
            mean = self.total / n
            self.velocity = mean if self.velocity is None else self.velocity * b + mean
            self.total, factor = None, (1 - c * n + c) * b
        self.update(g if self.velocity is None else g + self.velocity * factor, self.lr)
        self.restart(rank)
        return True


@final
class AsyncDiLoCo(AsynchronousLocal):
    """Push the progress of local steps; the server takes the outer step along each."""

    options: DiLoCoOptions
    Options: ClassVar[type[AlgorithmConfig]] = DiLoCoOptions
    flat_gradients: ClassVar[bool] = False
    pushes_gradients: ClassVar[bool] = False
    unused: ClassVar[Mapping[str, Any]] = neutral("weights", *WAITING, "outer_nesterov")

    @property
    def buffer(self) -> int:
        """N, pushes between two updates of the momentum."""
        return self.options.buffer or self.cluster.size

    def check(self) -> None:
        if (c := self.options.activation) * self.buffer > 1 + 1e-9:
            problem = f"is above 1 / {self.buffer}, with a buffer of {self.buffer} pushes"
            raise ConfigError("algorithm.activation", c, problem, f"give {1 / self.buffer:.3g} or less")
        super().check()

    def server_rule(self) -> Rule:
        spec = self.aggregation
        return DelayedNesterov(
            self.cluster.size, spec.outer_lr, spec.outer_momentum, self.buffer, self.options.activation
        )
