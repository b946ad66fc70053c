"""Execute synchronous SGD: gradients travel as the backward pass makes them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from hvd_hetero.algorithms.execution.synchronous import SynchronousExecutor
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.gradient_allreduce import GradientSum
from hvd_hetero.comm.nonfinite import all_finite
from hvd_hetero.comm.weighted_sums import average_tensors
from hvd_hetero.planning.plan import Plan
from hvd_hetero.worker.worker import Worker


class SyncSGDExecutor(SynchronousExecutor):
    """Step along the gradient of the joined batch, summed by an allreduce over the training ranks."""

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        if self.class_plan.tau:
            self.sum = GradientSum(comm, self.policy.ranks, self.policy.cluster)
            worker.make_optimizer(lambda optimizer: self.sum.wrap(optimizer, worker.model, worker.micro_batches))

    def run_step(self, inputs: Any, targets: Any) -> None:
        worker = self.worker
        self.sum.sent(partial(worker.gradient, inputs, targets, self.class_plan.weight))
        worker.emulator.pause()
        with self.sum.finished(worker.optimizer):
            with self.comm.timed():
                if not all_finite(worker.gradients()):
                    self._sum_again(inputs, targets)
            worker.apply()

    def _sum_again(self, inputs: Any, targets: Tensor) -> None:
        """Sum the finite gradients alone; all ranks of the group see that the first sum was not finite."""
        worker = self.worker
        untrained = worker.state.untrained.copy()
        self.restore_buffers()
        repeated = worker.gradient_again(inputs, targets, self.class_plan.weight)
        worker.state.untrained.load_state_dict(untrained)
        is_finite = all_finite(repeated)
        average_tensors(self.comm, repeated, is_finite, "gradient.again", prescaled_weight=self.class_plan.weight,
                        ranks=self.policy.ranks)  # fmt: skip
        for gradient, again in zip(worker.gradients(), repeated, strict=True):
            gradient.copy_(again)
        if not is_finite:
            self.exclude_step()
