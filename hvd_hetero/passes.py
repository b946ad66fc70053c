"""What a pass over the data came to, and how fast each rank was in it."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_hetero.feed import Worked
from hvd_hetero.pacing import settled_step_sec
from hvd_hetero.plan import Plan
from hvd_hetero.timing import Stopwatch
from hvd_hetero.trace import Recorder


@dataclass(frozen=True)
class PassFigures:
    """What all ranks did in a pass: its seconds, samples, mean loss, and what a step of each took towards its end."""

    seconds: float
    samples: int
    loss: float
    step_sec: list[float]


class RoundLaps:
    """What this rank's own work took in each round of a pass."""

    def __init__(self, watch: Stopwatch, recorder: Recorder) -> None:
        self._watch, self._recorder = watch, recorder
        self._work_sec: list[float] = []
        self._before = 0.0

    def end_round(self) -> None:
        """To be called after each round."""
        self._recorder.end_round()
        now = self._watch.seconds["compute"] + self._watch.seconds["data"]
        self._work_sec.append(now - self._before)
        self._before = now

    def step_sec(self, worked: Worked, tau: int) -> float:
        """Seconds of a step, towards the end of the pass."""
        if worked.at is None:
            return settled_step_sec(self._work_sec, [tau] * len(self._work_sec))
        # what belongs to no step of a round, such as a late rank's taking of results, counts with the next
        return self._before / worked.steps if worked.steps else float("nan")


def say_taus(old: Plan, new: Plan) -> None:
    """Tells what has changed between two plans, and why."""
    pairs = zip(old.classes, new.classes, strict=True)
    changes = [f"tau of {a.name} {a.tau} -> {b.tau}" for a, b in pairs if a.tau != b.tau]
    if changes:
        steps = ", ".join(f"{c.name} {1e3 * c.step_sec:.3g} ms" for c in new.classes if c.step_sec is not None)
        print(f"{', '.join(changes)}: a step now takes {steps}", flush=True)
