"""Execute DropCompute for local SGD: local steps until the time is up, then the average of all models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hvd_hetero.algorithms.averaging.blocking import Averaging, BlockingAveraging, scale_progress
from hvd_hetero.algorithms.drop_compute import DONE
from hvd_hetero.algorithms.drop_compute_local import DropComputeLocal
from hvd_hetero.algorithms.execution.compute_clock import ComputeClock
from hvd_hetero.algorithms.execution.local_sgd import LocalSGDExecutor
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.data import Batch
from hvd_hetero.planning.plan import ClassPlan
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker


class DeadlineAveraging(BlockingAveraging):
    """Average what the ranks have come to in time.

    Attributes:
        dropped: samples that rounds had for this rank, and that it had no time for.
    """

    policy: DropComputeLocal

    def __init__(self, policy: DropComputeLocal, worker: Worker, comm: Comm) -> None:
        super().__init__(policy, worker, comm)
        options, self.dropped = policy.options, 0
        self.clock = ComputeClock(options, options.warmup_rounds, options.measured_rounds, worker.emulator.pause)
        self._taus = self._taus_now()

    def _taus_now(self) -> list[int]:
        return [c.tau for c in self.policy.plan.classes]

    def run_segment(self, segment: Segment, class_plan: ClassPlan) -> None:
        batches, taus = segment.batches(), self._taus_now()
        if taus != self._taus:  # of other rounds than were measured
            self._taus = taus
            self.clock.reset()
        for number in range(segment.rounds):
            segment.planned = number
            segment.start_round(number)
            segment.record(self.run_local_round(batches, class_plan), number)
            segment.finish_round()
        segment.planned = segment.averages = segment.rounds

    def run_local_round(self, batches: Iterator[Batch], class_plan: ClassPlan) -> int:
        """Take the local steps of one round that there is time for, and average the models; return how many."""
        state, is_done = self.worker.state, self.policy.options.normalise == DONE
        self.outer.snapshot()
        weight = self.policy.weight_of(class_plan)
        base = [vector.clone() for vector in state.vectors] if is_done or self.wire is not None else None
        self.clock.begin()
        taken = self.worker.local_steps(batches, class_plan.tau, self.clock.is_over)
        self.dropped += (class_plan.tau - taken) * class_plan.batch_size
        if is_done and base is not None and (factor := self._factor(taken, weight)) != 1:
            state.refresh()
            scale_progress(state.parameters(), base, factor)
        self.average_models(weight, base)
        self.clock.end(self.comm)
        return taken

    def _factor(self, taken: int, weight: float) -> float:
        """Return what makes this rank's weight one by the steps that were taken."""
        with self.comm.timed():
            (total,) = self.comm.sum([float(taken)], "deadline.steps")
        return taken / total / weight if taken else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "clock": self.clock.state_dict(), "dropped": self.dropped, "taus": self._taus}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.clock.load_state_dict(state["clock"])
        self.dropped, self._taus = state["dropped"], list(state["taus"])


class DropComputeLocalExecutor(LocalSGDExecutor):
    """Take local steps until the time is up, and average."""

    policy: DropComputeLocal
    averaging: DeadlineAveraging

    @property
    def _strategy(self) -> type[Averaging]:
        return DeadlineAveraging

    def pop_dropped(self) -> int:
        taken, self.averaging.dropped = self.averaging.dropped, 0
        return taken
