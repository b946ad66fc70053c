"""DropCompute for local SGD: a round ends by the clock, and a late rank joins the average with fewer steps (Giladi et
al., "DropCompute: simple and more robust distributed synchronous training via compute variance reduction", NeurIPS
2023, appendix).

Local SGD whose rounds have a deadline beside their number of steps. A round, on rank i of class g, from the model x::

    start a clock;  x_i = x
    for k = 1 .. tau_g:                                 # as for unbalanced local SGD, or as set for each class
        one local step on x_i
        if the clock is beyond the threshold: leave the rest of the round out
    k_i = steps taken, one at least
    x = sum_i w_i x_i                                   # algorithm.normalise=full: the weights of the plan, or
    x = x + sum_i (k_i / sum_j k_j) (x_i - x)           # done: by the steps that were taken
    next round: go on with the samples that were not taken

tau is derived from mean speeds; stragglers are random, and it is they that the deadline is for. With the same tau for
all classes (``train.tau={fast: 32, slow: 32}``), a threshold and ``done``, local steps follow from time alone.

``algorithm.threshold`` in seconds from a round's begin, or ``auto``: chosen from the times of all steps in
``algorithm.measured_rounds`` rounds, as ``drop_compute`` does it, and anew when tau changes. Ranks that take fewer
steps than they were dealt do not get through their samples: how many are left at an epoch's end is told (``dropped``).
On GPUs the clock makes each step be waited for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from hvd_hetero.algorithms.drop_compute import KEY, ThresholdOptions
from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.local_steps import WAIT_AVOIDING
from hvd_hetero.planning.plan import NORMALISED


@dataclass(frozen=True)
class DropComputeLocalOptions(ThresholdOptions):
    """Options of DropCompute for local SGD; what counts as nothing is steps that do not move the model."""

    warmup_rounds: int = field(default=2, metadata={"at_least": 0})
    measured_rounds: int = field(default=20, metadata={"at_least": 1})


@final
class DropComputeLocal(LocalSGD):
    """Let a round end for each rank when its time is up."""

    executor: ClassVar[str] = "hvd_hetero.algorithms.execution.drop_compute_local.DropComputeLocalExecutor"
    options: DropComputeLocalOptions
    Options: ClassVar[type[AlgorithmConfig]] = DropComputeLocalOptions
    unused: ClassVar[Mapping[str, Any]] = {"mode": "blocking", "quorum": None, "delayed": False, "delay_steps": None,
                                           "own_weight": 0.0}  # fmt: skip

    @property
    def follows_plan(self) -> bool:
        return False

    def check(self) -> None:
        self.options.check_threshold()
        for key, neutral in self.unused.items():
            if (value := getattr(self.aggregation, key)) != neutral:
                problem = "drop_compute_local ends rounds by the clock, and all ranks meet in each average"
                remedy = f"leave it at {neutral}, or take unbalanced_local_sgd"
                raise ConfigError(f"aggregation.{key}", value, problem, remedy)
        if self.too_slow == WAIT_AVOIDING:
            problem = "drop_compute_local ends rounds by the clock, and waits for one step of every rank"
            raise ConfigError("cluster.too_slow", self.too_slow, problem, "set error, shrink_batch or leave_out")
        if self.aggregation.weights == NORMALISED:
            problem = "is by the steps of the plan, which drop_compute_local does not keep to"
            raise ConfigError("aggregation.weights", NORMALISED, problem, "set algorithm.normalise=done, and uniform")
        tau = self.train.tau
        if self.options.threshold is not None and (max(tau.values()) if isinstance(tau, Mapping) else tau) == 1:
            problem = "a round of one step has no rest that could be left out"
            raise ConfigError("train.tau", tau, problem, f"set 2 or more, or {KEY}=null")
        super().check()
