"""m-Synchronous SGD (Begunov and Tyurin, "Do We Need Asynchronous SGD?", 2026; Chen et al. 2016 with n - m backups).

Synchronous SGD that waits for the first m of the n ranks, and drops what comes later. From the model x that all have::

    repeat until the samples of the epoch are used up:
        rank i: take the next b_i samples that no rank has taken
                g_i = gradient of their mean loss at x
                say that this rank is there, unless the round has gone without it: then drop g_i
        when m ranks are there, with S all that have come by then:
            x = x - lr * sum_{i in S} b_i g_i / sum_{i in S} b_i
        every rank goes on from the new x

So nothing that is applied is stale, and what is late is lost: its samples are counted (``lost_samples``), and an epoch
is shorter by them. A gradient that is being computed cannot be broken off; the rank finds out when it is done. Here S
may have more than m ranks, those that come while the others are told. All ranks take part in a round's sum, the late
ones with nothing; so a rank with ``aggregation.max_lag`` results left to take holds up the others until it has taken
some: with a class n times slower, set it above n.

With m = n it is synchronous SGD. With fixed speeds the first m are always the same: a slower class contributes nothing,
and ``sync_sgd`` on the fast class does the same without it. It pays where the delays within a class are random.

``algorithm.quorum`` is m, or a share of the weights. null: the m of the least time by measured step times, argmin_m
t_(m) (1 + s / m), with s = ``algorithm.noise``, sigma^2 / eps of one rank's gradient; null: as many as there are ranks.
``hvd-hetero plan`` tells that m, from jittered step times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Optional, final

import numpy as np

from hvd_hetero.algorithms.eager_sgd import EagerOptions, EagerSGD
from hvd_hetero.config.schema import AggregationConfig, AlgorithmConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.quorum import QUORUM, Quorum, best_quorum

NEVER = 2**62


@dataclass(frozen=True)
class MSyncOptions(EagerOptions):
    """Options of m-Synchronous SGD.

    Attributes:
        quorum: m; below 1 a share of the weights; None: by measured step times.
        noise: s of the rule for m; None: the number of ranks.
    """

    noise: Optional[float] = field(default=None, metadata={"at_least": 0})  # noqa: UP045


@final
class MSyncSGD(EagerSGD):
    """Wait for the first m ranks, and drop what is late."""

    options: MSyncOptions
    Options: ClassVar[type[AlgorithmConfig]] = MSyncOptions
    modes: ClassVar[Sequence[str]] = ()
    drops_late: ClassVar[bool] = True
    unused: ClassVar[Mapping[str, Any]] = {**EagerSGD.unused, "sync_every": AggregationConfig().sync_every}

    @property
    def needs_speeds(self) -> bool:
        return self.options.quorum is None

    @property
    def mode(self) -> str:
        return QUORUM

    @property
    def sync_every(self) -> int:
        return NEVER

    @property
    def derives_tau(self) -> bool:
        return False

    def check(self) -> None:
        neutral = self.unused["sync_every"]
        if self.aggregation.sync_every != neutral:
            problem, remedy = "m_sync_sgd plans no rounds of all ranks", f"leave it at {neutral}, or take eager_sgd"
            raise ConfigError("aggregation.sync_every", self.aggregation.sync_every, problem, remedy)
        super().check()
        self.make_plan(None)

    def _check_quorum(self) -> None:
        if self.options.quorum is not None:
            super()._check_quorum()

    @property
    def noise(self) -> float:
        """s, sigma^2 / eps of one rank's gradient."""
        return len(self.ranks) if self.options.noise is None else self.options.noise

    def make_plan(self, step_sec: Mapping[str, float] | None) -> Plan:
        plan = super().make_plan(step_sec)
        if step_sec is None:
            return plan
        return replace(plan, classes=tuple(replace(c, step_sec=step_sec[c.name]) for c in plan.classes))

    def quorum(self) -> Quorum:
        ranks = self.plan.by_rank()
        m = self.options.quorum or best_quorum(np.array([[c.step_sec or 1.0 for c in ranks]]), self.noise)
        return Quorum.of(m, [c.weight for c in ranks])
