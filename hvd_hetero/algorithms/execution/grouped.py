"""What executors of averages in groups share: the model as one vector, and the average of all at a segment's end."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_hetero.algorithms.execution.synchronous import SynchronousExecutor
from hvd_hetero.algorithms.grouped import Grouped
from hvd_hetero.comm.averaging import average, average_untrained, check_partial
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.flat_params import concat, split_like
from hvd_hetero.planning.plan import Plan
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker


class GroupedExecutor(SynchronousExecutor):
    """Keep models that differ between ranks, and are the same on all of them after each segment."""

    policy: Grouped

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        self.vectors = [*worker.state.parameters(), *worker.state.buffers()]

    def flat_model(self) -> Tensor:
        """The model's parameters and running statistics as one vector; perhaps the model's own memory."""
        self.worker.state.refresh()
        self.worker.set_eval_mode()
        return concat(self.vectors)

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Set the model to such a vector."""
        for vector, part in zip(self.vectors, split_like(flat, self.vectors), strict=True):
            vector.copy_(part)

    def end_segment(self, segment: Segment) -> None:
        """Average the models of all ranks, after their rounds."""
        self.worker.set_eval_mode()
        if not average(self.comm, self.worker.state, self.class_plan.weight):
            self.worker.optimizer.state.clear()
        check_partial(self.comm, self.worker.state.parameters(), 0)
        segment.averages = segment.rounds

    def end_epoch(self) -> None:
        average_untrained(self.comm, self.worker.state, self.class_plan.weight, only_new=True)
