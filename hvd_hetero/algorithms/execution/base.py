"""Executors: what a rank computes and sends in a round, by the plan of a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from hvd_hetero.algorithms.execution.resumable import Resumable
from hvd_hetero.algorithms.policy import Policy
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.data import Batch
from hvd_hetero.planning.plan import Plan
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.index_feed import Feed
from hvd_hetero.worker.worker import Worker


class Executor(Resumable):
    """Execute one rank's part of a method.

    After :meth:`start` follow, epoch by epoch, :meth:`run_segment` for each part, :meth:`end_epoch`, :meth:`replan`.

    Attributes:
        class_plan: this rank's part of the plan that is followed, from :meth:`start` on.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        """Make this rank ready for its first round."""
        self.worker, self.comm = worker, comm
        self.policy.start(plan)
        self._follow()

    def _follow(self) -> None:
        self.class_plan = self.policy.plan.of_rank(self.comm.rank)

    @property
    def averaged_ranks(self) -> tuple[int, ...]:
        """The ranks whose models are averaged: all, also those that take no steps but receive the average."""
        return tuple(range(self.comm.size))

    def deal(self, feed: Feed, plan: Plan, full: Plan) -> NDArray[Any]:
        """Deal the samples of an epoch, as :class:`hvd_hetero.worker.epoch.Epoch` has them."""
        return feed.deal_all(plan) if self.policy.claims_samples else feed.deal(plan, full)

    def run_segment(self, segment: Segment) -> None:
        """Run the rounds of a segment, up to the last collective of the last one, and note each step."""
        run_rounds(segment, self.class_plan.tau, self.run_round)

    def run_round(self, batches: Iterator[Batch]) -> None:
        """Run one round of this rank, all its collectives included."""
        raise NotImplementedError(type(self).__name__)

    def end_epoch(self) -> None:
        """Finish an epoch after its last round; when this returns, rank 0 holds the model."""

    def replan(self, step_sec: Sequence[float], rounds: int | None = None) -> Plan:
        """Follow the policy's plan of what comes next."""
        plan = self.policy.replan(step_sec, rounds)
        self._follow()
        return plan

    def pop_dropped(self) -> int:
        """Return how many samples of this rank's batches no step was made of since the last call, by the method."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.policy.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what :meth:`state_dict` gave; comes after :meth:`start`."""
        self.policy.load_state_dict(state["policy"])
        self._follow()

    def carry_over(self, state: Mapping[str, Any]) -> None:
        """Load what other ranks too can use of what another job's :meth:`state_dict` gave."""


def run_rounds(segment: Segment, tau: int, run_round: Callable[[Iterator[Batch]], None]) -> None:
    """Run all rounds of a segment, of tau steps each."""
    batches = segment.batches()
    for number in range(segment.rounds):
        segment.start_round(number)
        run_round(batches)
        segment.record(tau, number)
        segment.finish_round()
    segment.averages = segment.rounds
