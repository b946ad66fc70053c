"""The prediction of one method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hvd_hetero.analysis.predict.simulator import Spent


@dataclass(frozen=True)
class Prediction:
    """What one method would take.

    Attributes:
        label: as people call it, ``method``: ``algorithm.name``.
        tau: local steps in a round, by class, at the end of the run, as ``batch_size``.
        samples: trained on, over all ranks; ``averages``: collectives that were made.
        sent_bytes: by each rank that trains; ``comm_sec``: spent on all collectives.
        classes: seconds by kind, and steps.
        problem: why the method cannot run; the rest is empty then.
    """

    label: str
    method: str
    tau: dict[str, int]
    batch_size: dict[str, int]
    seconds: float = 0.0
    samples: float = 0.0
    averages: float = 0.0
    sent_bytes: float = 0.0
    comm_sec: float = 0.0
    classes: Mapping[str, Spent] | None = None
    problem: str | None = None

    @property
    def samples_per_sec(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def blocked(self) -> dict[str, float]:
        return {name: spent.blocked_share for name, spent in (self.classes or {}).items()}
