"""Eager-SGD (Li et al., "Taming Unbalanced Training Workloads in Deep Learning with Partial Collective Operations").

Synchronous SGD whose allreduce of gradients is partial. On each of the m ranks, with a send buffer s that is empty at
first and k, the number of the next result to take::

    repeat until the samples of the epoch are used up:
        take the next batch that nobody has taken
        s = s + (1/m) gradient of its mean loss at x    # late gradients are added, never overwritten
        say that this rank is there for round k
        wait for round k; for each result g that has come, in order:
            x = x - lr * g;  k = k + 1
    in the background, when round k starts: send s, s = 0

``algorithm.mode: solo``: a round starts when the first rank is there. ``majority``: when a rank drawn for this round
is there, so that on average half of them are. Everybody takes part at once with what the send buffer holds: a fresh
gradient, an old one, several, or none. Every ``aggregation.sync_every`` rounds all ranks are waited for, and nobody
falls behind by more than ``aggregation.max_lag`` rounds. Faster ranks take more of the batches; the epoch ends for all
together, with one round for what is left in the buffers.

Where batches differ in size, 1/m is B_i / sum_j B_j. Running statistics of BatchNorm are averaged at the end of an
epoch. A gradient that holds NaN or Inf is not contributed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, final

from hvd_hetero.algorithms.synchronous import Lockstep
from hvd_hetero.comm.averaging import check_partial
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.flat_params import concat, parts_of
from hvd_hetero.comm.gradient_staging import HostGradients
from hvd_hetero.comm.nonfinite import finite
from hvd_hetero.comm.partial.allreduce import PartialAllreduce
from hvd_hetero.comm.partial.rounds import Round
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.data import Batch
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import Plan
from hvd_hetero.telemetry.staleness import Counts
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker


@final
class EagerSGD(Lockstep):
    """A step a result; no rank computes while another one waits for it."""

    Options: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    modes: ClassVar[Sequence[str]] = ("solo", "majority")
    claims_samples: ClassVar[bool] = True
    flat_gradients: ClassVar[bool] = True

    def check(self) -> None:
        if self.cluster.size == 1:
            remedy = "start more ranks, or choose sync_sgd"
            raise ConfigError("algorithm.name", self.options.name, "one rank has nobody to run ahead of", remedy)
        if self.train.max_fast_steps is not None:
            problem = "eager_sgd hands out samples as ranks ask for them, so nobody knows who takes how many steps"
            remedy = "set train.max_samples or train.max_train_sec"
            raise ConfigError("train.max_fast_steps", self.train.max_fast_steps, problem, remedy)
        super().check()

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        self._comm, self._gradients = comm, worker.flat_gradients()
        on_gpu = self._gradients[0].device.type == "cuda"
        self._host = HostGradients(worker.model.parameters(), self._gradients) if on_gpu else None
        self._open(0)

    def _open(self, first: int) -> None:
        whole = concat(self._gradients)
        self.partial = PartialAllreduce(
            self._comm,
            whole.numel(),
            whole.dtype,
            self.options.mode or "solo",
            units=[(rank,) for rank in self.ranks],
            seed=self.seed,
            sync_every=self.aggregation.sync_every,
            max_lag=self.aggregation.max_lag,
            first=first,
            hosts=len({fact.host for fact in self.cluster.facts}),
            pinned=self._host is not None,
        )

    def run_segment(self, segment: Segment, worker: Worker, comm: Comm) -> None:
        partial, first, self._averages = self.partial, self.partial.version, 0
        batches = self._claimed(segment)
        partial.claim(self.mine.batch_size)
        while True:
            for inputs, targets in worker.pace.steps(batches, 1):
                self.keep_buffers(worker)
                worker.gradient(inputs, targets, self.mine.weight)
            if len(segment.rows) == len(segment.at):
                break
            segment.note(1, partial.version - first)
            # the answer comes while this rank waits for the round; to claim everything leaves the others nothing
            partial.claim(segment.samples if segment.is_stopping() else self.mine.batch_size)
            gradient = concat(self._gradients) if self._host is None else self._host.take()
            if finite([gradient]):
                partial.contribute(gradient)
                self._apply(partial.take(), worker, segment, first)
            else:  # others may be waiting for this rank to contribute, so it waits for nothing
                self.leave_out(worker, comm)
                self._apply(partial.take(patience_sec=0), worker, segment, first)
        for results in partial.finish():
            self._apply(results, worker, segment, first)
        worker.state.refresh()
        check_partial(comm, worker.state.parameters(), self._averages)
        segment.averages = self._averages

    def _claimed(self, segment: Segment) -> Iterator[Batch]:
        """The batches that this rank is offered, as long as there are whole ones."""
        while (batch := segment.claim(self.partial.offered(), self.mine.batch_size)) is not None:
            yield from batch

    def _apply(self, results: Sequence[Round], worker: Worker, segment: Segment, first: int) -> None:
        """One optimizer step along each result."""
        for result in results:
            if result.weight:  # the last round of an epoch finds the buffers empty, as a rule
                segment.start_round(result.number - first)
                for gradient, part in zip(self._gradients, parts_of(result.total, self._gradients), strict=True):
                    gradient.copy_(part, non_blocking=True)
                worker.apply()
                self._averages += 1
                self._comm.excluded.since = 0
                segment.finish_round()
        worker.pace.pause()  # what was copied from is not given back before it has been copied
        self.partial.done(results)

    def counts(self) -> Counts | None:
        return self.partial.take_counts()

    def state_dict(self) -> dict[str, Any]:
        return {"round": self.partial.version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.partial.close()
        self._open(int(state["round"]))

    def close(self) -> None:
        if "partial" in vars(self):  # else it was never started
            self.partial.close()
