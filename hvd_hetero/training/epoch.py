"""An epoch over the data on its way: what is done of it and what is left, what it came to, and how fast each rank
was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.config.schema import EvalConfig
from hvd_hetero.data import Batch, Source, read
from hvd_hetero.planning.plan import Plan, apportion
from hvd_hetero.planning.rebalance import settled_step_sec
from hvd_hetero.telemetry.staleness import NUMBERS, Counts, to_numbers
from hvd_hetero.telemetry.stopwatch import KINDS, Stopwatch
from hvd_hetero.telemetry.time_accounts import Accounts
from hvd_hetero.telemetry.trace import Recorder
from hvd_hetero.worker.factories import is_accuracy
from hvd_hetero.worker.index_feed import SegmentResult
from hvd_hetero.worker.losses import mean, weighted_sums
from hvd_hetero.worker.worker import Worker


@dataclass(frozen=True)
class EpochFigures:
    """What all ranks did in an epoch: its seconds, samples, mean loss, and what a step of each took towards its end."""

    seconds: float
    samples: int
    loss: float
    step_sec: list[float]


def gather_figures(
    comm: Comm, watch: Stopwatch, accounts: Accounts, plan: Plan, worked: SegmentResult, losses: torch.Tensor,
    weights: torch.Tensor, step_sec: float, excluded: int,
) -> EpochFigures:  # fmt: skip
    """Gathers what all ranks did in an epoch and where their time went, and enters it into the accounts.

    Args:
        losses: of this rank, with their ``weights``.
        step_sec: seconds of one of its steps, and ``excluded``, rounds it was left out of.
    """
    kinds, collectives = watch.take()
    sums = weighted_sums(losses.double(), weights.double()).tolist()
    figures = [*(kinds[kind] for kind in KINDS), *sums, worked.steps, step_sec, excluded, *collectives]
    rows = [row.tolist() for row in comm.gather(torch.tensor(figures, dtype=torch.float64), "epoch.times")]
    count = len(KINDS)
    loss = mean(sum(row[count] for row in rows), sum(row[count + 1] for row in rows))
    steps = [int(row[count + 2]) for row in rows]
    spent = [dict(zip(KINDS, row, strict=False)) for row in rows]
    before = accounts.samples_seen
    seconds = accounts.enter(plan, worked.rounds, steps, spent, [row[count + 5 :] for row in rows],
                             [int(row[count + 4]) for row in rows])
    samples = accounts.samples_seen - before
    return EpochFigures(seconds, samples, loss, [row[count + 3] for row in rows])


def evaluate(comm: Comm, worker: Worker, test: Source, plan: Plan, spec: EvalConfig) -> dict[str, float | None]:
    """Loss and metric on the test set; every rank does a part in proportion to its speed, so that all end together."""
    counts = apportion(len(test), [c.speed for c in plan.by_rank()])
    start = sum(counts[: comm.rank])
    mine = worker.evaluate(test, np.arange(start, start + counts[comm.rank]), spec.batch_size)
    sums = comm.sum(mine.tolist(), "evaluation")
    name = "eval_accuracy" if is_accuracy(worker.metric) else "eval_metric"
    figures: dict[str, float | None] = {"eval_loss": mean(*sums[:2])}
    return figures | ({} if worker.metric is None else {name: mean(*sums[2:])})


@dataclass(frozen=True)
class EpochProgress:
    """How far a segment has come; numbers that are the same on all ranks once they have agreed.

    Attributes:
        rounds: averages made in it, or steps of the synchronous methods.
        planned: rounds of the plan that are used up.
        rows: of what is handed out to ranks as they ask for it.
        version: rounds of partial collectives, empty ones included.
    """

    rounds: int = 0
    planned: int = 0
    rows: int = 0
    version: int = 0

    def agreed(self, comm: Comm, others: Sequence[float]) -> tuple[EpochProgress, list[float]]:
        """The maxima over all ranks, of this and of other numbers that are to be agreed on."""
        mine = astuple(self)
        most = comm.max([float(number) for number in (*mine, *others)], "epoch.reached")
        return EpochProgress(*(int(number) for number in most[: len(mine)])), most[len(mine) :]


class EpochState:
    """One rank's epoch, worked off in segments, between which it can be saved.

    Args:
        plan: with the rounds of this epoch.
        rows: as :class:`hvd_hetero.worker.index_feed.Segment` has them.
        handed_out: whether these are everybody's.
        generator: the state of the generator of augmentation, before the epoch.
    """

    def __init__(self, plan: Plan, rows: NDArray[Any], handed_out: bool, generator: torch.Tensor) -> None:
        self.plan, self.rows, self._handed_out, self._generator = plan, rows, handed_out, generator
        self.reached = EpochProgress()
        self.work_sec: list[float] = []
        self._row = self._steps = 0
        self._parts: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._batches: Iterator[Batch] | None = None
        self._left_out, self._counts = 0, torch.zeros(NUMBERS, dtype=torch.int64)

    def count(self, excluded: int, sent: Counts | None) -> tuple[int, torch.Tensor | None]:
        """Adds what was counted since the last call; returns what the epoch has come to.

        Args:
            excluded: rounds that this rank was left out of.
            sent: in partial collectives; None for a method that has none.
        """
        self._left_out += excluded
        if sent is None:
            return self._left_out, None
        self._counts += to_numbers(sent)
        return self._left_out, self._counts

    @property
    def left(self) -> int:
        """Rounds of the plan that are left, the last one perhaps not whole."""
        if not self._handed_out:
            return self.plan.rounds - self.reached.planned
        rows = len(self.rows) - self.reached.rows
        batch = min(c.batch_size for c in self.plan.training)
        return 0 if rows < batch else -(-rows // self._round_samples)

    @property
    def steps(self) -> int:
        """Local steps of this rank so far."""
        return self._steps

    @property
    def _round_samples(self) -> int:
        return sum(c.round_samples for c in self.plan.classes)

    def segment(self, rounds: int, tau: int) -> tuple[Plan, NDArray[Any]]:
        """Plan and samples of the next so many rounds; all that is left in the last one."""
        part = replace(self.plan, rounds=rounds)
        if not self._handed_out:
            return part, self.rows[self._row : self._row + rounds * tau]
        rows = self.rows[self.reached.rows :]
        return part, rows if rounds >= self.left else rows[: rounds * self._round_samples]

    def batches(self, source: Source, rows: NDArray[Any], generator: torch.Generator) -> Iterator[Batch]:
        """The batches of a segment. Where ranks have their own, one iterator serves the epoch, and may read ahead."""
        if self._handed_out:
            return read(source, rows, generator)
        if self._batches is None:
            resumed = generator.get_state() if self._row else None
            if resumed is not None:
                generator.set_state(self._generator)
            self._batches = read(source, self.rows, generator, self._row)
            if resumed is not None:
                generator.set_state(resumed)
        return self._batches

    def reach(self, worked: SegmentResult, tau: int) -> EpochProgress:
        """How far this rank has come in the segment that it has just worked on."""
        planned = 0 if self._handed_out or not tau else -(-worked.steps // tau)
        version = int(worked.at[-1]) + 1 if worked.at is not None and len(worked.at) else 0
        return EpochProgress(worked.rounds, planned, worked.used if self._handed_out else 0, version)

    def add(self, worked: SegmentResult, reached: EpochProgress) -> None:
        """Takes in a segment, and how far all have come in it."""
        if worked.rows is not None and worked.at is not None:
            self._parts.append((worked.rows, worked.at + self.reached.version))
        self._row += worked.steps
        self._steps += worked.steps
        sums = (a + b for a, b in zip(astuple(self.reached), astuple(reached), strict=True))
        self.reached = EpochProgress(*sums)

    def worked(self) -> SegmentResult:
        """What this rank has done so far in the epoch."""
        if not self._parts:
            return SegmentResult(self.reached.rounds, self._steps)
        rows, at = (np.concatenate(arrays) for arrays in zip(*self._parts, strict=True))
        return SegmentResult(self.reached.rounds, self._steps, rows, at)

    def state_dict(self) -> dict[str, Any]:
        worked = self.worked()
        return {
            "plan": self.plan.to_dict(), "rows": self.rows, "handed_out": self._handed_out,
            "generator": self._generator, "reached": list(astuple(self.reached)), "work_sec": self.work_sec,
            "row": self._row, "steps": self._steps, "worked": [worked.rows, worked.at],
            "excluded": self._left_out, "counts": self._counts,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> EpochState:
        ongoing = cls(Plan.from_dict(state["plan"]), np.asarray(state["rows"]), state["handed_out"], state["generator"])
        ongoing.reached = EpochProgress(*state["reached"])
        ongoing.work_sec = list(state["work_sec"])
        ongoing._row, ongoing._steps = state["row"], state["steps"]
        ongoing._left_out, ongoing._counts = state["excluded"], state["counts"].clone()
        rows, at = state["worked"]
        ongoing._parts = [] if rows is None else [(np.asarray(rows), np.asarray(at))]
        return ongoing


class RoundSpans:
    """What this rank's own work took in each round of an epoch."""

    def __init__(self, watch: Stopwatch, recorder: Recorder, work_sec: list[float]) -> None:
        self._watch, self._recorder, self._work_sec = watch, recorder, work_sec
        self._before = sum(work_sec)

    def end_round(self) -> None:
        """To be called after each round."""
        self._recorder.end_round()
        now = self._watch.seconds["compute"] + self._watch.seconds["data"]
        self._work_sec.append(now - self._before)
        self._before = now

    def step_sec(self, worked: SegmentResult, tau: int) -> float:
        """Seconds of a step, towards the end of the epoch."""
        if worked.at is None:
            return settled_step_sec(self._work_sec, [tau] * len(self._work_sec))
        # what belongs to no step of a round, such as a late rank's taking of results, counts with the next
        return self._before / worked.steps if worked.steps else float("nan")


def say_taus(old: Plan, new: Plan, reason: str) -> None:
    """Tells which taus have changed between two plans, by what speeds, and why."""
    pairs = zip(old.classes, new.classes, strict=True)
    changes = [f"tau of {a.name} {a.tau} -> {b.tau}" for a, b in pairs if a.tau != b.tau]
    if changes:
        steps = ", ".join(f"{c.name} {1e3 * c.step_sec:.3g} ms" for c in new.classes if c.step_sec is not None)
        print(f"{', '.join(changes)}: a step now takes {steps}; {reason}", flush=True)
