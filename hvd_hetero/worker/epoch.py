"""One epoch of one rank: the samples it trains on, how far it is, and what came of each step.

An epoch is trained in segments of rounds, between which it can be saved. A method goes through the rounds of a segment
and notes each step in it; the losses of these steps are kept by the worker, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_hetero.data import Batch, Source, read
from hvd_hetero.data.batch import weighted
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.stop_criteria import fast_steps
from hvd_hetero.telemetry.staleness import NUMBERS, Counts, to_numbers

Indices = NDArray[Any]


@dataclass(frozen=True)
class Progress:
    """How far an epoch is; the same on all ranks once they have agreed on it.

    Attributes:
        averages: made in it, or steps of the synchronous methods.
        planned: rounds of the plan that are used up.
        claimed: samples that are used up, where ranks claim them.
        version: rounds of partial collectives, empty ones included.
    """

    averages: int = 0
    planned: int = 0
    claimed: int = 0
    version: int = 0

    def __add__(self, other: Progress) -> Progress:
        return Progress(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Segment:
    """The next rounds of an epoch, for a method to go through.

    Args:
        rounds: that it has, by the plan.
        is_stopping: whether this rank was asked to stop; a method that goes in lockstep need not ask.

    Attributes:
        start_round: to be called with a round's number in the segment before it, and ``finish_round`` after it.
        averages: set by the method: how many were made.
        planned: rounds of the plan that are used up; set by a method whose ranks need not take all steps of one, else
            it follows from them.
        claimed: samples that are used up as far as this rank knows, where ranks claim them.
    """

    def __init__(
        self, epoch: Epoch, rounds: int, is_stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self._epoch, self.rounds, self.is_stopping = epoch, rounds, is_stopping
        self.start_round: Callable[[int], None] = lambda number: None
        self.finish_round: Callable[[], None] = lambda: None
        self.averages = self.claimed = 0
        self.planned: int | None = None
        self.at: list[int] = []
        self.rows: list[Indices] = []

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's batches, where it has samples of its own."""
        return self._epoch.batches()

    def rounds_done(self, tau: int) -> float:
        """Return the rounds of the epoch's plan that are done, by this rank's own steps or by claimed samples."""
        epoch = self._epoch
        if epoch.is_claimed:
            return (epoch.progress.claimed + self.claimed) / epoch.round_samples
        if self.planned is not None:
            return epoch.rounds_done + self.planned
        return epoch.rounds_done + (len(self.at) / tau if tau else 0)

    def record(self, steps: int, number: int) -> None:
        """Note that this rank has taken ``steps`` steps in round ``number`` of the segment."""
        self.at += [number] * steps

    @property
    def samples(self) -> int:
        """Samples that all ranks together may claim in this segment."""
        epoch, left = self._epoch, self._epoch.samples_left
        return left if self.rounds >= epoch.rounds_left else min(left, self.rounds * epoch.round_samples)

    def claim(self, start: int, size: int, micro_batches: int = 1) -> Iterator[Batch] | None:
        """Return the batch of the samples from place ``start`` on, in parts; None where so many are not left."""
        if start + size > self.samples:
            return None
        begin = self._epoch.progress.claimed + start
        self.rows.append(self._epoch.indices[begin : begin + size])
        self.claimed = start + size
        return self._epoch.read(slice(begin, begin + size), micro_batches)


