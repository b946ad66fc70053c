"""Whether other local steps would leave less of the cluster waiting, judged while a run goes on. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hvd_hetero.planning.local_steps import planned_step_sec, round_overhead
from hvd_hetero.planning.plan import Plan

WORTH = 0.015
"""Share of the cluster's capacity that a change must save; less is noise of the measurement."""
EPOCHS = 2
"""In how many judgements on end it must: one disturbed one changes nothing."""
TO_MORE = 2
"""Times as many before a slow class takes more steps: it alone gains, and if they are too many the fast ones wait."""
OBVIOUS_SHARE = 0.1
"""A share so large that once is enough: a class has become slower or faster for all to see."""
NEW_SHARE = 0.5
"""Weight of what was measured last in the running estimate."""
BOUND = 4.0
"""By which factor at most an estimate changes at once, up or down: one measurement may be worth nothing."""
JUDGED_MARGIN = 0.5
"""Share of the margin with which plans are judged: that between this and all of it is the dead band of small drifts."""
SHORTER = 2
"""Times as short a round has to be for its own sake; between that and :data:`WORTH` nothing flaps."""
CHUNKS = 8
JUDGED_SEC = 2.0
"""What took less than this is judged together: a fraction of a second tells a machine's moods from nothing."""


class Rebalancer:
    """Keeps an estimate of every class's step time, and says when the plan that follows from it is worth having.

    Args:
        step_sec: seconds of a local step, by class, as measured before training.
        batch_size: that these are of.
        margin: of :func:`~hvd_hetero.planning.local_steps.planned_step_sec`, with which plans are made.
        average_sec: of an average, where the length of a round is chosen too, and so what is ``affordable`` of it.
        delayed: as in :func:`~hvd_hetero.planning.local_steps.round_overhead`.
    """

    def __init__(
        self, step_sec: Mapping[str, float], batch_size: Mapping[str, int], margin: float = 0.0, *,
        average_sec: float = 0.0, affordable: float = 0.0, delayed: bool = False,
    ) -> None:  # fmt: skip
        self.average_sec, self._affordable, self._delayed = average_sec, affordable, delayed
        self.step_sec = dict(step_sec)
        self._batch_size = batch_size
        self._margin = JUDGED_MARGIN * margin
        self._latest = dict(step_sec)
        self._in_a_row = 0
        self._epochs: list[tuple[dict[str, float], float]] = []
        self._seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "step_sec": self.step_sec, "latest": self._latest, "in_a_row": self._in_a_row,
            "epochs": self._epochs, "seconds": self._seconds,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step_sec, self._latest = dict(state["step_sec"]), dict(state["latest"])
        self._in_a_row = state["in_a_row"]
        self._epochs, self._seconds = [(dict(p), sec) for p, sec in state["epochs"]], state["seconds"]

    def observe(self, measured: Mapping[str, float], seconds: float) -> bool:
        """Takes in an epoch or a segment of one; returns whether there is something to judge: enough of them together.

        Of several ones' step times the median counts, by how long they took.

        Args:
            measured: seconds of a local step for the batch sizes given at first, by class.
            seconds: that it took the fastest class.
        """
        self._epochs.append((dict(measured), seconds))
        self._seconds += seconds
        if self._seconds < JUDGED_SEC or len(self._epochs) == 2:  # of two, the median is no better than either
            return False
        for name, known in self.step_sec.items():
            times = [(p[name], sec) for p, sec in self._epochs if name in p]
            if times:
                self._latest[name] = min(max(_median(times), known / BOUND), known * BOUND)
                self.step_sec[name] += NEW_SHARE * (self._latest[name] - known)
        self._epochs, self._seconds = [], 0.0
        return True

    def is_obvious_gain(self, current: Plan, proposed: Plan) -> bool:
        """Whether the latest times alone, which the proposal goes by, say that it saves a lot; then they are believed.

        Asked before :meth:`worth`, with the plan for :attr:`latest`.
        """
        if self.capacity_saved(current, proposed, self._latest) < OBVIOUS_SHARE:
            return False
        self.step_sec, self._in_a_row = dict(self._latest), 0
        return True

    def is_worth_it(self, current: Plan, proposed: Plan) -> bool:
        """Whether to change over now; asked once a judgement, with the plan for :attr:`step_sec`."""
        is_better = self.capacity_saved(current, proposed) >= WORTH or self._is_much_shorter(current, proposed)
        self._in_a_row = self._in_a_row + 1 if is_better else 0
        longest, now = (max(c.tau for c in plan.training) for plan in (proposed, current))
        pairs = zip(current.classes, proposed.classes, strict=True)
        fewer = any(new.tau * now < old.tau * longest for old, new in pairs)
        if self._in_a_row < EPOCHS * (1 if fewer else TO_MORE):
            return False
        self._in_a_row = 0
        return True

    def _is_much_shorter(self, current: Plan, proposed: Plan) -> bool:
        """Whether rounds of half the length have become affordable: shorter ones train better."""
        halved = SHORTER * max(c.tau for c in proposed.training) <= max(c.tau for c in current.training)
        return halved and self.waste(proposed) <= self._affordable

    @property
    def latest(self) -> dict[str, float]:
        """The step times that were measured last, within :data:`BOUND` of the estimate before."""
        return dict(self._latest)

    def capacity_saved(self, current: Plan, proposed: Plan, step_sec: Mapping[str, float] | None = None) -> float:
        """By how much less of the cluster's capacity would wait."""
        return self.waste(current, step_sec) - self.waste(proposed, step_sec)

    def waste(self, plan: Plan, step_sec: Mapping[str, float] | None = None) -> float:
        """Share of the cluster's capacity that waits, or is spent on averages where their time is known.

        Slower classes count as taking longer by :data:`JUDGED_MARGIN` of the margin.
        """
        times = planned_step_sec(step_sec or self.step_sec, self._margin)
        now = {c.name: times[c.name] * c.batch_size / self._batch_size[c.name] for c in plan.training}
        samples = {c.name: float(c.round_samples) / c.tau for c in plan.training}
        taus = {c.name: c.tau for c in plan.training}
        return round_overhead(taus, now, samples, self.average_sec, self._delayed)


def _median(weighted: Sequence[tuple[float, float]]) -> float:
    """Return the median of values that count by their weights."""
    values = sorted(weighted)
    half, reached = sum(weight for _, weight in values) / 2, 0.0
    for value, weight in values:
        reached += weight
        if reached >= half:
            return value
    raise AssertionError("half of a sum is reached")


def settled_step_sec(work_sec: Sequence[float], steps: Sequence[int]) -> float:
    """Seconds of a step in the second half of an epoch, from each round's work; NaN if there was none.

    The median over a few segments of the mean within each: a quota or a sleep makes single rounds uneven, which a mean
    sees through, and a process that stands still for a moment is one segment of several.

    Args:
        work_sec: of each round, waiting excluded.
        steps: local steps in it.
    """
    rounds = [(sec, count) for sec, count in zip(work_sec, steps, strict=True) if count]
    rounds = rounds[len(rounds) // 2 :]
    size = -(-len(rounds) // CHUNKS)
    segments = [rounds[i : i + size] for i in range(0, len(rounds), size)] if rounds else []
    means = [sum(sec for sec, _ in part) / sum(count for _, count in part) for part in segments]
    return statistics.median(means) if means else float("nan")
