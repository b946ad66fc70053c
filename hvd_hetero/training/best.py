"""Which evaluation was the best one (eval.best), and how many have come since (train.patience)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hvd_hetero.log import LOGGER
from hvd_hetero.training.evaluation import AVERAGED, EVAL
from hvd_hetero.worker.factories import ACCURACY
from hvd_hetero.worker.metrics import LOSS, MAX, Metric, read_best


class BestEvaluation:
    """The figures of the last evaluation, and of the best one so far.

    Args:
        spec: ``eval.best``; None: the highest accuracy, the lowest loss where there is none.
        metrics: beside the loss.
        patience: so many evaluations in a row may be no better than the best one; None: any number.

    Attributes:
        metric: by which evaluations are compared, and ``mode``, max or min.
        since: evaluations since the best one.

    Raises:
        ConfigError: as :func:`hvd_hetero.worker.metrics.read_best`.
    """

    def __init__(self, spec: Any, metrics: Sequence[Metric], patience: int | None = None) -> None:
        self.metric, self.mode = read_best(spec, metrics)
        of = {metric.name: metric.value for metric in metrics}
        self.by = f"{self.mode} {self.metric}" + (f" ({of[self.metric]})" if of.get(self.metric, ACCURACY) != ACCURACY
                                                  else "")  # fmt: skip
        self._patience = patience
        self.value: float | None = None
        self.since = 0
        self._last: dict[str, float | None] = {}

    def score(self, row: Mapping[str, Any]) -> float | None:
        """Return what an evaluation is compared with others by, more is better.

        None without an evaluation, for NaN, and for a model whose loss is NaN: whatever else is said of it cannot be
        right.
        """
        loss, value = row.get(EVAL + LOSS), row.get(EVAL + self.metric)
        if loss is None or value is None or math.isnan(loss) or math.isnan(value):
            return None
        return float(value) if self.mode == MAX else -float(value)

    def enter(self, row: Mapping[str, Any]) -> None:
        """Take in an evaluation."""
        named = {"final_" + name.removeprefix(EVAL): value for name, value in row.items() if name.startswith(EVAL)}
        named |= {name: value for name, value in row.items() if name.startswith(AVERAGED)}
        self._last = {name: None if value is None or math.isnan(value) else value for name, value in named.items()}
        score = self.score(row)
        best = None if self.value is None else (self.value if self.mode == MAX else -self.value)
        if score is not None and (best is None or score > best):
            self.value, self.since = row[EVAL + self.metric], 0
        else:
            self.since += 1

    @property
    def waited_enough(self) -> bool:
        """Whether nothing better is to be expected."""
        return self._patience is not None and self.since >= self._patience

    def log_end(self) -> None:
        """Tell that the run has ended for this, if it has."""
        if self.waited_enough:
            LOGGER.info("ended by train.patience: %d evaluations were no better than the best one, %s %s",
                        self.since, self.by, self.value)  # fmt: skip

    def summary(self) -> dict[str, float | None]:
        """Return the last figures and the best value."""
        return {f"final_{LOSS}": None, **self._last, f"best_{self.metric}": self.value}

    def state_dict(self) -> dict[str, Any]:
        return {"by": self.by, "value": self.value, "since": self.since, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; what was the best by another metric is forgotten."""
        self._last = dict(state["last"])
        if state["by"] == self.by:
            self.value, self.since = state["value"], state["since"]
