"""Eager-SGD (Li et al., "Taming Unbalanced Training Workloads in Deep Learning with Partial Collective Operations").

Synchronous SGD whose allreduce of gradients is partial. On each of the m ranks, with a send buffer s that is empty at
first and k, the number of the next result to take::

    repeat until the samples of the epoch are used up:
        take the next batch that no rank has taken
        s = s + (1/m) gradient of its mean loss at x    # late gradients are added, never overwritten
        say that this rank is there for round k
        wait for round k; for each result g that has come, in order:
            x = x - lr * g;  k = k + 1
    in the background, when round k starts: send s, s = 0

``algorithm.mode: solo``: a round starts when the first rank is there. ``majority``: when a rank drawn for this round
is there, so that on average half of them are. ``quorum``: when ``algorithm.quorum`` ranks are there, or ranks with that
share of the weights. All ranks take part at once with what the send buffer holds: a fresh
gradient, an old one, several, or none. Every ``aggregation.sync_every`` rounds all ranks are waited for, and no rank
falls behind by more than ``aggregation.max_lag`` rounds. Faster ranks take more of the batches; the epoch ends for all
together, with one round for what is left in the buffers.

Where batches differ in size, 1/m is B_i / sum_j B_j. Running statistics of BatchNorm are averaged at the end of an
epoch. A gradient that holds NaN or Inf is not contributed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

from hvd_hetero.algorithms.policy import FLOAT32, MAJORITY, SOLO
from hvd_hetero.algorithms.synchronous import Lockstep
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.quorum import QUORUM, Quorum, check_quorum


@dataclass(frozen=True)
class EagerOptions(AlgorithmConfig):
    """Options of eager-SGD.

    Attributes:
        quorum: ranks that a round waits for, or, below 1, their share of the weights.
    """

    quorum: Optional[float] = field(default=None, metadata={"above": 0})  # noqa: UP045


class EagerSGD(Lockstep):
    """Let ranks claim the samples of an epoch, and wait for the first one of a round only."""

    options: EagerOptions
    executor: ClassVar[str] = "hvd_hetero.algorithms.execution.eager_sgd.EagerSGDExecutor"
    Options: ClassVar[type[AlgorithmConfig]] = EagerOptions
    modes: ClassVar[Sequence[str]] = (SOLO, MAJORITY, QUORUM)
    claims_samples: ClassVar[bool] = True
    flat_gradients: ClassVar[bool] = True
    unused: ClassVar[Mapping[str, Any]] = {**Lockstep.unused, "wire": FLOAT32}

    def check(self) -> None:
        if self.cluster.size == 1:
            remedy = "start more ranks, or choose sync_sgd"
            raise ConfigError("algorithm.name", self.options.name, "one rank has nobody to run ahead of", remedy)
        if self.train.max_fast_steps is not None:
            problem = "eager_sgd hands out samples as ranks ask for them, so nobody knows who takes how many steps"
            remedy = "set train.max_samples or train.max_train_sec"
            raise ConfigError("train.max_fast_steps", self.train.max_fast_steps, problem, remedy)
        self._check_quorum()
        super().check()

    def _check_quorum(self) -> None:
        check_quorum("algorithm.quorum", self.options.quorum, len(self.ranks), self.mode)

    @property
    def mode(self) -> str:
        """What starts a round: the first rank, one that was drawn for it, or a quorum."""
        return self.options.mode or SOLO

    def partial_mode(self, step_sec: Mapping[str, float]) -> str:
        return self.mode

    def quorum(self) -> Quorum | None:
        if self.mode != QUORUM or self.options.quorum is None:
            return None
        return Quorum.of(self.options.quorum, [c.weight for c in self.plan.by_rank()])
