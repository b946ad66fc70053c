"""Execute eager-SGD: a partial allreduce of gradients, of samples that ranks claim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hvd_hetero.algorithms.eager_sgd import EagerSGD
from hvd_hetero.algorithms.execution.resumable import PartialResumable
from hvd_hetero.algorithms.execution.synchronous import SynchronousExecutor
from hvd_hetero.comm.averaging import check_partial
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.flat_params import concat, split_like
from hvd_hetero.comm.gradient_staging import HostGradients
from hvd_hetero.comm.nonfinite import all_finite
from hvd_hetero.comm.partial.allreduce import PartialAllreduce
from hvd_hetero.comm.partial.rounds import Round
from hvd_hetero.data import Batch
from hvd_hetero.planning.plan import Plan
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker


class EagerSGDExecutor(PartialResumable, SynchronousExecutor):
    """Step along each result; no rank computes while another one waits for it."""

    policy: EagerSGD

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        self._gradients = worker.flat_gradients()
        self._on_gpu = self._gradients[0].device.type == "cuda"
        as_they_come = self._on_gpu and worker.micro_batches == 1
        self._host = HostGradients(worker.model.parameters(), self._gradients) if as_they_come else None
        self._open(0)

    def _open(self, first: int) -> None:
        flat, policy, spec = concat(self._gradients), self.policy, self.policy.aggregation
        self.partial = PartialAllreduce(
            self.comm, flat.numel(), flat.dtype, policy.mode, rank_groups=[(rank,) for rank in policy.ranks],
            seed=policy.seed, sync_every=policy.sync_every, max_lag=spec.max_lag, first_round=first,
            quorum=policy.quorum(), drops_late=policy.drops_late,
            hosts=len({fact.host for fact in policy.cluster.facts}), pinned=self._on_gpu,
        )  # fmt: skip

    def run_segment(self, segment: Segment) -> None:
        worker, partial, first, self._averages = self.worker, self.partial, self.partial.version, 0
        batches, parts, count = self._claimed(segment), self.policy.micro_batch_count, 0
        partial.claim(self.class_plan.batch_size)
        while True:
            before = count
            for inputs, targets in worker.emulator.steps(batches, 1):
                self.keep_buffers()
                worker.gradient(inputs, targets, self.class_plan.weight / parts)
                count += 1
            if count == before:
                break
            is_whole = count % parts == 0
            if is_whole:
                segment.record(1, partial.version - first)
                # the answer comes while this rank waits for the round; to claim everything leaves the others nothing
                partial.claim(segment.samples if segment.is_stopping() else self.class_plan.batch_size)
            gradient = concat(self._gradients).cpu() if self._host is None else self._host.synchronize()
            if all_finite([gradient]):
                partial.contribute(gradient, self.class_plan.weight / parts, arrived=is_whole,
                                   samples=self.class_plan.batch_size)  # fmt: skip
                self._apply(partial.pop(None if is_whole else 0), segment, first)
            else:  # others may be waiting for this rank to contribute, so it waits for nothing
                self.exclude_step()
                self._apply(partial.pop(patience_sec=0), segment, first)
        for results in partial.finish():
            self._apply(results, segment, first)
        worker.state.refresh()
        check_partial(self.comm, worker.state.parameters(), self._averages)
        segment.averages = self._averages

    def _claimed(self, segment: Segment) -> Iterator[Batch]:
        """Yield the batches that this rank is offered, as long as there are whole ones."""
        size, parts = self.class_plan.batch_size, self.policy.micro_batch_count
        while (batch := segment.claim(self.partial.offered(), size, parts)) is not None:
            yield from batch

    def _apply(self, results: Sequence[Round], segment: Segment, first: int) -> None:
        """Take one optimizer step along each result."""
        for result in results:
            if result.weight:  # the last round of an epoch finds the buffers empty, as a rule
                segment.start_round(result.number - first)
                if self.policy.drops_late or self.policy.micro_batch_count > 1:
                    result.total.div_(result.weight)
                for gradient, part in zip(self._gradients, split_like(result.total, self._gradients), strict=True):
                    gradient.copy_(part, non_blocking=True)
                self.worker.apply()
                self._averages += 1
                self.comm.excluded.since = 0
                segment.finish_round()
        self.worker.emulator.pause()  # what was copied from is not given back before it has been copied
        self.partial.release(results)
