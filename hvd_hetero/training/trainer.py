"""The training loop: deal, run the rounds, record, evaluate, save. Knows no method by name."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hvd_hetero import algorithms
from hvd_hetero.checkpoint.export import AVERAGED, MODEL
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.errors import Stopped
from hvd_hetero.planning.injected_delays import delays
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.schedules import run_fraction
from hvd_hetero.planning.stop_criteria import check_limits, expected_epochs, fast_steps, next_rounds
from hvd_hetero.random_state import seed_all
from hvd_hetero.telemetry.callbacks import Started
from hvd_hetero.telemetry.emulation import thread_cpu_clock
from hvd_hetero.telemetry.progress import Progress
from hvd_hetero.telemetry.run_folder import RunFolder
from hvd_hetero.telemetry.run_status import EVALUATING, FAILED, FINISHED, STOPPED, TRAINING
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.telemetry.time_accounts import Accounts
from hvd_hetero.telemetry.trace import Recorder
from hvd_hetero.training.best import BestEvaluation
from hvd_hetero.training.checkpointer import SyncDecision
from hvd_hetero.training.epoch import RoundSpans, gather_figures, gather_peaks, rest_plan, say_taus
from hvd_hetero.training.evaluation import evaluate
from hvd_hetero.training.helpers import Helpers, place_after
from hvd_hetero.training.initial_plan import choose_micro_batches, first_plan, share_model, share_result, start_together
from hvd_hetero.training.iterate_average import NONE, IterateAverage, half_life
from hvd_hetero.training.live_status import LiveStatus
from hvd_hetero.training.reshape import carry_over
from hvd_hetero.training.restore import restore, state_of
from hvd_hetero.training.resume import Found, check_fits, check_places, known_plan
from hvd_hetero.training.run_records import write_model, write_start, write_summary, write_trace
from hvd_hetero.training.startup import Job
from hvd_hetero.training.trainer_parts import TrainerParts
from hvd_hetero.worker.epoch import Epoch, Segment
from hvd_hetero.worker.memory import on_device, used_bytes
from hvd_hetero.worker.step_benchmark import warm_up

TRACED_EPOCHS = 2
"""An epoch's first rounds are recorded in place of the last epoch's; the first epoch warms up caches and
connections."""


class Trainer(TrainerParts):
    """Trains one job; every rank runs it.

    Args:
        run_dir: the run's folder, written by rank 0; None for no run, but measurements.
        found: what rank 0 has found to go on from, see :func:`hvd_hetero.training.resume.find`.

    Attributes:
        kept: what a program adds to this rank's state, by name.
        saved: where the weights are, on rank 0 at the end.
    """

    def __init__(self, job: Job, run_dir: str | Path | None, found: Found | None = None) -> None:
        config, components = job.config, job.components
        self.job, self.config = job, config
        slowdown = job.cluster.class_of(job.env.rank).slowdown
        clock = thread_cpu_clock(job.placement.device, job.placement.threads)
        self.watch = Stopwatch(thread_cpu_clock=clock if slowdown > 1 else None, heartbeat=job.watchdog.heartbeat)
        self.source = on_device(components.dataset.train, job.placement.device, "training")
        self.test = on_device(components.dataset.test, job.placement.device, "test")
        self.worker = self.make_worker()
        self.algorithm = algorithms.build(config, job.cluster, len(self.source), components.min_batch)
        seed_all(config.run.seed * 1000003 + job.env.rank)  # dropout differs from rank to rank
        self.run_dir, self.found, self.folder = run_dir, found, None
        if run_dir is not None and job.env.rank == 0:
            kept = None if found is None else found.state["rank0"]["rows_bytes"]
            kept = (kept, 0) if isinstance(kept, int) else kept  # of a checkpoint from before there were two files
            self.folder = RunFolder(run_dir, config.run.overwrite or config.run.resume is not None, kept)
        self.comm = Comm(job.cluster, job.env.rank, config.aggregation, self.watch, self.algorithm.policy.process_sets)
        share_model(self.worker, self.comm)
        self.accounts = Accounts(job.cluster, config.delays.distribution is not None)
        self.helpers = Helpers(job.cluster, self.comm, self.worker, self.algorithm.policy, self.folder)
        self.kept: dict[str, Any] = {}
        self._closed = False
        self.status = LiveStatus(self)

    def prepare(self) -> None:
        """Measures the ranks' speeds if they are needed, and makes the plan.

        Raises:
            ConfigError: the measured speeds allow no plan; the same on all ranks.
        """
        self.begin, config = time.perf_counter(), self.config
        state, reshaped = None, False
        self.best = BestEvaluation(config.eval.best, self.job.components.metrics, config.train.patience)
        self.saver = self.make_saver()
        if self.saver is not None:
            state, reshaped = self.saver.load(self.found, self.job.cluster)
        known = None
        if state is not None and reshaped:
            check_fits(state, self.worker)
            self.worker.carry_over(state["worker"])
            known = known_plan(state, self.job.cluster)
        if state is not None and not reshaped:
            check_places(state, self.job.cluster)
            known = Plan.from_dict(state["plan"])
            self.worker.micro_batches = state["worker"].get("micro_batches", 1)
        if state is not None and known is not None:
            self.comm.set_path(state["path"])
        with self._explain_out_of_memory():
            policy, measured = self.algorithm.policy, self.measured_source
            if known is None or reshaped:
                choose_micro_batches(self.job, policy, self.worker, measured, self.comm)
            self.plan = known or first_plan(self.job, policy, self.worker, measured, self.comm)
            warm_up(self.worker, measured, self.plan.of_rank(self.comm.rank).batch_size)
        check_limits(config.train, self.plan)
        self.comm.agree(self.plan.digest(), "plan", "plan")
        start_together(self.algorithm, self.plan, self.worker, self.comm)
        self.feed = self.make_feed()
        self.recorder = Recorder(self.watch, config.run.trace_rounds)
        spec = config.eval
        self.averaged = None if spec.average == NONE else IterateAverage(
            spec.average, self.worker.state, half_life(spec, config.train, self.plan), spec.last)  # fmt: skip
        self.epoch: Epoch | None = None
        self.comm.traffic.pop()  # what was only measured
        self._tell_rate()
        if state is not None:
            (carry_over if reshaped else restore)(self, state)

    def run(self) -> dict[str, Any] | None:
        """Trains to the end; returns the summary on rank 0.

        Raises:
            Stopped: on all ranks, after saving, where one was asked to.
        """
        config, comm, accounts = self.config, self.comm, self.accounts
        if self.folder is not None:
            write_start(self.folder, config, self.job.cluster, self.plan)
        folder = None if self.folder is None else self.folder.path
        sections = dataclasses.asdict(config)
        self._call("on_start", Started(sections, comm.rank, comm.size, self.worker.model, folder, accounts.epochs,
                                       accounts.samples_seen))  # fmt: skip
        expected = expected_epochs(config.train, self.plan)
        self.progress = None if self.folder is None else Progress(expected, self.job.env.columns, accounts.epochs)
        before = accounts.steps[comm.rank] + (0 if self.epoch is None else self.epoch.steps)
        self.worker.emulator.delays = delays(config.delays, comm.rank, comm.size, before)
        self.status.begin()
        self._saved_round = -1 if self.saver is None else self.saver.saved_round
        self.watch.skip()
        with nullcontext() if self.saver is None or not self.saver.active else self.saver.stopping:
            while (epoch := self.epoch or self._begin_epoch()) is not None:
                agreed = self._work(epoch)
                row = self._end_epoch(epoch, agreed)
                if self.saver is not None and self.saver.active and (self.over or agreed.due or agreed.stop):
                    self._save(None, wait=self.over or agreed.stop, row=row)
                elif agreed.keep:
                    self._keep(None)
                if agreed.stop and not self.over:
                    raise self._stopped()
            if self.folder is not None and self.saver is not None:
                self.saver.stopping.forget()
        write_trace(self.folder, comm, self.job.cluster, self.recorder)
        share_result(self.worker, comm, self.plan)
        cluster, path = self.job.cluster, comm.path
        peaks = gather_peaks(comm, self.worker, cluster)
        if self.averaged is not None:
            with self.averaged.in_place(comm):
                write_model(self.folder, self.worker.model, AVERAGED)
        if self.folder is None or self.progress is None:
            self._call("on_end", None)
            return None
        self.progress.close()
        self.best.log_end()
        self.saved = write_model(self.folder, self.worker.model, MODEL)
        classes = [{**figures, **more} for figures, more in zip(accounts.classes(self.plan), peaks, strict=True)]
        best = self.best.summary()
        summary = write_summary(self.folder, config, cluster, self.plan, classes, accounts, path, best, self.begin)
        self.status.enter(FINISHED)
        self._call("on_end", summary)
        return summary

    # ---- an epoch ---------------------------------------------------------------------------------------------------

    def _begin_epoch(self) -> Epoch | None:
        """Deal the next epoch, if there is one."""
        rounds = next_rounds(self.config.train, self.plan, self.accounts.done)
        if rounds == 0 or self.best.waited_enough:
            return None
        self.watch.skip()
        self.status.enter(TRAINING)
        if self.accounts.epochs < TRACED_EPOCHS:
            self.recorder.start()
        self.watch.heartbeat.begin("dealing samples")
        if self.feed.sampler is not None:
            self.feed.sampler.fraction_done = run_fraction(self.config.train, self.plan, self.accounts.done, 0.0)
        full = self.feed.begin_epoch(self.plan)
        part = replace(full, rounds=min(rounds, full.rounds))
        indices = self.algorithm.deal(self.feed, part, full)
        return Epoch(part, indices, self.source, self.worker.generator, self.feed.weights_of(indices))

    def _work(self, epoch: Epoch) -> SyncDecision:
        """Train an epoch in segments, between which it can be saved; return what was agreed after the last."""
        spans = RoundSpans(self.watch, self.recorder, epoch.work_sec)
        rebalances, work = self.algorithm.policy.rebalances, epoch.work_sec
        meets = rebalances or {self.config.train.max_train_sec, self.config.checkpoint.memory_sec} != {None}
        saver = self.saver if self.saver is not None and (self.saver.active or meets) else None
        classes = [c.name for c in self.job.cluster.classes]
        own_class = classes.index(self.job.cluster.class_of(self.comm.rank).name)
        while True:
            left, before, first = epoch.rounds_left, self.accounts.rounds + epoch.progress.averages, len(work)
            length = left if saver is None else saver.segment(left, before)
            is_stopping = (lambda: False) if saver is None else saver.stopping
            segment = Segment(epoch, length, is_stopping)
            segment.start_round = partial(self._start_round, segment, before)
            segment.finish_round = partial(self._finish_round, spans, epoch)
            self.status.start_segment()
            with self._explain_out_of_memory():
                self.algorithm.run_segment(segment)
            if saver is None:
                progress = epoch.finish(segment, self.algorithm.class_plan.tau)
                epoch.add(segment, progress)
                return SyncDecision(progress, False, False)
            step_sec = [0.0] * len(classes) if rebalances else []
            if rebalances and segment.at:
                step_sec[own_class] = sum(work[first:]) / len(segment.at)
            agreed = self._synchronize(epoch, segment, saver, length, before, step_sec)
            self._offer(self.helpers.offer, epoch, epoch.progress.averages)
            self.helpers.receive()
            if epoch.rounds_left == 0 or (length >= left and not agreed.stop):
                return agreed
            if rebalances:
                self._rebalance(epoch, agreed)
                if epoch.rounds_left == 0:  # less than a round of the new plan was left
                    return replace(agreed, step_sec=())
            if agreed.due or agreed.stop:
                self._save(epoch, wait=agreed.stop)
            elif agreed.keep:
                self._keep(epoch)
            if agreed.stop:
                raise self._stopped()

    def _rebalance(self, epoch: Epoch, agreed: SyncDecision) -> None:
        """Deal what is left of an epoch anew, where a segment's step times ask for another plan."""
        old, self.plan = self.plan, self._replan(self.plan, self._by_rank(agreed.step_sec), agreed.rounds)
        if self.plan is old:
            return
        part = rest_plan(self.config, epoch, self.plan, len(self.source), self.accounts.done)
        self.watch.skip()
        self.watch.heartbeat.begin("dealing samples")
        rest = self.feed.deal_rest(part, epoch.indices, epoch.steps) if part.rounds else epoch.indices[:0]
        epoch.deal_rest(part, rest, self.feed.weights_of(rest))
        self.met = epoch.rounds_met, self.met[1]

    def _end_epoch(self, epoch: Epoch, agreed: SyncDecision) -> dict[str, Any]:
        """Gather what the epoch came to, plan the next one, evaluate; return the row of figures."""
        config, comm, worker, accounts = self.config, self.comm, self.worker, self.accounts
        self.recorder.stop()
        self.watch.heartbeat.begin("end of an epoch")
        self.epoch, plan, is_planned = None, epoch.plan, self.algorithm.policy.follows_plan
        as_dealt = is_planned and not epoch.since
        shapes = [(plan.rounds * c.tau, c.batch_size) for c in plan.by_rank()] if as_dealt else None
        worker.check_learning()
        with comm.timed():
            self.algorithm.end_epoch()
            losses, weights = worker.pop_losses()
            self.feed.collect(*epoch.results(), losses, shapes, self.helpers.pop_scores(accounts.epochs + 1))
        if self.averaged is not None and comm.rank == 0:
            self.averaged.end_epoch()
        spans = RoundSpans(self.watch, self.recorder, epoch.work_sec)
        step_sec = spans.step_sec(epoch, self.algorithm.class_plan.tau, is_planned)
        excluded, counts = epoch.count(comm.excluded.pop(), self.algorithm.counts())
        done = gather_figures(comm, self.watch, accounts, epoch, losses, weights, step_sec, {
            "excluded": excluded, "sent": comm.traffic.pop(), "dropped": self.algorithm.pop_dropped(),
            "overflows": 0 if worker.scaler is None else worker.scaler.overflows, "memory": used_bytes(worker.device),
        })  # fmt: skip
        self.met = 0.0, 0.0
        self.algorithm.policy.note_average(done.average_sec)
        self._share_evaluations()
        self.helpers.offer(accounts.rounds, lambda: place_after(accounts, time.perf_counter() - self.begin))
        rate = float(worker.optimizer.param_groups[0]["lr"])
        if config.train.scheduler_unit == "epoch":
            self._step_scheduler(f"{accounts.epochs} epochs")
        if not self.over:
            self._tell_rate()
            lately = (self._by_rank(agreed.step_sec), agreed.rounds) if agreed.step_sec else (done.step_sec,)
            self.plan = self._replan(self.plan, *lately)
        row = accounts.row(plan)
        row |= {"wall_sec": time.perf_counter() - self.begin, "train_loss": done.loss, "lr": rate,
                "samples_per_sec": done.samples / done.seconds,
                "left_sec": 0.0 if self.over else self.status.left_sec()}  # fmt: skip
        if counts is not None:
            row["partial"] = accounts.partial.enter(comm.gather(counts, "epoch.counts"))
        is_due = accounts.epochs % config.eval.every_epochs == 0 and not self.helpers.evaluate
        if self.evaluates and (is_due or self.over):
            self.status.enter(EVALUATING)
            row |= evaluate(comm, worker, self.test, self.plan, config.eval, self.averaged,
                            self.algorithm.averaged_ranks)  # fmt: skip
            self.best.enter(row)
            self._call("on_evaluation", row)
        self._call("on_epoch_end", row)
        if self.folder is not None and self.progress is not None:
            self.folder.row(row)
            self.status.end_epoch(row)
            self.progress.update(row, self.plan.fastest.name)
        return row

    # ---- parts of a run ---------------------------------------------------------------------------------------------

    def _finish_round(self, spans: RoundSpans, epoch: Epoch) -> None:
        spans.end_round()
        self._offer(self.helpers.end_round, epoch, self.comm.excluded.round - self.accounts.rounds)
        self.status.end_round()
        if self.averaged is not None and self.comm.rank == 0:
            self.averaged.end_round(fast_steps(self.plan))
        if self.config.train.scheduler_unit == "round":
            self._step_scheduler(f"{self.comm.excluded.round} rounds")

    def _replan(self, plan: Plan, step_sec: Sequence[float], rounds: int | None = None) -> Plan:
        new = self.algorithm.replan(step_sec, rounds)
        if new is not plan:
            self.comm.agree(new.digest(), "plan", "plan")
            if self.folder is not None:
                self.folder.write("plan.json", new.to_dict())
                say_taus(plan, new, self.algorithm.policy.reason)
            if self.feed.sampler is not None:
                self.feed.sampler.biased = new.biased(self.config.sampling.bias_to)
        return new

    # ---- saving and the end -----------------------------------------------------------------------------------------

    def _save(self, epoch: Epoch | None, wait: bool, row: Mapping[str, Any] | None = None) -> None:
        assert self.saver is not None
        if epoch is not None:
            self._share_evaluations()
        self.watch.heartbeat.begin("checkpoint")
        score = self.best.score(row or {})
        self.saver.save(self._round_of(epoch), self.accounts.epochs, lambda: state_of(self, epoch), wait, score)
        self._tell_saved(self.saver)
        self.watch.skip()

    def _keep(self, epoch: Epoch | None) -> None:
        assert self.saver is not None
        if epoch is not None:
            self._share_evaluations()
        self.saver.keep(self._round_of(epoch), lambda: state_of(self, epoch))
        self.watch.skip()

    def _stopped(self) -> Stopped:
        assert self.saver is not None
        if self.folder is not None and self.progress is not None:
            self.progress.close()
            self.folder.close()
            self.saver.stopping.forget()
            self.status.enter(STOPPED)
        return Stopped(self.saver.newest())

    @property
    def over(self) -> bool:
        """Whether the run has come to its end, between two epochs."""
        nothing_left = next_rounds(self.config.train, self.plan, self.accounts.done) == 0
        return self.epoch is None and (nothing_left or self.best.waited_enough)

    def close(self, status: int = 0) -> None:
        """Leaves the job together with all other ranks; nothing happens the second time.

        Args:
            status: with which it ends.
        """
        if self._closed:
            return
        self._closed = True
        self.status.enter(FAILED)  # unless it has ended otherwise
        self.algorithm.close()
        self.helpers.finish(status)
        if self.folder is not None:
            self.folder.close()
        self.comm.close()
        self.helpers.close()
        self.job.watchdog.stop()

    def abandon(self, saves: bool, survives: bool) -> None:
        """Ends what runs in the background, when this rank leaves alone.

        Args:
            saves: a checkpoint that is on its way may come to its end first.
            survives: what the rank remembers of its last rounds is worth saving.
        """
        if survives and self.saver is not None:
            self.saver.survive()
        if saves and self.saver is not None:
            self.watch.heartbeat.begin("checkpoint")
            self.saver.abandon()
        self.status.enter(FAILED)
        self.algorithm.close()
