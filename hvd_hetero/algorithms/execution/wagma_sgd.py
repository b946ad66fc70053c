"""Execute WAGMA-SGD: a step, then the sum of the group's models, with older ones of those who are late."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hvd_hetero.algorithms.execution.grouped import GroupedExecutor
from hvd_hetero.algorithms.execution.resumable import PartialResumable
from hvd_hetero.algorithms.policy import SOLO
from hvd_hetero.algorithms.wagma_sgd import WAGMASGD
from hvd_hetero.comm.averaging import average_untrained, check_partial
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import all_finite
from hvd_hetero.comm.partial.allreduce import PartialAllreduce
from hvd_hetero.comm.partial.rounds import Round
from hvd_hetero.data import Batch
from hvd_hetero.planning.plan import Plan
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker


class WAGMAExecutor(PartialResumable, GroupedExecutor):
    """Take one step an iteration, and average with the group's models as they are."""

    policy: WAGMASGD

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        self._open(0)

    def _open(self, first: int) -> None:
        self._average, every, policy = self.flat_model().clone(), self.policy.sync_every, self.policy
        self.partial = PartialAllreduce(
            self.comm, self._average.numel(), self._average.dtype, SOLO, rank_groups=[(rank,) for rank in policy.ranks],
            sync_every=every, max_lag=every + 1, groups=policy.partitions, resends=True, first_round=first,
            hosts=len({fact.host for fact in policy.cluster.facts}),
        )  # fmt: skip

    def run_segment(self, segment: Segment) -> None:
        """Take this rank's steps, however late it is; then wait for the mean of all models."""
        batches, first = segment.batches(), self.partial.version
        self._average = self.flat_model().clone()
        self._send(arrived=False)
        for number in range(segment.rounds):
            segment.start_round(number)
            (self._step_and_average if self.policy.steps_first else self._average_and_step)(batches)
            segment.record(1, self.partial.version - first - 1)
            segment.finish_round()
        self._send(arrived=False)
        for rounds in self.partial.finish():
            if rounds[-1].final:
                self.write(rounds[-1].total.mul_(1 / rounds[-1].weight))
            self.partial.release(rounds)
        check_partial(self.comm, self.worker.state.parameters(), 0)
        segment.averages = segment.rounds

    def _step_and_average(self, batches: Iterator[Batch]) -> None:
        self.worker.local_steps(batches, 1)
        vector, is_finite = self._send()
        if is_finite:
            self.comm.excluded.since = 0
        self._receive(vector, lambda item: item.fresh)

    def _average_and_step(self, batches: Iterator[Batch]) -> None:
        worker, excluded, every = self.worker, self.comm.excluded, self.policy.sync_every
        for inputs, targets in worker.emulator.steps(batches, 1):
            worker.gradient(inputs, targets)
        is_gradient_finite = all_finite(worker.gradients())
        vector, is_finite = self._send()
        self._receive(vector, lambda item: (item.number + 1) % every == 0)
        if is_gradient_finite:
            worker.apply()
            excluded.since = excluded.since if not is_finite else 0
        elif is_finite:
            excluded.record()

    @torch.no_grad()
    def _send(self, arrived: bool = True) -> tuple[Tensor, bool]:
        """Put the model into the send buffer; return it, on the host, and whether it is finite.

        A step that made it non-finite is taken back before.
        """
        vector = self.flat_model()
        is_finite = all_finite([vector])
        if not is_finite:
            self.write(self._average)
            vector = self._average
            self.worker.optimizer.state.clear()
            self.comm.excluded.record()
        host = vector.to("cpu")
        self.partial.contribute(host, arrived=arrived)
        return host, is_finite

    @torch.no_grad()
    def _receive(self, vector: Tensor, is_in_it: Callable[[Round], bool]) -> None:
        """Take this iteration's sum, and continue from the average.

        Args:
            vector: this rank's model now.
            is_in_it: tells whether it is in the sum, so that it does not count once more.
        """
        [item] = self.partial.pop(max_rounds=1)
        total, count = item.total, item.weight
        if not is_in_it(item):
            total.add_(vector)
            count += 1
        self._average.copy_(total.mul_(1 / count))
        self.write(self._average)
        self.partial.release([item])

    def end_epoch(self) -> None:
        average_untrained(self.comm, self.worker.state, self.class_plan.weight)
