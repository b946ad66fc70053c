"""Sum gradients in one piece, once the backward pass is over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hvd_hetero.algorithms.execution.resumable import WireResumable
from hvd_hetero.algorithms.execution.synchronous import SynchronousExecutor
from hvd_hetero.algorithms.policy import FLOAT32
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import all_finite, summable
from hvd_hetero.comm.weighted_sums import sum_finite_
from hvd_hetero.comm.wire import Wire
from hvd_hetero.planning.plan import Plan
from hvd_hetero.worker.worker import Worker


class FlatGradientExecutor(WireResumable, SynchronousExecutor):
    """Step along the gradient of the joined batch, of which each rank sends its part at once.

    ``aggregation.wire`` says what it travels in; see :mod:`hvd_hetero.comm.wire`.
    """

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        self.gradients = worker.flat_gradients()
        self.vectors = worker.state.padded_gradients
        kind, ranks = self.policy.aggregation.wire, self.policy.ranks
        is_plain = kind == FLOAT32 or not self.class_plan.tau or len(ranks) == 1
        self.wire = None if is_plain else Wire(comm, kind, worker.device, self.policy.seed, ranks)

    def run_step(self, inputs: Any, targets: Any) -> None:
        worker, prescaled_weight = self.worker, self.compute(inputs, targets)
        is_finite = all_finite(self.gradients)
        sums = [summable(vector) for vector in self.vectors]
        worker.emulator.pause()
        self.sum_(sums, is_finite, prescaled_weight)
        for gradient, total in zip(self.vectors, sums, strict=True):
            if gradient is not total:
                gradient.copy_(total)
        if not is_finite:
            self.exclude_step()
        worker.apply()

    def compute(self, inputs: Any, targets: Any) -> float:
        """Leave this rank's part of the joined gradient in the parameters; return its share of the joined batch."""
        self.worker.gradient(inputs, targets, self.class_plan.weight)
        return self.class_plan.weight

    def sum_(self, sums: Sequence[Tensor], is_finite: bool, prescaled_weight: float) -> None:
        """Replace the parts, ``[P + FLAG_SLOTS]`` each, by the joined gradient of the finite ranks."""
        with self.comm.timed():
            sum_finite_(self.comm, sums, is_finite, "gradient", prescaled_weight=prescaled_weight,
                        ranks=self.policy.ranks, wire=self.wire)  # fmt: skip
