"""Non-blocking SGD (He and Dube, 2022): whoever has finished its batch starts an exchange, all give what they have.

Eager-SGD with a batch of k micro-batches. On each of the m ranks, with a send buffer s and a count c, empty at first::

    repeat until the samples of the epoch are used up:
        take the next batch that no rank has taken, and for each of its k micro-batches of b samples:
            s = s + b * gradient of its mean loss at x;  c = c + b
            take each result (g, n) that has come:  x = x - lr * g / n
        say that this rank is there, and wait for the round's result
    in the background, when the first rank is there: send (s, c); s = c = 0

So a late rank contributes the micro-batches that it has finished and goes on with the rest of its batch at the new
model. The one that it is in goes with the next round: it is at most one micro-batch that is stale. Nothing is lost. The
sum is divided by the samples in it; the paper does not say how it weighs. ``algorithm.micro_batches`` is k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

from hvd_hetero.algorithms.eager_sgd import EagerOptions, EagerSGD
from hvd_hetero.algorithms.policy import SOLO
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.errors import ConfigError


@dataclass(frozen=True)
class NonBlockingOptions(EagerOptions):
    """Options of Non-blocking SGD.

    Attributes:
        micro_batches: k, the parts of a batch.
    """

    micro_batches: int = field(default=4, metadata={"at_least": 2})


@final
class NonBlockingSGD(EagerSGD):
    """Let a round take what each rank has finished of its batch."""

    options: NonBlockingOptions
    Options: ClassVar[type[AlgorithmConfig]] = NonBlockingOptions
    modes: ClassVar[Sequence[str]] = ()

    @property
    def mode(self) -> str:
        return SOLO

    @property
    def micro_batch_count(self) -> int:
        return self.options.micro_batches

    def check(self) -> None:
        k = self.micro_batch_count
        for name, size in self.batch_size.items():
            if size % k or size // k < self.min_batch:
                problem = f"does not divide the batch of class {name}, {size}, into parts that can be trained on"
                remedy = "set train.batch_size to a multiple of it, or another algorithm.micro_batches"
                raise ConfigError("algorithm.micro_batches", k, problem, remedy)
        super().check()
