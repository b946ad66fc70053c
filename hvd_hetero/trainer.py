"""The training loop: deal, run the rounds, record, evaluate, save. Knows no method by name."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_hetero import algorithms
from hvd_hetero.checkpoint import save_model
from hvd_hetero.cluster import has_bf16
from hvd_hetero.comm.horovod import Comm
from hvd_hetero.data import Batch
from hvd_hetero.delays import delays
from hvd_hetero.errors import ConfigError, UserError
from hvd_hetero.feed import Feed, Pass, Worked
from hvd_hetero.job import Job
from hvd_hetero.limits import check_limits, expected_passes, next_rounds
from hvd_hetero.metrics import Accounts, Progress, RunFolder
from hvd_hetero.output import note, write_start, write_summary, write_trace
from hvd_hetero.partial_counts import to_numbers
from hvd_hetero.passes import PassFigures, RoundLaps, say_taus
from hvd_hetero.plan import Plan, apportion
from hvd_hetero.profiles import known_speeds
from hvd_hetero.profiling import Measurement
from hvd_hetero.sampling import Sampler
from hvd_hetero.saving import Saver
from hvd_hetero.timing import KINDS, Stopwatch, own_clock
from hvd_hetero.trace import Recorder
from hvd_hetero.worker import Worker

TRACED_PASSES = 2
"""A pass's first rounds are recorded in place of the last pass's; the first pass warms up caches and connections."""


class Trainer:
    """Trains one job; every rank runs it.

    Args:
        run_dir: the run's folder, written by rank 0; None for no run, but measurements.
        found: what rank 0 has found to go on from, see :func:`hvd_hetero.saving.find`.
    """

    def __init__(self, job: Job, run_dir: str | Path | None, found: tuple[int, Any] | None = None) -> None:
        config, parts = job.config, job.components
        self.job, self.config = job, config
        slowdown = job.cluster.class_of(job.env.rank).slowdown
        clock = own_clock(job.placement.device, job.placement.threads)
        self.watch = Stopwatch(own_clock=clock if slowdown > 1 else None)
        self.source = parts.dataset.train.to(job.placement.device)
        self.test = parts.dataset.test.to(job.placement.device)
        self.worker = Worker(
            parts.model,
            parts.loss,
            parts.optimizer,
            parts.scheduler,
            device=job.placement.device,
            slowdown=slowdown,
            watch=self.watch,
            metric=parts.metric,
            seed=config.run.seed * 1000003 + job.env.rank,
            clip_norm=config.train.clip_norm,
            autocast=config.train.autocast == "bf16" and has_bf16(job.placement.device),
        )
        self.algorithm = algorithms.build(config, job.cluster, len(self.source))
        torch.manual_seed(config.run.seed * 1000003 + job.env.rank)  # dropout differs from rank to rank
        self.run_dir, self.found, self.folder = run_dir, found, None
        if run_dir is not None and job.env.rank == 0:
            kept = None if found is None else found[1]["rank0"]
            self.folder = RunFolder(run_dir, config.run.overwrite or config.run.resume is not None,
                                    *(kept and (kept["rows_bytes"], kept["samples_seen"]) or ()))
        self.comm = Comm(job.cluster, job.env.rank, config.aggregation.path)

    def prepare(self) -> None:
        """Starts all ranks from one model, measures their speeds if they are needed, and makes the plan.

        Raises:
            ConfigError: the measured speeds allow no plan; the same on all ranks.
        """
        self.begin, config = time.perf_counter(), self.config
        self.comm.broadcast_state(self.worker.state)
        state, self.saver = None, None
        if self.run_dir is not None:
            self.saver = Saver(self.run_dir, config.checkpoint, config.digest(how_long=False), self.comm)
            state = self.saver.load(None if self.found is None else self.found[0])
        self.plan = self._plan() if state is None else Plan.from_dict(state["plan"])
        check_limits(config.train, self.plan)
        self.comm.agree(self.plan.digest(), "plan", "plan")
        self.algorithm.start(self.plan, self.worker, self.comm)
        self.accounts = Accounts(self.job.cluster)
        self.best: dict[str, float | None] = dict.fromkeys(("final_accuracy", "best_accuracy", "final_loss"))
        self.feed = Feed(self.comm, len(self.source), self._sampler(self.plan) if self.comm.rank == 0 else None)
        if state is not None:
            self._restore(state)

    def run(self) -> dict[str, Any] | None:
        """Trains to the end; returns the summary on rank 0."""
        config, comm, worker, begin, plan = self.config, self.comm, self.worker, self.begin, self.plan
        feed, algorithm, accounts = self.feed, self.algorithm, self.accounts
        if self.folder is not None:
            write_start(self.folder, config, self.job.cluster, plan)
        expected = expected_passes(config.train, plan)
        progress = Progress(expected, self.job.env.columns, accounts.passes) if comm.rank == 0 else None
        recorder = Recorder(self.watch, config.run.trace_rounds)
        worker.pace.delays = delays(config.delays, comm.rank, comm.size, accounts.steps[comm.rank])
        rounds = next_rounds(config.train, plan, accounts.done)
        while rounds:
            part = replace(plan, rounds=rounds)
            self.watch.skip()
            if accounts.passes < TRACED_PASSES:
                recorder.start()
            rows = algorithm.deal(feed, part)
            self.watch.collective()
            begin_round = partial(self._warm_up, accounts.rounds)
            laps = RoundLaps(self.watch, recorder)
            worked = algorithm.run_pass(Pass(part, rows, self._read, begin_round, laps.end_round), worker, comm)
            recorder.stop()
            algorithm.end_pass(worker, comm)
            losses = worker.take_losses()
            if worked.at is None:
                feed.collect(part, losses)
            else:
                feed.collect_as_worked(worked, losses)
            self.watch.collective()
            done = self._account(accounts, part, worked, losses, laps.step_sec(worked, algorithm.mine.tau))
            number, rounds = accounts.passes, next_rounds(config.train, plan, accounts.done)
            if rounds:
                plan = self._replan(plan, done)
                rounds = next_rounds(config.train, plan, accounts.done)
            rate = worker.optimizer.param_groups[0]["lr"]
            worker.end_epoch()
            row: dict[str, Any] = {
                "pass": number,
                "round": accounts.rounds,
                "samples_seen": accounts.samples_seen,
                "wall_sec": time.perf_counter() - begin,
                "train_sec": accounts.train_sec,
                "train_loss": done.loss,
                "lr": rate,
                "batch_size": {c.name: c.batch_size for c in part.classes},
                "samples_per_sec": done.samples / done.seconds,
                "blocked_fraction": accounts.blocked_fractions(),
            }
            if (counts := algorithm.counts()) is not None:
                row["partial"] = accounts.partial.enter(comm.gather(to_numbers(counts), "pass.counts"))
            if number % config.eval.every_passes == 0 or rounds == 0:
                row |= self._evaluate(plan)
                note(self.best, row)
            if self.folder is not None and progress is not None:
                self.folder.row(row)
                progress.update(row, plan.fastest.name)
            if self.saver is not None and self.saver.due(ends=rounds == 0):
                self.saver.save(accounts.rounds, accounts.passes, self._state(plan))
        write_trace(self.folder, comm, self.job.cluster, recorder)
        if self.folder is None or progress is None:
            return None
        progress.close()
        save_model(self.folder.path, worker.model)
        return write_summary(self.folder, config, self.job.cluster, plan, accounts, self.best, begin)

    # ---- parts of a run ---------------------------------------------------------------------------------------------

    def _plan(self) -> Plan:
        cluster = self.job.cluster
        if not self.algorithm.needs_speeds:
            return self.algorithm.make_plan(None)
        if len(cluster.classes) == 1:
            return self.algorithm.make_plan({cluster.classes[0].name: 1.0})
        return self.algorithm.make_plan(self._known_speeds() or {
            name: found.step_sec for name, found in self.measurement().classes(self.algorithm.batch_size).items()
        })

    def measurement(self) -> Measurement:
        """What measures this job's speeds, before it trains."""
        spec = self.config.profile
        return Measurement(self.worker, self.source, self.job.cluster, self.comm, spec.seconds, spec.warmup_steps)

    def _known_speeds(self) -> dict[str, float] | None:
        """Step times of an earlier profile, found by rank 0; what is wrong with it ends all ranks."""
        names = [c.name for c in self.job.cluster.classes]
        told, error = [0.0] * len(names), UserError("rank 0 says why")
        if self.comm.rank == 0:
            try:
                known = known_speeds(self.config, self.job.cluster)
            except ConfigError as problem:
                told, error = [math.nan] * len(names), problem
            else:
                if known is not None:
                    told = [known[0][name] for name in names]
                    print(f"step times from {known[1]}; profile.reuse=false measures them", flush=True)
        said = self.comm.broadcast(torch.tensor(told, dtype=torch.float64), "profile.known").tolist()
        if math.isnan(said[0]):
            raise error
        return dict(zip(names, said, strict=True)) if all(said) else None

    def _sampler(self, plan: Plan) -> Sampler:
        spec = self.config.sampling
        biased = plan.biased(spec.bias_to)
        return Sampler(len(self.source), str(spec.scheme), spec.high_loss_ratio, biased, self.config.run.seed)

    def _read(self, rows: NDArray[Any]) -> Iterator[Batch]:
        return iter(self.source.batches(rows, self.worker.generator))

    def _warm_up(self, before: int, number: int) -> None:
        """Sets the learning rate of a round: so many in earlier passes, and its number in this one."""
        rounds = self.config.train.warmup_rounds
        if rounds:  # always: a late rank may skip the round with which the warm-up ends
            self.worker.warm_up(min(1.0, (before + number + 1) / rounds))

    def _replan(self, plan: Plan, done: PassFigures) -> Plan:
        new = self.algorithm.replan(done.step_sec)
        if new is not plan:
            self.comm.agree(new.digest(), "plan", "plan")
            if self.folder is not None:
                self.folder.write("plan.json", new.to_dict())
                say_taus(plan, new)
            if self.feed.sampler is not None:
                self.feed.sampler.biased = new.biased(self.config.sampling.bias_to)
        return new

    def _account(
        self, accounts: Accounts, plan: Plan, worked: Worked, losses: torch.Tensor, step_sec: float
    ) -> PassFigures:
        """Gathers what all ranks did in this pass, and where their time went."""
        kinds, collectives = self.watch.take()
        loss = float(losses.double().sum())
        figures = [*(kinds[kind] for kind in KINDS), loss, worked.steps, step_sec, *collectives]
        rows = [row.tolist() for row in self.comm.gather(torch.tensor(figures, dtype=torch.float64), "pass.times")]
        count = len(KINDS)
        steps = [int(row[count + 1]) for row in rows]
        spent = [dict(zip(KINDS, row, strict=False)) for row in rows]
        before = accounts.samples_seen
        seconds = accounts.enter(plan, worked.rounds, steps, spent, [row[count + 3 :] for row in rows])
        samples = accounts.samples_seen - before
        return PassFigures(seconds, samples, sum(row[count] for row in rows) / samples, [r[count + 2] for r in rows])

    def _evaluate(self, plan: Plan) -> dict[str, float | None]:
        """Every rank evaluates a part of the test set in proportion to its speed, so that all end together."""
        ranks = plan.by_rank()
        counts = apportion(len(self.test), [c.speed for c in ranks])
        start = sum(counts[: self.comm.rank])
        indices = np.arange(start, start + counts[self.comm.rank])
        sums = self.worker.evaluate(self.test, indices, self.config.eval.batch_size)
        loss, metric = self.comm.sum(sums, "evaluation")
        name = "eval_accuracy" if self.config.eval.metric == "accuracy" else "eval_metric"
        figures: dict[str, float | None] = {"eval_loss": loss / len(self.test)}
        return figures | ({name: metric / len(self.test)} if self.job.components.metric is not None else {})

    def _state(self, plan: Plan) -> dict[str, Any]:
        """Everything that decides how this rank goes on, between two passes."""
        state: dict[str, Any] = {
            "worker": self.worker.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "plan": plan.to_dict(),
            "accounts": self.accounts.state_dict(),
            "best": self.best,
            "wall_sec": time.perf_counter() - self.begin,
        }
        if self.folder is not None and self.feed.sampler is not None:
            kept = {"rows_bytes": self.folder.rows_bytes, "samples_seen": self.accounts.samples_seen}
            state["rank0"] = {**kept, "sampler": self.feed.sampler.state_dict()}
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.worker.load_state_dict(state["worker"])
        self.algorithm.load_state_dict(state["algorithm"])
        self.accounts.load_state_dict(state["accounts"])
        self.best = state["best"]
        self.begin -= state["wall_sec"]
        if self.feed.sampler is not None:
            self.feed.sampler.load_state_dict(state["rank0"]["sampler"])
            print(f"goes on after pass {self.accounts.passes}, round {self.accounts.rounds}", flush=True)

    def close(self) -> None:
        """Leaves the job together with all other ranks."""
        self.algorithm.close()
        self.comm.close()

    def abandon(self) -> None:
        """Ends what runs in the background, when this rank leaves alone."""
        self.algorithm.close()
