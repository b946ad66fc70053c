"""Whether other local steps would leave less of the cluster waiting, judged pass by pass. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

from hvd_hetero.plan import Plan

WORTH = 0.015
"""Share of the cluster's capacity that a change must save; less is noise of the measurement."""
PASSES = 2
"""In how many passes on end it must: one disturbed pass changes nothing."""
NEW_SHARE = 0.5
"""Weight of a pass's own measurement in the running estimate."""


class Pacing:
    """Keeps an estimate of every class's step time, and says when the plan that follows from it is worth having.

    Args:
        step_sec: seconds of a local step, by class, as measured before training.
    """

    def __init__(self, step_sec: Mapping[str, float]) -> None:
        self.step_sec = dict(step_sec)
        self._in_a_row = 0

    def observe(self, measured: Mapping[str, float]) -> None:
        """Takes in the step times of a pass."""
        for name, seconds in measured.items():
            self.step_sec[name] += NEW_SHARE * (seconds - self.step_sec[name])

    def worth(self, current: Plan, proposed: Plan) -> bool:
        """Whether to change over now; asked once a pass."""
        saved = self.waste(current) - self.waste(proposed)
        self._in_a_row = self._in_a_row + 1 if saved >= WORTH else 0
        if self._in_a_row < PASSES:
            return False
        self._in_a_row = 0
        return True

    def waste(self, plan: Plan) -> float:
        """Share of the cluster's capacity that waits: 1 - samples of a round / those it could take without waiting."""
        round_sec = max(c.tau * self.step_sec[c.name] for c in plan.classes)
        capacity = sum(len(c.ranks) * c.batch_size / self.step_sec[c.name] for c in plan.classes)
        return 1 - sum(c.round_samples for c in plan.classes) / (round_sec * capacity)
