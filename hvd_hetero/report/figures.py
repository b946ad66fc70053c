"""The figures of a series of runs: means over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvd_hetero.report.runs import Series


@dataclass(frozen=True)
class Figures:
    """Means over the finished runs of a series.

    Attributes:
        seeds: of the runs that finished.
        accuracies: final ones, by seed, between 0 and 1; empty where none was measured.
        accuracy_std: sample standard deviation over seeds; None for fewer than two.
        train_sec: seconds of training, without start, profiling and evaluation; ``wall_sec`` has all of it.
        fast_steps: local steps of the rank that took the most.
        rounds: how often the ranks averaged.
        epochs: passes, the last one perhaps in part.
        rounds_per_epoch: averages in a whole pass.
        blocked: by class, the share of its time spent waiting for others.
    """

    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    accuracy: float | None
    accuracy_std: float | None
    loss: float
    wall_sec: float
    train_sec: float
    samples: float
    fast_steps: float
    rounds: float
    epochs: float
    rounds_per_epoch: float
    blocked: dict[str, float]
    emulated: bool


def figures(series: Series) -> Figures | None:
    """The means of a series; None where no run of it has finished."""
    done = series.finished
    if not done:
        return None
    per_epoch = [run.plan["rounds"] for run in series.runs if run.summary is not None]
    accuracies = [s["eval"]["final_accuracy"] for s in done if s["eval"]["final_accuracy"] is not None]
    blocked: dict[str, list[float]] = {}
    for summary in done:
        for c in summary["classes"]:
            blocked.setdefault(c["name"], []).append(c["blocked_fraction"])
    return Figures(
        seeds=tuple(s["seed"] for s in done),
        accuracies=tuple(accuracies),
        accuracy=_mean(accuracies) if accuracies else None,
        accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        loss=_mean([s["eval"]["final_loss"] for s in done]),
        wall_sec=_mean([s["wall_sec"] for s in done]),
        train_sec=_mean([s["train_sec"] for s in done]),
        samples=_mean([s["samples_seen"] for s in done]),
        fast_steps=_mean([fast_steps(s["classes"]) for s in done]),
        rounds=_mean([s["rounds"] for s in done]),
        epochs=_mean([s["rounds"] / rounds for s, rounds in zip(done, per_epoch, strict=True)]),
        rounds_per_epoch=_mean(per_epoch),
        blocked={name: _mean(shares) for name, shares in blocked.items()},
        emulated=any(s["emulated"] for s in done),
    )


def fast_steps(classes: Sequence[Mapping[str, Any]]) -> float:
    """Local steps of a rank of the class that took the most, from the classes of ``summary.json``."""
    return max(c["steps"] / len(c["ranks"]) for c in classes)


def _mean(values: Sequence[float]) -> float:
    """Without the rounding of a sum: equal integers have themselves as their mean."""
    return float(statistics.fmean(values))