class Epoch:
    """One rank's epoch.

    Args:
        plan: with the rounds of this epoch.
        indices: this rank's samples ``[rounds * tau, B]``, a row a step; or ``[N]``, those of all ranks, which claim
            them.
        source: where samples are read from, with augmentation drawn by ``generator``.
        weights: of the samples, as ``indices``; None: all weigh the same.

    Attributes:
        progress: as all ranks have agreed on it.
        work_sec: compute and data of each round of this rank.
        excluded: averages that this rank was excluded from, as far as they were counted.
        since: rounds before what is left of the epoch was dealt anew; 0: it was not.
    """

    def __init__(
        self, plan: Plan, indices: Indices, source: Source, generator: torch.Generator,
        weights: NDArray[np.float32] | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.indices, self._weights = plan, indices, weights
        self._source, self._generator, self._state = source, generator, generator.get_state()
        self.progress = Progress()
        self.work_sec: list[float] = []
        self._at: list[int] = []
        self._rows: list[Indices] = []
        self._batches: Iterator[Batch] | None = None
        self._start, self.excluded = 0, 0
        self.since, self._dealt, self._earlier = 0, 0, (0, 0)
        self._counts = torch.zeros(NUMBERS, dtype=torch.int64)

    @property
    def is_claimed(self) -> bool:
        """Whether ranks claim samples, and none has any of its own."""
        return self.indices.ndim == 1

    @property
    def steps(self) -> int:
        """Local steps of this rank so far."""
        return len(self._at)

    @property
    def round_samples(self) -> int:
        """Samples of a round of all ranks."""
        return sum(c.round_samples for c in self.plan.classes)

    @property
    def spent(self) -> tuple[int, int]:
        """Steps of the rank that took the most, and samples of all ranks, so far; by the plans that were followed."""
        rounds = self.progress.planned - self.since
        return self._earlier[0] + rounds * fast_steps(self.plan), self._earlier[1] + rounds * self.round_samples

    @property
    def rounds_done(self) -> float:
        """Rounds so far, in rounds of the plan as it is now."""
        return self.progress.planned - self.since + self._earlier[0] / fast_steps(self.plan)

    @property
    def rounds_met(self) -> float:
        """Rounds so far, as all ranks know them, in rounds of the plan as it is now."""
        return self.progress.claimed / self.round_samples if self.is_claimed else self.rounds_done

    def end_here(self) -> None:
        """Leave out what is left."""
        if self.is_claimed:
            self.indices = self.indices[: self.progress.claimed]
        else:
            self.deal_rest(replace(self.plan, rounds=0), self.indices[:0])

    def deal_rest(self, plan: Plan, indices: Indices, weights: NDArray[np.float32] | None = None) -> None:
        """Go on by another plan, on other samples.

        Args:
            plan: with the rounds that are left.
            indices: as those that an epoch begins with, and their ``weights``.
        """
        self._earlier, self.since = self.spent, self.progress.planned
        self.plan = replace(plan, rounds=self.since + plan.rounds)
        self.indices = np.concatenate([self.indices[: self.steps], indices])
        if self._weights is not None and weights is not None:
            self._weights = np.concatenate([self._weights[: self.steps], weights])
        self._start = self._dealt = self.steps
        self._batches, self._state = None, self._generator.get_state()

    @property
    def samples_left(self) -> int:
        """Samples that nobody has claimed yet."""
        return len(self.indices) - self.progress.claimed

    @property
    def rounds_left(self) -> int:
        """Rounds of the plan that are left, the last one perhaps not whole."""
        if not self.is_claimed:
            return self.plan.rounds - self.progress.planned
        is_over = self.samples_left < min(c.batch_size for c in self.plan.training)
        return 0 if is_over else -(-self.samples_left // self.round_samples)

    def batches(self) -> Iterator[Batch]:
        """Return the batches that are left; one iterator serves the epoch, and may read ahead."""
        if self._batches is None:
            now = self._generator.get_state()
            self._generator.set_state(self._state)  # an epoch that is resumed draws what it drew before
            begun = self._start - self._dealt
            batches = read(self._source, self.indices[self._dealt :], self._generator, begun)
            self._batches = weighted(batches, None if self._weights is None else self._weights[self._start :])
            if begun:
                self._generator.set_state(now)
        return self._batches

    def read(self, part: slice, batches: int = 1) -> Iterator[Batch]:
        """Yield a part of the samples that ranks claim, in so many batches."""
        batch = read(self._source, self.indices[part].reshape(batches, -1), self._generator)
        return weighted(batch, None if self._weights is None else self._weights[part].reshape(batches, -1))

    def finish(self, segment: Segment, tau: int) -> Progress:
        """Return how far this rank has come in a segment."""
        planned = 0 if self.is_claimed or not tau else -(-len(segment.at) // tau)
        planned = planned if segment.planned is None else segment.planned
        version = segment.at[-1] + 1 if segment.at else 0
        return Progress(segment.averages, planned, segment.claimed, version)

    def add(self, segment: Segment, progress: Progress) -> None:
        """Take in what this rank did in a segment, and how far all ranks have come in it."""
        self._at += [number + self.progress.version for number in segment.at]
        self._rows += segment.rows
        self.progress += progress

    def results(self) -> tuple[Indices, NDArray[Any]]:
        """Return the samples of this rank's steps so far, ``[steps, B]``, and the round of each, ``[steps]``."""
        size = (0, min((c.batch_size for c in self.plan.training), default=1))
        rows = self.indices[: self.steps] if not self.is_claimed else np.stack(self._rows or [np.empty(size[1:], int)])
        return rows[: self.steps], np.array(self._at, dtype=np.int32)

    def count(self, excluded: int, sent: Counts | None) -> tuple[int, torch.Tensor | None]:
        """Add what was counted since the last call; return what the epoch has come to.

        Args:
            excluded: averages that this rank was excluded from.
            sent: in partial collectives; None for a method that has none.
        """
        self.excluded += excluded
        if sent is None:
            return self.excluded, None
        self._counts += to_numbers(sent)
        return self.excluded, self._counts

    def state_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_dict(), "indices": self.indices, "generator": self._state,
            "progress": list(astuple(self.progress)), "work_sec": self.work_sec, "at": self._at, "rows": self._rows,
            "excluded": self.excluded, "counts": self._counts,
            "weights": self._weights, "since": self.since, "dealt": self._dealt, "earlier": self._earlier,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, Any], source: Source, generator: torch.Generator) -> Epoch:
        """Make an epoch that goes on where :meth:`state_dict` was called."""
        weights = None if state["weights"] is None else np.asarray(state["weights"])
        epoch = cls(Plan.from_dict(state["plan"]), np.asarray(state["indices"]), source, generator, weights)
        epoch._state = state["generator"]
        epoch.progress = Progress(*state["progress"])
        epoch.work_sec, epoch._at = list(state["work_sec"]), list(state["at"])
        epoch._rows = [np.asarray(rows) for rows in state["rows"]]
        epoch._start, epoch.excluded, epoch._counts = epoch.steps, state["excluded"], state["counts"].clone()
        epoch.since, epoch._dealt, epoch._earlier = state["since"], state["dealt"], tuple(state["earlier"])
        return epoch
