"""What a checkpoint holds of a run, and how a run goes on from one, as it was or otherwise shaped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from hvd_hetero.algorithms.execution.base import Executor
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.data import Source
from hvd_hetero.planning.plan import Plan
from hvd_hetero.telemetry.run_folder import RunFolder
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.telemetry.time_accounts import Accounts
from hvd_hetero.training.best import BestEvaluation
from hvd_hetero.training.checkpointer import SyncPoints
from hvd_hetero.training.iterate_average import IterateAverage
from hvd_hetero.training.resume import places, slots
from hvd_hetero.training.run_records import say_resumed
from hvd_hetero.training.startup import Job
from hvd_hetero.worker.epoch import Epoch
from hvd_hetero.worker.index_feed import Feed
from hvd_hetero.worker.worker import Worker

PARTS = ("worker", "algorithm", "accounts")
STREAM = "stream"
"""Among what a program keeps, the place in its stream."""


class Run(Protocol):
    """A run, as far as it is saved and goes on: see :class:`hvd_hetero.training.trainer.Trainer`."""

    job: Job
    worker: Worker
    algorithm: Executor
    accounts: Accounts
    comm: Comm
    feed: Feed
    plan: Plan
    watch: Stopwatch
    folder: RunFolder | None
    saver: SyncPoints | None
    epoch: Epoch | None
    source: Source
    best: BestEvaluation
    averaged: IterateAverage | None
    begin: float
    kept: dict[str, Any]
    met: tuple[float, float]

    @property
    def over(self) -> bool: ...


def state_of(run: Run, epoch: Epoch | None) -> dict[str, Any]:
    """Everything that decides how this rank goes on, in an epoch under way or between two."""
    state: dict[str, Any] = {name: getattr(run, name).state_dict() for name in PARTS}
    state |= {"plan": run.plan.to_dict(), "best": run.best.state_dict(), "wall_sec": time.perf_counter() - run.begin,
              "path": run.comm.path, "sent": run.comm.traffic.sent, "classes": places(run.job.cluster),
              "slots": slots(run.job.cluster)}  # fmt: skip
    if run.kept:
        state["kept"] = {name: item.state_dict() for name, item in run.kept.items()}
    if epoch is not None:
        epoch.count(run.comm.excluded.pop(), run.algorithm.counts())
        state["epoch"] = epoch.state_dict()
        state["watch"], state["met"] = run.watch.state_dict(), run.met
    if run.feed.sampler is not None:
        rows_bytes = [0, 0] if run.folder is None else run.folder.rows_bytes
        kept = {"rows_bytes": rows_bytes, "samples_seen": run.accounts.samples_seen,
                "data": run.job.data.get("training")}  # fmt: skip
        state["rank0"] = {**kept, "sampler": run.feed.sampler.state_dict(),
                          "averaged": None if run.averaged is None else run.averaged.state_dict()}  # fmt: skip
    return state


def restore(run: Run, state: Mapping[str, Any]) -> None:
    """Goes on as it was, from what :func:`state_of` gave."""
    for part in PARTS:
        getattr(run, part).load_state_dict(state[part])
    for name, item in run.kept.items():
        if name in state.get("kept", {}):
            item.load_state_dict(state["kept"][name])
    run.best.load_state_dict(state["best"])
    run.comm.traffic.sent = state["sent"]
    run.begin -= state["wall_sec"]
    place = f"epoch {run.accounts.epochs}, round {run.accounts.rounds}"
    if "epoch" in state:
        run.epoch = Epoch.from_state(state["epoch"], run.source, run.worker.generator)
        run.watch.load_state_dict(state["watch"])
        run.met = tuple(state.get("met", run.met))
        place += f", in the next epoch {run.epoch.progress.averages} rounds later"
    if run.feed.sampler is not None:
        run.feed.sampler.load_state_dict(state["rank0"]["sampler"])
        if run.averaged is not None and state["rank0"]["averaged"] is not None:
            run.averaged.load_state_dict(state["rank0"]["averaged"])
        say_resumed(place, run.over)
