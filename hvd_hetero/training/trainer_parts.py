"""What a trainer is made of, where a program's own loop has something else; and how it calls hooks of callbacks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hvd_hetero.algorithms.execution.base import Executor
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.config.schema import Config
from hvd_hetero.data import Source, read
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.sampling import Sampler
from hvd_hetero.planning.schedules import next_rate, round_factor, run_fraction
from hvd_hetero.planning.stop_criteria import RunProgress
from hvd_hetero.telemetry.run_folder import RunFolder
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.telemetry.time_accounts import Accounts
from hvd_hetero.training.best import BestEvaluation
from hvd_hetero.training.checkpointer import Saver, SyncDecision, SyncPoints
from hvd_hetero.training.helpers import Helpers, Place, place_in
from hvd_hetero.training.live_status import LiveStatus
from hvd_hetero.training.startup import Job, make_worker
from hvd_hetero.worker.components import as_user_error
from hvd_hetero.worker.epoch import Epoch, Segment
from hvd_hetero.worker.index_feed import Feed
from hvd_hetero.worker.memory import batch_that_fits, explain_out_of_memory
from hvd_hetero.worker.worker import Worker


class TrainerParts:
    """Makes the parts of a trainer, see :class:`hvd_hetero.training.trainer.Trainer`.

    Attributes:
        evaluates: there is a test set.
    """

    job: Job
    config: Config
    comm: Comm
    watch: Stopwatch
    run_dir: str | Path | None
    source: Source
    algorithm: Executor
    plan: Plan
    worker: Worker
    feed: Feed
    saver: SyncPoints | None
    best: BestEvaluation
    accounts: Accounts
    helpers: Helpers
    begin: float
    folder: RunFolder | None
    status: LiveStatus
    evaluates = True
    _saved_round = -1
    met = 0.0, 0.0  # rounds of the epoch under way when all ranks last met, and the seconds that it had taken

    def make_worker(self) -> Worker:
        return make_worker(self.job, self.watch, Worker)

    def make_saver(self) -> SyncPoints | None:
        if self.run_dir is None:
            return None
        quiesces = self.algorithm.policy.needs_quiesce
        env = replace(self.job.env, size=self.comm.size)  # helpers have nothing to be saved
        saver = Saver(self.run_dir, self.config, env, self.comm, quiesces, self.best.by)
        self.job.watchdog.last_act = saver.survive
        return saver

    def make_feed(self) -> Feed:
        sampler = self.make_sampler() if self.comm.rank == 0 else None
        return Feed(self.comm, len(self.source), sampler, self.config.sampling.is_weighted)

    @property
    def measured_source(self) -> Source:
        """What steps are taken on that are only measured."""
        return self.source

    def make_sampler(self) -> Sampler:
        spec, biased = self.config.sampling, self.plan.biased(self.config.sampling.bias_to)
        return Sampler.of(spec, len(self.source), biased, self.config.run.seed, self.job.components.weights)

    def _explain_out_of_memory(self) -> AbstractContextManager[None]:
        """What a class without enough memory for its steps ends with."""
        worker, name = self.worker, self.job.cluster.class_of(self.comm.rank).name
        batch_size = self.algorithm.policy.batch_size[name]

        def step(rows: Tensor) -> None:
            worker.try_gradient(*next(read(self.source, rows.view(1, -1), worker.generator)))

        return explain_out_of_memory(name, batch_size, lambda: batch_that_fits(step, worker.device, batch_size))

    # ---- in an epoch, and at its end --------------------------------------------------------------------------------

    def _by_rank(self, step_sec: Sequence[float]) -> list[float]:
        of_class = dict(zip((c.name for c in self.job.cluster.classes), step_sec, strict=True))
        return [of_class[self.job.cluster.class_of(rank).name] for rank in range(self.comm.size)]

    def _step_scheduler(self, after: str) -> None:
        name, what = type(self.worker.scheduler).__name__, f"fails after {after}"
        with as_user_error("train.scheduler", name, what, "let it last as long as the run"):
            self.worker.step_scheduler()

    @property
    def done(self) -> RunProgress:
        """What the run has done, with the pace of the epoch under way as all ranks know it."""
        return replace(self.accounts.done, epoch_rounds=self.met[0], epoch_sec=self.met[1])

    def _synchronize(self, epoch: Epoch, segment: Segment, saver: SyncPoints, length: int, before: int,
              step_sec: Sequence[float]) -> SyncDecision:  # fmt: skip
        """Agree with all ranks on a segment that has ended; where the run has had its time, the epoch ends with it."""
        progress, limit = epoch.finish(segment, self.algorithm.class_plan.tau), self.config.train.max_train_sec
        spent = self.watch.spent if self.comm.rank == 0 else 0.0
        left = math.inf if limit is None else limit - self.accounts.train_sec - spent
        with self.comm.timed():
            figures = [*self.status.figures(epoch, segment), spent]
            agreed = saver.agree(progress, length, before, step_sec, figures, left)
        self._tell_saved(saver)
        epoch.add(segment, agreed.progress)
        *figures, spent = agreed.figures
        self.status.meet(epoch, figures)
        if limit is not None and self.accounts.train_sec + spent >= limit and epoch.rounds_left:
            epoch.end_here()
        self.met = epoch.rounds_met, spent
        return agreed

    def _tell_rate(self) -> None:
        if self.algorithm.policy.follows_rate:
            rate = next_rate(self.config.train, self.plan, self.accounts.done, self.worker.rate)
            self.algorithm.policy.follow_rate(rate)

    def _start_round(self, segment: Segment, before: int, number: int) -> None:
        """Set number and learning rate of a round, which has this number in its segment, with ``before`` before it."""
        self.comm.excluded.round = before + number + 1
        rounds = segment.rounds_done(self.algorithm.class_plan.tau) + 0.5  # the middle of the one that begins
        factor = round_factor(self.config.train, self.plan, self.done, before + number + 1, rounds)
        if factor is not None:
            self.worker.scale_rate(factor)
        if self.config.aggregation.anneal_from is not None:
            self.algorithm.policy.fraction_done = run_fraction(self.config.train, self.plan, self.done, rounds)

    def _offer(self, offer: Callable[[int, Place], None], epoch: Epoch, rounds: int) -> None:
        """Let helpers have the model of an epoch under way, unless this rank has no part in it before its end."""
        if self.algorithm.class_plan.tau:
            number = self.accounts.rounds + rounds
            offer(number, lambda: place_in(epoch, self.accounts, self.watch, rounds, time.perf_counter() - self.begin))

    def _share_evaluations(self) -> None:
        """Take in what helpers have evaluated; all ranks that train call it."""
        for row in self.helpers.broadcast_evaluations():
            self.best.enter(row)
            self._call("on_evaluation", row)

    def _round_of(self, epoch: Epoch | None) -> int:
        """Return the rounds of the run so far, in an epoch under way or between two."""
        return self.accounts.rounds + (0 if epoch is None else epoch.progress.averages)

    def _call(self, hook: str, *args: Any) -> None:
        self.watch.heartbeat.begin(hook)
        self.job.components.callbacks.call(self.comm.rank, hook, *args)

    def _tell_saved(self, saver: SyncPoints) -> None:
        if saver.saved_round > self._saved_round:
            self._saved_round = saver.saved_round
            self._call("on_checkpoint", self._saved_round)
            self.watch.skip()  # it is no part of the next step
