"""The figures of a series of runs: means over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from hvd_hetero.analysis.report.runs import Series

CONTRIBUTED = ("fresh", "late", "empty")
"""What a rank may have sent in a round of a partial collective, as in ``summary.json``."""


@dataclass(frozen=True)
class Figures:
    """Means over the finished runs of a series.

    Attributes:
        seeds: of the runs that finished.
        accuracies: final ones, by seed, between 0 and 1; empty where none was measured.
        loss: None where it was no number in some run.
        accuracy_std: sample standard deviation over seeds; None for fewer than two.
        train_sec: seconds of training, without start, profiling and evaluation; ``wall_sec`` has all of it.
        fast_steps: local steps of the rank that took the most.
        rounds: how often the ranks averaged.
        epochs: epochs, the last one perhaps in part.
        rounds_per_epoch: averages in a whole epoch.
        blocked: by class, the share of its time spent waiting for others.
        sent_bytes: by a rank of the class that sent the most; None where it is not known.
        lost: samples of which no step was made, since they came too late or were left out in time.
        emulation: why times are not those of real devices, where ``emulated``.
    """

    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    accuracy: float | None
    accuracy_std: float | None
    loss: float | None
    wall_sec: float
    train_sec: float
    samples: float
    fast_steps: float
    rounds: float
    epochs: float
    rounds_per_epoch: float
    blocked: dict[str, float]
    sent_bytes: float | None
    lost: float
    emulated: bool
    emulation: tuple[str, ...]


@dataclass(frozen=True)
class PartialShares:
    """What went into partial collectives; means over the finished runs of a series.

    Attributes:
        names: of the ranks, with their classes.
        ranks: by rank, the shares of its rounds: fresh, late, empty.
        waited_for: by rank, how many rounds it held up.
        staleness: by age in rounds, the share of all ranks' contributions.
    """

    names: tuple[str, ...]
    ranks: tuple[dict[str, float], ...]
    waited_for: tuple[float, ...]
    staleness: tuple[float, ...]

    @property
    def mean_staleness(self) -> float:
        return sum(age * share for age, share in enumerate(self.staleness))


def figures(series: Series) -> Figures | None:
    """The means of a series; None where no run of it has finished."""
    done = series.finished
    if not done:
        return None
    per_epoch = [run.plan["rounds"] for run in series.runs if run.summary is not None]
    accuracies = [s["eval"]["final_accuracy"] for s in done if s["eval"].get("final_accuracy") is not None]
    losses = [s["eval"]["final_loss"] for s in done]
    sent: list[Any] = [max((c["sent_bytes"] for c in s["classes"] if "sent_bytes" in c), default=None) for s in done]
    blocked: dict[str, list[float]] = {}
    for summary in done:
        for c in summary["classes"]:
            blocked.setdefault(c["name"], []).append(c["blocked_fraction"])
    return Figures(
        seeds=tuple(s["seed"] for s in done),
        accuracies=tuple(accuracies),
        accuracy=_mean(accuracies) if accuracies else None,
        accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        loss=None if None in losses else _mean(losses),
        wall_sec=_mean([s["wall_sec"] for s in done]),
        train_sec=_mean([s["train_sec"] for s in done]),
        samples=_mean([s["samples_seen"] for s in done]),
        fast_steps=_mean([fast_steps(s["classes"]) for s in done]),
        rounds=_mean([s["rounds"] for s in done]),
        epochs=_mean([s["rounds"] / rounds for s, rounds in zip(done, per_epoch, strict=True)]),
        rounds_per_epoch=_mean(per_epoch),
        blocked={name: _mean(shares) for name, shares in blocked.items()},
        sent_bytes=None if None in sent else _mean(sent),
        lost=_mean([_lost(s) for s in done]),
        emulated=any(s["emulated"] for s in done),
        emulation=series.emulation,
    )


def _lost(summary: Mapping[str, Any]) -> int:
    late = sum(rank.get("lost_samples", 0) for rank in summary.get("partial", {}).get("ranks", ()))
    return late + sum(c.get("dropped", 0) for c in summary["classes"])


def partial_shares(series: Series) -> PartialShares | None:
    """The shares of a series; None where no finished run of it had partial collectives."""
    summaries = [s for s in series.finished if "partial" in s]
    if not summaries:
        return None
    done = [s["partial"] for s in summaries]
    of = {rank: c["name"] for s in summaries for c in s["classes"] for rank in c["ranks"]}
    ranks = list(zip_longest(*(part["ranks"] for part in done)))  # seeds may have had different numbers of ranks
    shares = [[_shares({kind: rank[kind] for kind in CONTRIBUTED}) for rank in rows if rank] for rows in ranks]
    ages = [_shares(dict(enumerate(part["staleness"]))) for part in done]
    return PartialShares(
        names=tuple(f"rank {rank}, {of[rank]}" for rank in range(len(ranks))),
        ranks=tuple({kind: _mean([row[kind] for row in rows]) for kind in CONTRIBUTED} for rows in shares),
        waited_for=tuple(_mean([rank["waited_for"] for rank in rows if rank]) for rows in ranks),
        staleness=tuple(_mean([row.get(age, 0.0) for row in ages]) for age in range(max(map(len, ages)))),
    )


def _shares(counts: Mapping[Any, float]) -> dict[Any, float]:
    total = sum(counts.values()) or 1
    return {key: count / total for key, count in counts.items()}


def fast_steps(classes: Sequence[Mapping[str, Any]]) -> float:
    """Local steps of a rank of the class that took the most, from the classes of ``summary.json``."""
    return max(c["steps"] / len(c["ranks"]) for c in classes)


def _mean(values: Sequence[float]) -> float:
    """Without the rounding of a sum: equal integers have themselves as their mean."""
    return float(statistics.fmean(values))
