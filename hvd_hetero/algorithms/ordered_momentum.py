"""Ordered momentum for gradients that come one by one, of several ages (OrMo: Shi, Yang and Li, "Ordered Momentum for
Asynchronous SGD", NeurIPS 2024).

Momentum that simply adds up gradients as they come counts an old one as if it were new. Here each has the effect that
it would have had in its place. The iterations are cut into blocks of n, the number of ranks; block(t) = ceil(t / n).
With b = ``algorithm.ordered_momentum``, on the server u = 0; a gradient g that was made at the model of iteration j
arrives at iteration t::

    if block(t) > block(t - 1):  x = x - lr b u;  u = b u           # a new block begins
    a = block(t) - block(j)                                         # blocks that g is late by
    u = u + b^a f g                                                 # f: 1, or the delay-adaptive factor
    x = x - lr (1 + b + ... + b^a) f g                              # what it would have moved x by since then

With one rank it is SGD with momentum. The momentum is in units of gradients, as PyTorch has it, so a learning rate that
falls acts on all of it. It takes the place of the optimizer's own, and one vector on rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hvd_hetero.algorithms.server_rule import Rule, added
from hvd_hetero.config.schema import AlgorithmConfig, TrainConfig
from hvd_hetero.errors import ConfigError

KEY = "algorithm.ordered_momentum"


@dataclass(frozen=True)
class OrderedOptions(AlgorithmConfig):
    """Options of methods that may have ordered momentum.

    Attributes:
        ordered_momentum: b; 0: none, and the optimizer's own is as it is set.
    """

    ordered_momentum: float = field(default=0.0, metadata={"at_least": 0, "at_most": 0.9999})


class OrderedRule(Rule):
    """Take steps along single gradients, with ordered momentum."""

    def __init__(self, size: int, momentum: float = 0.0) -> None:
        super().__init__(size)
        self.momentum = momentum
        self.velocity: Any = None

    def block(self, iteration: int) -> int:
        return -(-iteration // self.size)

    def update_along(self, rank: int, gradient: Any, factor: float = 1.0) -> None:
        """Make the next version of the model from a rank's gradient at the one that it has."""
        b, now = self.momentum, self.block(self.version)
        if not b:
            return self.update(gradient, factor)
        late = now - self.block(self.made_at[rank])
        direction = gradient * (factor * (1 - b ** (late + 1)) / (1 - b))
        if self.velocity is not None and now > self.block(self.version - 1):
            self.velocity = self.velocity * b
            direction = direction + self.velocity
        self.velocity = added(self.velocity, gradient * (factor * b**late))
        return self.update(direction)


def check_ordered(options: OrderedOptions, train: TrainConfig) -> None:
    """Refuse what does not go with ordered momentum.

    Raises:
        ConfigError: naming the key.
    """
    if not options.ordered_momentum:
        return
    args: Mapping[str, Any] = train.optimizer_args
    for key, value, fits, remedy in (
        ("train.optimizer", train.optimizer, train.optimizer == "SGD", "set SGD"),
        ("train.optimizer_args.momentum", args.get("momentum"), not args.get("momentum"), "set 0"),
        ("train.clip_norm", train.clip_norm, train.clip_norm is None, "leave it null"),
    ):
        if not fits:
            problem = f"{KEY} is SGD's momentum, made by the server, and its steps have earlier gradients in them"
            raise ConfigError(key, value, problem, f"{remedy}, or {KEY}=0")
