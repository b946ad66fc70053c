"""Execute DropCompute: micro-batches until the time is up, then the sum of gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from hvd_hetero.algorithms.drop_compute import DONE, DropCompute
from hvd_hetero.algorithms.execution.compute_clock import ComputeClock
from hvd_hetero.algorithms.execution.flat_gradients import FlatGradientExecutor
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import FLAG_SLOTS
from hvd_hetero.data import Batch
from hvd_hetero.planning.plan import Plan
from hvd_hetero.worker.losses import NOT_COUNTED
from hvd_hetero.worker.worker import Worker


class DropComputeExecutor(FlatGradientExecutor):
    """Step along the gradient of what the ranks have done in time."""

    policy: DropCompute

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        options, self._dropped = self.policy.options, 0
        self.clock = ComputeClock(options, options.warmup_steps, options.measured_steps, worker.emulator.pause)

    def run_round(self, batches: Iterator[Batch]) -> None:
        self.clock.begin()
        super().run_round(batches)
        if self.class_plan.tau:
            self.clock.end(self.comm, self.policy.ranks)

    def compute(self, inputs: Any, targets: Any) -> float:
        clock = self.clock
        losses = self.worker.gradient(inputs, targets, self.class_plan.weight, clock.is_over)
        clock.is_over()
        del clock.times[: -self.worker.micro_batches]  # of a gradient in float16 that was computed once more
        left_out = int((losses == NOT_COUNTED).sum())
        self._dropped += left_out
        part = 1 - left_out / len(losses) if self.policy.options.normalise == DONE else 1
        return self.class_plan.weight * part

    def pop_dropped(self) -> int:
        taken, self._dropped = self._dropped, 0
        return taken

    def sum_(self, sums: Sequence[Tensor], is_finite: bool, prescaled_weight: float) -> None:
        super().sum_(sums, is_finite, prescaled_weight)
        if self.policy.options.normalise == DONE:
            for total in sums:  # by the share of the joined batch that was taken, the same on all ranks
                total.mul_(1 / float(total[-FLAG_SLOTS]))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.clock.state_dict(), "dropped": self._dropped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.clock.load_state_dict(state)
        self._dropped = state["dropped"]
