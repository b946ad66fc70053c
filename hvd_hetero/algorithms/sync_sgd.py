"""Synchronous SGD, data parallel (Goyal et al. 2017; gradients travel as in Horovod, Sergeev and Del Balso 2018).

A round is one step. With B = sum_i b_i, on worker i, from the model x that all have::

    draw b_i samples from the worker's share of the epoch
    g_i = gradient of their mean loss at x
    g   = sum_i (b_i / B) g_i           # the gradient of the joined batch; allreduce, as the backward pass goes
    x   = x - lr * g                    # the same on every worker: replicas never differ

With equal batches the sum is the mean over workers. Everybody waits for the slowest at every step;
``algorithm.participants: fast`` trains on the fast class alone, while the others idle (tau 0, no samples, weight 0).

``hvd.DistributedOptimizer`` sends each parameter's gradient as soon as the backward pass has made it; gradient
clipping comes after the sum, so it is that of the joined batch. BatchNorm normalizes each rank's own share; running
statistics are averaged at the end of an epoch.

When a gradient is seen to be bad, parts of it have been sent already. But the sum is the same on all workers: where it
holds NaN or Inf, each computes its own gradient once more, and they are summed without the bad ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from hvd_hetero.algorithms.synchronous import Lockstep
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.gradient_allreduce import GradientSum
from hvd_hetero.comm.nonfinite import finite
from hvd_hetero.comm.weighted_sums import average_tensors
from hvd_hetero.data import Batch
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import Plan
from hvd_hetero.worker.worker import Worker


class SyncSGD(Lockstep):
    """One step a round, along the gradient of the joined batch."""

    sends_at_once: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if self.train.channels_last:
            problem = f"{self.options.name} sends each gradient as it is, and Horovod takes no other order in memory"
            raise ConfigError("train.channels_last", True, problem, "set it to false, or take a local-SGD method")

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        if self.mine.tau:
            self.sum = GradientSum(comm, self.ranks, self.cluster)
            worker.make_optimizer(lambda made: self.sum.wrap(made, worker.model))

    def run_round(self, worker: Worker, batches: Iterator[Batch], comm: Comm) -> None:
        if not self.mine.tau:
            comm.sit_out()
            return
        for inputs, targets in worker.pace.steps(batches, 1):
            self.keep_buffers(worker)
            self.sum.sent(partial(worker.gradient, inputs, targets, self.mine.weight))
            worker.pace.pause()
            with self.sum.finished(worker.optimizer):
                with comm.booked():
                    if not finite(worker.gradients()):
                        self._sum_again(worker, inputs, targets, comm)
                worker.apply()

    def _sum_again(self, worker: Worker, inputs: Any, targets: Tensor, comm: Comm) -> None:
        """Sums the gradients of the ranks whose own are good; all ranks of the group see that the first sum was not."""
        others = worker.state.others.copy()
        self.put_buffers_back(worker)
        own = worker.gradient_again(inputs, targets, self.mine.weight)
        worker.state.others.load_state_dict(others)
        good = finite(own)
        average_tensors(comm, own, good, "gradient.again", share=self.mine.weight, ranks=self.ranks)
        for gradient, again in zip(worker.gradients(), own, strict=True):
            gradient.copy_(again)
        if not good:
            self.leave_out(worker, comm)
