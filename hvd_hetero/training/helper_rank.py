"""A rank that helps those that train: it evaluates their newest average, or scores samples with it (``role``).

A round of it is: ask rank 0 for a model, compute, send back what came of it. Whoever trains waits for none of these.
When the job ends it drops what it is doing, after the batch that it is at.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hvd_hetero import algorithms
from hvd_hetero.comm.async_ops import PEER_LOST
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.helper_channel import HelperLink, Scores, open_channel
from hvd_hetero.comm.model_bytes import from_bytes
from hvd_hetero.config.load import per_class
from hvd_hetero.config.schema import EVALUATE, SCORE
from hvd_hetero.data import Batch, read
from hvd_hetero.errors import EXIT_BAD_INPUT, EXIT_STOPPED, RankError, Stopped, UserError
from hvd_hetero.random_state import seed_all
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.training.evaluation import EVAL
from hvd_hetero.training.startup import Job, make_worker
from hvd_hetero.worker.memory import on_device
from hvd_hetero.worker.worker import Worker

SCORING_SEC = 0.5
"""Losses are sent, and a newer model is asked for, so often."""


class JobOver(Exception):
    """The job ends while a helper is at work."""


class HelperRank:
    """One helper's part of a job."""

    def __init__(self, job: Job) -> None:
        self._job, self._config = job, job.config
        self._mine, components, device = job.cluster.class_of(job.env.rank), job.components, job.placement.device
        evaluates = self._mine.role == EVALUATE
        data, name = (components.dataset.test, "test") if evaluates else (components.dataset.train, "training")
        self._source = on_device(data, device, name)
        self._worker = make_worker(job, Stopwatch(heartbeat=job.watchdog.heartbeat), Worker)
        seed_all(job.config.run.seed * 1000003 + job.env.rank)
        # all ranks of a job make the same process sets, those of others too
        samples, min_batch = len(components.dataset.train), components.min_batch
        groups = algorithms.policy(job.config, job.cluster, samples, min_batch).process_sets
        self.comm = Comm(job.cluster, job.env.rank, job.config.aggregation, self._worker.watch, groups)
        link = open_channel(self.comm, len({fact.host for fact in job.cluster.facts}))
        assert isinstance(link, HelperLink)
        self._link, self._work = link, self._evaluate if evaluates else self._score
        self._rows = self._deal()

    def run(self) -> None:
        """Help until the job ends.

        Raises:
            Stopped, UserError: as the ranks that train.
            RankError: of something that was given, this rank alone cannot use it.
        """
        try:
            while (packed := self._link.newest()) is not None:
                place, kinds = json.loads(packed[0])
                from_bytes(self._worker.state, kinds, packed[1])
                self._work(place)
        except JobOver:
            self._link.newest()  # which tells how
        except UserError as error:
            raise RankError(str(error)) from error
        if self._link.status == EXIT_STOPPED:
            raise Stopped(None)
        if self._link.status == EXIT_BAD_INPUT:
            raise UserError("rank 0 has said what is wrong")

    def _evaluate(self, place: dict[str, Any]) -> None:
        worker, every = self._worker, np.arange(len(self._source))
        worker.evaluate(self._source, every, self._config.eval.batch_size, self._unless_over)
        figures = {EVAL + name: value for one in worker.measures for name, value in one.figures().items()}
        place.pop("rounds")
        self._link.send_row({**place, **figures})

    def _score(self, place: dict[str, Any]) -> None:
        rows, losses, until = [], [], time.perf_counter() + SCORING_SEC
        while time.perf_counter() < until:
            rows.append(next(self._rows))
            batches = read(self._source, rows[-1][None], self._worker.generator)
            losses.append(self._worker.score(self._unless_over(batches)))
        indices = torch.from_numpy(np.concatenate(rows)).long()
        self._link.send_scores(Scores(place["epoch"], place["rounds"], indices, torch.cat(losses).float()))

    def _unless_over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Let batches through, as slowly as an emulated device would take them."""
        for batch in self._worker.emulator.steps(batches, sys.maxsize):
            if self._link.is_over:
                raise JobOver
            yield batch

    def _deal(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yield batches of this rank's part of all samples, again and again in another order."""
        job, cycle = self._job, 0
        scorers = [rank for c in job.cluster.helpers if c.role == SCORE for rank in c.ranks]
        names = [c.name for c in job.cluster.classes]
        size = max(per_class("train.batch_size", job.config.train.batch_size, names).values())
        while True:
            order = np.random.default_rng([job.config.run.seed, cycle]).permutation(len(self._source))
            mine = order[scorers.index(job.env.rank) :: len(scorers)]
            size = min(size, len(mine))
            yield from mine[: len(mine) // size * size].reshape(-1, size)
            cycle += 1

    def close(self) -> None:
        """Leave the job together with all other ranks."""
        self._link.close()
        self.comm.close()
        self._job.watchdog.stop()


def help_out(helper: HelperRank) -> None:
    """Help to the end of the job, and leave it with all others; where something fails, alone."""
    try:
        helper.run()
    except (RankError, *PEER_LOST):
        raise
    except (Stopped, UserError):
        helper.close()
        raise
    helper.close()
