"""DropCompute: a rank that is late leaves out the rest of its batch (Giladi, Gottlieb, Moran, Soudry et al.,
"DropCompute: simple and more robust distributed synchronous training via compute variance reduction", NeurIPS 2023).

Synchronous SGD whose batches are cut into M micro-batches (``train.micro_batches``). A round is one step; on rank i,
with the joined batch B = sum_i b_i, all samples of whose first micro-batches are s_i::

    start a clock
    for m = 1 .. M:
        add the gradient of micro-batch m to g_i            # scaled so that all M make up the gradient of the mean
        if the clock is beyond the threshold: leave the rest out
    g = sum_i (b_i / B) g_i                                 # at once; what was left out counts as a zero gradient, or
    g = sum_i (b_i / B) g_i / sum_i (b_i / B) (s_i / b_i)   # algorithm.normalise=done: does not count at all
    x = x - lr * g

``full`` is the published form: a smaller step when much is left out. ``done`` is the mean over the samples that were
taken, and fits ranks that differ in speed: give slow classes the same batch, and each does what it can.

``algorithm.threshold=auto``: after ``algorithm.warmup_steps`` steps the times of all micro-batches are measured in
``algorithm.measured_steps`` steps and gathered, and the threshold with the best gain is taken, or none:
hvd_hetero/planning/compute_threshold.py. The bound on what it leaves out is ours; the paper finds up to about a tenth
to do no harm. A rank takes one micro-batch at least. Samples that are left out keep the losses that they had; how many
they are is told. On GPUs the clock makes each micro-batch be waited for. For local SGD: ``drop_compute_local``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from hvd_hetero.algorithms.synchronous import Lockstep, LockstepOptions
from hvd_hetero.config.schema import AUTO, AlgorithmConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.compute_threshold import best_threshold

FULL, DONE = "full", "done"
KEY = "algorithm.threshold"


@dataclass(frozen=True)
class ThresholdOptions(AlgorithmConfig):
    """Options of what ranks leave out where their time is up.

    Attributes:
        threshold: seconds from a round's begin after which no part of it is begun; ``auto``; None: all are taken.
        normalise: whether what was left out counts as nothing, ``full``, or does not count, ``done``.
        max_dropped: the share of all parts that ``auto`` may leave out, on average.
    """

    threshold: Any = None
    normalise: str = field(default=FULL, metadata={"choices": (FULL, DONE)})
    max_dropped: float = field(default=0.1, metadata={"above": 0, "at_most": 1})

    def check_threshold(self) -> None:
        """Refuse a threshold that is no time.

        Raises:
            ConfigError: naming the key.
        """
        value = self.threshold
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value not in (None, AUTO) and not (is_number and value > 0):
            raise ConfigError(KEY, value, "is no time", "give seconds above 0, auto, or null")

    def threshold_of(self, ended: Sequence[NDArray[np.float64]], round_sec: float) -> float | None:
        """Return the threshold with which ranks of these times run, see :func:`best_threshold`; None: there is none."""
        if self.threshold != AUTO:
            return None if self.threshold is None else float(self.threshold)
        found = best_threshold(ended, round_sec, self.max_dropped)
        return None if found is None else found[0]


@dataclass(frozen=True)
class DropComputeOptions(ThresholdOptions, LockstepOptions):
    """Options of DropCompute; what counts as nothing is zero gradients, and a round is a step."""

    warmup_steps: int = field(default=5, metadata={"at_least": 0})
    measured_steps: int = field(default=45, metadata={"at_least": 1})


@final
class DropCompute(Lockstep):
    """Let a step end for each rank when its time is up."""

    executor: ClassVar[str] = "hvd_hetero.algorithms.execution.drop_compute.DropComputeExecutor"
    options: DropComputeOptions
    Options: ClassVar[type[AlgorithmConfig]] = DropComputeOptions
    flat_gradients: ClassVar[bool] = True

    def check(self) -> None:
        self.options.check_threshold()
        if self.options.threshold is not None and set(self.micro_batches.values()) == {1}:
            problem = "a batch in one piece has no rest that could be left out"
            raise ConfigError("train.micro_batches", self.train.micro_batches, problem, f"set 2 or more, or {KEY}=null")
        super().check()
