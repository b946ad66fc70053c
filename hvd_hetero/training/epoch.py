"""What came of an epoch on all ranks: their times, samples, mean loss and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.config.schema import Config
from hvd_hetero.log import LOGGER
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.rebalance import settled_step_sec
from hvd_hetero.planning.stop_criteria import RunProgress, rest_rounds
from hvd_hetero.planning.weighted_sampling import INFOBATCH
from hvd_hetero.telemetry.stopwatch import KINDS, Stopwatch, transfer_sec
from hvd_hetero.telemetry.time_accounts import Accounts
from hvd_hetero.telemetry.trace import Recorder
from hvd_hetero.worker.epoch import Epoch
from hvd_hetero.worker.losses import mean, weighted_sums
from hvd_hetero.worker.memory import peak_bytes
from hvd_hetero.worker.worker import Worker


@dataclass(frozen=True)
class EpochFigures:
    """What all ranks did in an epoch: its seconds, samples, mean loss, and what a step of each took towards its end.

    Attributes:
        average_sec: what its collectives took, most of which were averages, without waiting.
    """

    seconds: float
    samples: int
    loss: float
    step_sec: list[float]
    average_sec: float


def gather_peaks(comm: Comm, worker: Worker, cluster: Cluster) -> list[dict[str, Any]]:
    """Gather, for each class, the bytes of a GPU that a rank took at most, and the micro-batches that it was given."""
    peaks = comm.gather(torch.tensor([peak_bytes(worker.device), worker.micro_batches]), "peaks")
    return [{"peak_gpu_bytes": max(int(peaks[r][0]) for r in c.ranks) if c.device == "cuda" else None,
             "micro_batches": int(peaks[c.ranks[0]][1])} for c in cluster.classes]  # fmt: skip


def gather_figures(
    comm: Comm, watch: Stopwatch, accounts: Accounts, epoch: Epoch, losses: torch.Tensor, weights: torch.Tensor,
    step_sec: float, counts: Mapping[str, int],
) -> EpochFigures:  # fmt: skip
    """Gathers what all ranks did in an epoch and where their time went, and enters it into the accounts.

    Args:
        losses: of this rank, with their ``weights``.
        step_sec: seconds of one of its steps.
        counts: of this rank, see :meth:`~hvd_hetero.telemetry.time_accounts.Accounts.enter`; the same names on all.
    """
    kinds, collectives = watch.drain()
    sums = weighted_sums(losses.double(), weights.double()).tolist()
    figures = [*(kinds[kind] for kind in KINDS), *sums, epoch.steps, step_sec, *counts.values(), *collectives]
    rows = [row.tolist() for row in comm.gather(torch.tensor(figures, dtype=torch.float64), "epoch.times")]
    count = len(KINDS)
    loss = mean(sum(row[count] for row in rows), sum(row[count + 1] for row in rows))
    steps = [int(row[count + 2]) for row in rows]
    spent = [dict(zip(KINDS, row, strict=False)) for row in rows]
    before = accounts.samples_seen
    counted = {name: [int(row[count + 4 + i]) for row in rows] for i, name in enumerate(counts)}
    met = [row[count + 4 + len(counts) :] for row in rows]
    seconds = accounts.enter(epoch.plan, epoch.progress.averages, steps, spent, met, counted)
    samples = accounts.samples_seen - before
    return EpochFigures(seconds, samples, loss, [row[count + 3] for row in rows], transfer_sec(met))


def rest_plan(config: Config, epoch: Epoch, plan: Plan, samples: int, done: RunProgress) -> Plan:
    """Return another plan with the rounds in which it goes through what is left of an epoch.

    Args:
        samples: n, of the training set.
        done: before the epoch.
    """
    steps, spent = epoch.spent
    done = replace(done, fast_steps=done.fast_steps + steps, samples=done.samples + spent)
    prunes = config.sampling.scheme == INFOBATCH  # then there are no more samples than were dealt
    there = epoch.rounds_left * epoch.round_samples if prunes else samples - spent
    return replace(plan, rounds=rest_rounds(config.train, epoch.plan, plan, epoch.rounds_left, there, done))


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

    def step_sec(self, epoch: Epoch, tau: int, is_planned: bool) -> float:
        """Seconds of a step, towards the end of the epoch."""
        if is_planned:
            work = self._work_sec[epoch.since :]
            return settled_step_sec(work, [tau] * len(work))
        # what belongs to no step of a round, such as a late rank's taking of results, counts with the next
        return self._before / epoch.steps if epoch.steps else float("nan")


def say_taus(old: Plan, new: Plan, reason: str) -> None:
    """Tells which taus have changed between two plans, by what speeds, and why."""
    pairs = zip(old.classes, new.classes, strict=True)
    changes = [f"tau of {a.name} {a.tau} -> {b.tau}" for a, b in pairs if a.tau != b.tau]
    if changes:
        steps = ", ".join(f"{1e3 * c.step_sec:.3g} ms on {c.name}" for c in new.classes if c.step_sec is not None)
        LOGGER.info("%s: a step now takes %s; %s", ", ".join(changes), steps, reason)
