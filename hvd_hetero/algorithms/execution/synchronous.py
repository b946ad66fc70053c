"""What executors of the synchronous methods share: excluding a step, running statistics, the end of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hvd_hetero.algorithms.execution.base import Executor
from hvd_hetero.algorithms.synchronous import Lockstep
from hvd_hetero.comm.averaging import average_buffers, average_unlike_parameters
from hvd_hetero.comm.nonfinite import all_finite
from hvd_hetero.data import Batch
from hvd_hetero.errors import NonFiniteError
from hvd_hetero.worker.epoch import Segment


class SynchronousExecutor(Executor):
    """Keep replicas equal in their parameters: each step goes along the gradient of the joined batch.

    Running statistics of BatchNorm are each rank's own during an epoch, as in data-parallel training everywhere, and
    are averaged over the training ranks at its end, with the gradients' weights. A rank with a non-finite gradient is
    excluded from the step, which goes along the joined gradient of the others.
    """

    policy: Lockstep

    @property
    def averaged_ranks(self) -> tuple[int, ...]:
        """The ranks that train; others hold no model of the run."""
        return self.policy.ranks

    def run_segment(self, segment: Segment) -> None:
        super().run_segment(segment)
        state = self.worker.state
        state.refresh()
        if self.class_plan.tau and not all_finite(state.parameters()):  # a step itself may have gone too far
            raise NonFiniteError(self.comm.excluded.round, self.policy.ranks, all_ranks=True)

    def run_round(self, batches: Iterator[Batch]) -> None:
        if not self.class_plan.tau:
            self.comm.skip_collective()
            return
        for inputs, targets in self.worker.emulator.steps(batches, 1):
            self.keep_buffers()
            self.run_step(inputs, targets)

    def run_step(self, inputs: Any, targets: Any) -> None:
        """Take the step of one batch, all its collectives included."""
        raise NotImplementedError(type(self).__name__)

    def keep_buffers(self) -> None:
        """Copy running statistics, before a step."""
        self._kept = [buffers.clone() for buffers in self.worker.state.buffers()]

    def restore_buffers(self) -> None:
        """Restore running statistics as they were before the step."""
        self.worker.state.refresh()
        for buffers, kept in zip(self.worker.state.buffers(), self._kept, strict=True):
            buffers.copy_(kept)

    def exclude_step(self) -> None:
        """Note that this rank's gradient was excluded, and undo what its batch has made of running statistics."""
        self.restore_buffers()
        self.comm.excluded.record()

    def end_epoch(self) -> None:
        worker, comm, ranks = self.worker, self.comm, self.averaged_ranks
        worker.set_eval_mode()
        if comm.rank in ranks:
            average_buffers(comm, worker.state, self.class_plan.weight, ranks)
            average_unlike_parameters(comm, worker.state, self.class_plan.weight, ranks)
        if 0 not in ranks:
            comm.broadcast_state(worker.state, ranks[0])
