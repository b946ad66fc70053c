"""Dynamic local batch: DLB, also called DBS (Ye et al., "DBS: Dynamic Batch Size for Distributed Deep Neural Network
Training", 2020). The method is known by both names; here it is ``dlb``.

Synchronous SGD whose global batch B stays, while each worker's part follows its speed, epoch by epoch::

    p_i = 1 / m                         # at first
    repeat for every epoch:
        b_i = p_i B, rounded by largest remainder: sum_i b_i = B exactly
        repeat: one step of synchronous SGD, gradients weighted by b_i / B
        t_i = the worker's own time of the epoch: compute and data, waiting excluded
        p_i = (p_i / t_i) / sum_j (p_j / t_j)

Two things that the paper leaves open: no worker gets less than ``algorithm.min_local_batch`` samples, one or more, so
that each one's time can be measured, nor less than the model can be trained on; and the p_i that is divided by t_i is
the rounded one, b_i / B, since that is what took t_i.
``algorithm.global_batch`` is B; null: what the workers' ``train.batch_size`` add up to.

**OmniLearn** (Tyagi and Sharma, "OmniLearn: A Framework for Distributed Deep Learning over Heterogeneous Clusters",
2025), its synchronous form: with ``algorithm.deadband`` above 0, batches follow its proportional controller instead::

    c_i = b_i mean_j(t_j) / t_i
    c_i = b_i where |c_i - b_i| < deadband c_i      # small differences are noise
    b_i = c_i + s, and no less than the least nor more than the most, with s such that sum_i b_i = B

The published form adds what a bound cuts off, and what is over in the sum, to all workers in equal parts, as s does; it
does not look at the bounds again, nor is its sum exactly B. Its asynchronous form is ``omnilearn_asp``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Optional, final

from hvd_hetero.algorithms.sync_sgd import SyncSGD
from hvd_hetero.algorithms.synchronous import LockstepOptions
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import Plan, apportion, bounded, controlled


@dataclass(frozen=True)
class DLBOptions(LockstepOptions):
    """Options of DLB.

    Attributes:
        global_batch: samples of one step of all workers together; None: the sum of their ``train.batch_size``.
        min_local_batch: of these samples, what no worker gets less of; two where the model cannot train on one.
        max_local_batch: what none gets more of, for workers with little memory; None: as many as there are.
        deadband: changes of a batch that are a smaller share of the new one are not made; 0: DLB's own rule.
    """

    global_batch: Optional[int] = field(default=None, metadata={"at_least": 1})  # noqa: UP045
    min_local_batch: int = field(default=1, metadata={"at_least": 1})
    max_local_batch: Optional[int] = field(default=None, metadata={"at_least": 1})  # noqa: UP045
    deadband: float = field(default=0.0, metadata={"at_least": 0, "at_most": 1})


@final
class DLB(SyncSGD):
    """Keep batches in proportion to measured speed, and the joined batch as it is."""

    options: DLBOptions
    Options: ClassVar[type[AlgorithmConfig]] = DLBOptions
    batch_varies: ClassVar[bool] = True

    @cached_property
    def global_batch(self) -> int:
        """B, samples of one step of all workers."""
        return self.options.global_batch or sum(super().batches().values())

    @property
    def min_local_batch(self) -> int:
        """Samples of a step that no worker gets less of."""
        return max(self.options.min_local_batch, self.min_batch)

    @cached_property
    def shares(self) -> list[float]:
        """p, by worker; they add up to 1."""
        return [1 / len(self.ranks)] * len(self.ranks)

    def check(self) -> None:
        if self.global_batch < (needed := self.min_local_batch * len(self.ranks)):
            problem = f"{len(self.ranks)} ranks share it, and each gets {self.min_local_batch} at least"
            raise ConfigError("algorithm.global_batch", self.global_batch, problem, f"set {needed} or more")
        if (most := self.options.max_local_batch) is not None and most * len(self.ranks) < self.global_batch:
            problem = f"{len(self.ranks)} ranks share a batch of {self.global_batch}"
            remedy = f"set {-(-self.global_batch // len(self.ranks))} or more"
            raise ConfigError("algorithm.max_local_batch", most, problem, remedy)
        super().check()

    def batches(self) -> dict[int, int]:
        return dict(zip(self.ranks, apportion(self.global_batch, self.shares, self.min_local_batch), strict=True))

    def replan(self, step_sec: Sequence[float], rounds: int | None = None) -> Plan:
        batches, times = list(self.batches().values()), [step_sec[rank] for rank in self.ranks]
        speeds = [batch / sec for batch, sec in zip(batches, times, strict=True)]
        global_batch, deadband = self.global_batch, self.options.deadband
        wanted = [global_batch * speed / sum(speeds) for speed in speeds]
        most = self.options.max_local_batch or global_batch
        if deadband:
            wanted = controlled(batches, times, deadband)
        if deadband or most < global_batch:
            wanted = bounded(wanted, global_batch, self.min_local_batch, most, in_proportion=not deadband)
        self.shares = [batch / global_batch for batch in wanted]
        self.plan = self.make_plan(None)
        return self.plan

    def state_dict(self) -> dict[str, Any]:
        return {"shares": self.shares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shares = list(state["shares"])
        self.plan = self.make_plan(None)
