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

With ``aggregation.wire`` gradients are sent in fewer bits, in one piece after the backward pass.

When a gradient is seen to be bad, parts of it have been sent already. But the sum is the same on all workers: where it
holds NaN or Inf, each computes its own gradient once more, and they are summed without the bad ones.
"""

from __future__ import annotations

from typing import ClassVar

from hvd_hetero.algorithms.policy import FLOAT32
from hvd_hetero.algorithms.synchronous import FLAT_GRADIENTS, Lockstep
from hvd_hetero.errors import ConfigError


class SyncSGD(Lockstep):
    """Take one step a round, along the gradient of the joined batch."""

    executor: ClassVar[str] = "hvd_hetero.algorithms.execution.sync_sgd.SyncSGDExecutor"
    sends_at_once: ClassVar[bool] = True

    @property
    def executor_path(self) -> str:
        is_plain = self.aggregation.wire == FLOAT32
        return self.executor if is_plain else FLAT_GRADIENTS  # how to round is agreed on when all gradients are there

    def check(self) -> None:
        super().check()
        if self.train.channels_last:
            problem = f"{self.options.name} sends each gradient as it is, and Horovod takes no other order in memory"
            raise ConfigError("train.channels_last", True, problem, "set it to false, or take a local-SGD method")
