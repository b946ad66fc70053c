"""What a trainer is made of, where a program's own loop has something else; and how it calls hooks of callbacks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from hvd_hetero.algorithms.execution.base import Executor
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.config.schema import Config
from hvd_hetero.data import Source, read
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.sampling import Sampler
from hvd_hetero.telemetry.run_folder import RunFolder
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.training.best import BestEvaluation
from hvd_hetero.training.checkpointer import Meetings, Saver
from hvd_hetero.training.startup import Job, make_worker
from hvd_hetero.worker.index_feed import Feed
from hvd_hetero.worker.memory import batch_that_fits, told_by_class
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
    saver: Meetings | None
    best: BestEvaluation
    folder: RunFolder | None
    evaluates = True
    _saved_round = -1

    def make_worker(self) -> Worker:
        return make_worker(self.job, self.watch, Worker)

    def make_saver(self) -> Meetings | None:
        if self.run_dir is None:
            return None
        quiesces = self.algorithm.policy.needs_quiesce
        return Saver(self.run_dir, self.config, self.job.env, self.comm, quiesces, self.best.by)

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

    def _memory_told(self) -> AbstractContextManager[None]:
        """What a class without enough memory for its steps ends with."""
        worker, name = self.worker, self.job.cluster.class_of(self.comm.rank).name
        batch_size = self.algorithm.policy.batch_size[name]

        def step(rows: Tensor) -> None:
            worker.try_gradient(*next(read(self.source, rows.view(1, -1), worker.generator)))

        return told_by_class(name, batch_size, lambda: batch_that_fits(step, worker.device, batch_size))

    def _call(self, hook: str, *args: Any) -> None:
        self.watch.heartbeat.begin(hook)
        self.job.components.callbacks.call(self.comm.rank, hook, *args)

    def _tell_saved(self, saver: Meetings) -> None:
        if saver.saved_round > self._saved_round:
            self._saved_round = saver.saved_round
            self._call("on_checkpoint", self._saved_round)
            self.watch.skip()  # it is no part of the next step
