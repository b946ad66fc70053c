"""What a run tells while it goes: figures of all classes with every meeting of the ranks, written by rank 0."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.config.schema import Config
from hvd_hetero.files import write_text
from hvd_hetero.log import LOGGER
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.schedules import left_sec, run_fraction
from hvd_hetero.planning.stop_criteria import RunProgress, expected_epochs
from hvd_hetero.telemetry.row_file import to_json
from hvd_hetero.telemetry.run_folder import RunFolder
from hvd_hetero.telemetry.run_status import ENDED, LIVE_TRACE, LOOK, PREPARING, STATUS, TRAINING, own_mark
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.telemetry.time_accounts import Accounts
from hvd_hetero.telemetry.trace import Recorder
from hvd_hetero.training.checkpointer import NONE, SyncPoints
from hvd_hetero.training.evaluation import EVAL
from hvd_hetero.training.run_records import write_trace
from hvd_hetero.training.startup import Job
from hvd_hetero.worker.epoch import Epoch, Segment

EVERY_SEC, SHARE = 1.0, 100
"""Rank 0 writes so often at most, and spends no more than one part in so many of its time on it."""
LIVE_ROUNDS = 4
"""Rounds that are recorded for somebody who looks."""


class Run(Protocol):
    """A run, as far as it is told of: see :class:`hvd_hetero.training.trainer.Trainer`."""

    job: Job
    config: Config
    comm: Comm
    plan: Plan
    watch: Stopwatch
    folder: RunFolder | None
    saver: SyncPoints | None
    accounts: Accounts
    epoch: Epoch | None
    begin: float

    @property
    def done(self) -> RunProgress: ...


class LiveStatus:
    """Tells how a run stands, in ``status.json``; every rank has one, rank 0 writes.

    Figures of classes are the largest of their ranks, since they come with a collective that finds maxima.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._content: dict[str, Any] = {"phase": PREPARING}
        self._wrote, self._write_sec, self._has_warned = 0.0, 0.0, False
        self._began, self._met, self._waited = time.monotonic(), 0, 0.0
        self._start, self._start_fraction = time.monotonic(), 0.0
        self._recorder = Recorder(run.watch, LIVE_ROUNDS)
        self._recording = False
        self._write()

    # ---- phases -----------------------------------------------------------------------------------------------------

    def enter(self, phase: str) -> None:
        """The run is in another phase, one of :mod:`hvd_hetero.telemetry.run_status`; after an end there is none."""
        if self._content["phase"] not in ENDED and phase != self._content["phase"]:
            self._content["phase"] = phase
            if "checkpoint" in self._content:
                self._content["checkpoint"] = self._checkpoint()
            self._write(0.0 if phase in ENDED else SHARE * self._write_sec)

    def begin(self) -> None:
        """Training begins, or is resumed."""
        run = self._run
        self._start, self._start_fraction = time.monotonic(), self._fraction_done(rounds_of(run.epoch))
        self._content |= {"epochs": expected_epochs(run.config.train, run.plan), **self._place(run.epoch)}
        self._content["classes"] = self._classes()
        if run.epoch is not None:
            self.enter(TRAINING)

    # ---- segments ---------------------------------------------------------------------------------------------------

    def start_segment(self) -> None:
        watch = self._run.watch
        self._began, self._met, self._waited = time.monotonic(), len(watch.collectives), watch.seconds["blocked"]
        if self._recording:
            self._recorder.spans = []
            if watch.spans is None:  # else the rounds of the run's own trace are recorded
                self._recorder.start()

    def figures(self, epoch: Epoch, segment: Segment) -> list[float]:
        """Return this rank's figures of the segment that ends, for :meth:`meet` to be given the maxima of all ranks."""
        run, comm = self._run, self._run.comm
        together = sum(spent for spent in run.watch.collectives[self._met :] if spent == spent)
        waited = together + run.watch.seconds["blocked"] - self._waited
        of_rank = [float(len(segment.at)), waited, float(epoch.excluded + comm.excluded.pending)]
        mine = run.job.cluster.class_of(comm.rank).name
        rows = (of_rank if c.name == mine else [0.0] * len(of_rank) for c in run.job.cluster.classes)
        looked_at = run.folder is not None and not self._recording and os.path.exists(run.folder.path / LOOK)
        return [*(number for row in rows for number in row), -together, float(looked_at)]

    def meet(self, epoch: Epoch, most: Sequence[float]) -> None:
        """Take in the maxima of all ranks' figures; all ranks call it."""
        run, spent = self._run, max(time.monotonic() - self._began, 1e-9)
        *numbers, together, looked_at = most
        if run.folder is not None:
            self._content |= self._place(epoch)
            for at, known in enumerate(self._content["classes"].values()):
                steps, waited, excluded = numbers[3 * at : 3 * at + 3]
                # together: the shortest time in collectives, which a rank that waits for nobody spends there
                known |= {"steps_per_sec": steps / spent, "excluded_in_epoch": int(excluded),
                          "blocked_fraction": min(1.0, max(0.0, waited + together) / spent)}  # fmt: skip
            self._write(max(EVERY_SEC, SHARE * self._write_sec))
        self._record(bool(looked_at))

    def end_round(self) -> None:
        self._recorder.end_round()

    def _record(self, looked_at: bool) -> None:
        """Write what was recorded in the last segment, and record the next one if somebody looks."""
        run, folder = self._run, self._run.folder
        if self._recording:
            if run.watch.spans is self._recorder.spans:
                self._recorder.stop()
            write_trace(folder, run.comm, run.job.cluster, self._recorder, LIVE_TRACE)
            run.watch.skip()
            if folder is not None and self._recorder.spans:
                with suppress(OSError):
                    (folder.path / LOOK).unlink()
        self._recording = looked_at

    # ---- an epoch's end ---------------------------------------------------------------------------------------------

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Take in a row of ``metrics.jsonl``."""
        shown = {name: row[name] for name in row if name in ("train_loss", "samples_per_sec") or name.startswith(EVAL)}
        self._content |= shown | self._place()
        live = self._content["classes"]
        self._content["classes"] = {
            name: {**known, "steps_per_sec": live[name].get("steps_per_sec"),
                   "blocked_fraction": row["blocked_fraction"][name]} for name, known in self._classes().items()
        }  # fmt: skip
        self._write(max(EVERY_SEC, SHARE * self._write_sec))

    def _classes(self) -> dict[str, dict[str, Any]]:
        run = self._run
        excluded = run.accounts.by_class(run.accounts.excluded)
        return {c.name: {"ranks": list(c.ranks), "tau": c.tau, "batch_size": c.batch_size, "excluded": excluded[c.name],
                         "excluded_in_epoch": 0} for c in run.plan.classes}  # fmt: skip

    def _place(self, epoch: Epoch | None = None) -> dict[str, Any]:
        """Where the run is, in an epoch or between two."""
        run, done = self._run, self._run.accounts.done
        rounds = 0 if epoch is None else epoch.progress.averages
        fraction = self._fraction_done(rounds_of(epoch))
        return {"epoch": done.epochs, "round": done.rounds + rounds, "rounds_in_epoch": rounds,
                "rounds_per_epoch": (epoch or run).plan.rounds, "share_done": fraction,
                "wall_sec": time.perf_counter() - run.begin,
                "left_sec": self.left_sec(fraction),
                "checkpoint": self._checkpoint()}  # fmt: skip

    def left_sec(self, fraction: float | None = None) -> float | None:
        """Seconds to the end of the run, where so much of it is done, or as much as at the end of the last epoch."""
        fraction = self._fraction_done(0) if fraction is None else fraction
        return left_sec(time.monotonic() - self._start, self._start_fraction, fraction)

    def _checkpoint(self) -> dict[str, Any] | None:
        """The newest checkpoint and its age, without one that of the run; None where none is ever made."""
        saver = self._run.saver
        if saver is None or not saver.active:
            return None
        number = saver.saved_round
        return {"round": None if number == NONE else number, "age_sec": time.monotonic() - saver.saved_at}

    def _fraction_done(self, rounds: float) -> float:
        run = self._run
        return run_fraction(run.config.train, run.plan, run.done, rounds)

    def _write(self, least_sec: float = 0.0) -> None:
        """Write it, if the last time is so long ago."""
        folder, now = self._run.folder, time.monotonic()
        if folder is None or now < self._wrote + least_sec:
            return
        try:
            write_text(folder.path / STATUS, to_json(self._content | own_mark()))
        except OSError as error:
            if not self._has_warned:
                LOGGER.warning("%s cannot be written now: %s", STATUS, error.strerror)
            self._has_warned = True
        self._wrote = time.monotonic()
        self._write_sec = self._wrote - now


def rounds_of(epoch: Epoch | None) -> float:
    """Return the rounds that are done of an epoch under way, in rounds of the plan as it is now."""
    if epoch is None:
        return 0
    return epoch.plan.rounds - epoch.rounds_left if epoch.is_claimed else epoch.rounds_done
