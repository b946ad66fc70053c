"""What the local-SGD methods share: tau_g local steps of every rank, then the weighted average of all models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from warnings import warn

from hvd_hetero.algorithms.base import Algorithm
from hvd_hetero.algorithms.delayed_averaging import Delayed, check_delayed
from hvd_hetero.algorithms.optimizer_average import OptimizerAverage
from hvd_hetero.algorithms.outer_optimizer import Outer
from hvd_hetero.algorithms.partial_averaging import PartialModelAveraging, check_merging
from hvd_hetero.comm.averaging import average, average_others
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.config.load import per_class
from hvd_hetero.data import Batch
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.local_steps import (
    ERROR,
    LEAVE_OUT,
    SHRINK,
    WAIT_AVOIDING,
    derive_tau,
    shrink_batches,
    too_slow_classes,
)
from hvd_hetero.planning.plan import Plan, check_least_round, make_plan
from hvd_hetero.planning.rebalance import Rebalancer
from hvd_hetero.telemetry.staleness import Counts
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker

BLOCKING = "blocking"
EFFECT = {
    SHRINK: "its batch is smaller, so that it finishes a step in a round (cluster.too_slow=shrink_batch)",
    WAIT_AVOIDING: "nobody waits for it, aggregation.mode is solo (cluster.too_slow=wait_avoiding)",
    LEAVE_OUT: "it is left out (cluster.too_slow=leave_out)",
}


class LocalSGD(Algorithm):
    """x_i = tau_g(i) local steps from x; x = sum_i w_i x_i; then the outer optimizer, if there is one.

    The optimizer's own state (momentum) stays each rank's own, is averaged with the models, or starts anew after every
    average: ``aggregation.optimizer_state: local | average | reset``. With ``aggregation.mode: solo | majority`` no
    class waits for another one: see :mod:`hvd_hetero.algorithms.partial_averaging`. A rank with non-finite values
    is left out of the average, goes on from it, and forgets its optimizer's state.
    """

    merging: PartialModelAveraging | None = None
    delayed: Delayed | None = None

    @property
    def needs_speeds(self) -> bool:
        return not isinstance(self.train.tau, Mapping)

    @property
    def averages(self) -> bool:
        return str(self.aggregation.mode) == BLOCKING

    @property
    def needs_quiesce(self) -> bool:
        return self.aggregation.mode != BLOCKING or self.too_slow == WAIT_AVOIDING or self.aggregation.delayed

    @property
    def follows_plan(self) -> bool:
        return self.merging is None

    def check(self) -> None:
        super().check()
        if self.aggregation.outer_nesterov and self.aggregation.outer_momentum == 0:
            remedy = "set aggregation.outer_momentum too"
            raise ConfigError("aggregation.outer_nesterov", True, "needs momentum", remedy)
        if self.aggregation.delayed:
            check_delayed(self.aggregation, self.too_slow if self.needs_speeds else ERROR)
        blocking = self.aggregation.mode == BLOCKING
        if not blocking or (self.needs_speeds and self.too_slow == WAIT_AVOIDING and self.cluster.size > 1):
            check_merging(self.aggregation, self.cluster)
        if not blocking and self.needs_speeds and self.too_slow == LEAVE_OUT:
            problem = f"aggregation.mode={self.aggregation.mode} goes on without late classes already"
            raise ConfigError("cluster.too_slow", LEAVE_OUT, problem, "set cluster.too_slow=wait_avoiding")
        if self.needs_speeds and (self.too_slow, self.aggregation.optimizer_state) == (LEAVE_OUT, "average"):
            problem = "a class that is left out has no optimizer state to be averaged"
            raise ConfigError("cluster.too_slow", LEAVE_OUT, problem, "set aggregation.optimizer_state=local or reset")
        if self.needs_speeds:
            check_least_round(self.cluster, self.samples, self.train.tau, self.batch_size, self.train.epoch_length)

    def taus(self, step_sec: Mapping[str, float] | None) -> dict[str, int]:
        """Local steps by class: as set, or derived from the fastest class's tau and the measured step times."""
        if isinstance(self.train.tau, Mapping):
            return per_class("train.tau", self.train.tau, [c.name for c in self.cluster.classes])
        assert step_sec is not None
        return derive_tau(self.train.tau, step_sec, self.too_slow, self._margin(step_sec))

    def waits(self, step_sec: Mapping[str, float]) -> bool:
        solo = self.needs_speeds and self.too_slow == WAIT_AVOIDING and too_slow_classes(self.train.tau, step_sec)
        return self.aggregation.mode == BLOCKING and self.merging is None and not solo

    def _margin(self, step_sec: Mapping[str, float]) -> float:
        """None where nobody waits for a late class: one that is early would end the epoch early, for all."""
        return self.train.tau_margin if self.waits(step_sec) else 0.0

    def make_plan(self, step_sec: Mapping[str, float] | None) -> Plan:
        batch = self.batch_size
        if step_sec is not None and self.needs_speeds and self.too_slow == SHRINK:
            batch = shrink_batches(self.train.tau, step_sec, batch, self._margin(step_sec), self.min_batch)
            step_sec = {name: sec * batch[name] / self.batch_size[name] for name, sec in step_sec.items()}
        return make_plan(
            self.cluster,
            self.samples,
            self.taus(step_sec),
            batch,
            weights=str(self.aggregation.weights),
            epoch_length=self.train.epoch_length,
            step_sec=step_sec,
            whole_batch=self.batch_size,
        )

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        spec = self.aggregation
        trained = [p for p in worker.model.parameters() if p.requires_grad]
        self.optimizer_average = OptimizerAverage(trained, comm)
        self.outer = Outer(worker.state, spec.outer_lr, spec.outer_momentum, spec.outer_nesterov)
        measured = {
            c.name: c.step_sec * self.batch_size[c.name] / c.batch_size for c in plan.classes if c.step_sec is not None
        }
        late = too_slow_classes(self.train.tau, measured) if self.needs_speeds and measured else {}
        for name, times in late.items():
            warn(f"class {name} is {times:.1f} times slower: {EFFECT[self.too_slow]}", stacklevel=2)
        solo = spec if spec.mode != BLOCKING else replace(spec, mode="solo")
        self._merge = lambda: PartialModelAveraging(worker, comm, self.cluster, solo, self.outer, self.seed)
        if spec.mode != BLOCKING or (late and self.too_slow == WAIT_AVOIDING):
            self.merging = self._merge()
        elif spec.delayed:
            self.delayed = Delayed(worker, comm)
        adapts = self.train.adapt_tau and self.needs_speeds and len(measured) > 1
        self.rebalancer = Rebalancer(measured, self.batch_size, self._margin(measured)) if adapts else None

    def replan(self, step_sec: Sequence[float]) -> Plan:
        """Derives tau anew from the epoch's own step times, where that leaves clearly less of the cluster waiting."""
        if self.rebalancer is None:
            return self.plan
        slowest = {c: max(step_sec[r] for r in c.ranks) for c in self.plan.training}
        worked = {c: sec for c, sec in slowest.items() if not math.isnan(sec)}
        epoch_sec = self.plan.rounds * min((c.tau * sec for c, sec in worked.items()), default=0.0)
        whole = {c.name: sec * self.batch_size[c.name] / c.batch_size for c, sec in worked.items()}
        if not self.rebalancer.observe(whole, epoch_sec):
            return self.plan
        judge = self.rebalancer
        for times, is_gain in ((judge.latest, judge.is_obvious_gain), (judge.step_sec, judge.is_worth_it)):
            try:
                proposed = self.make_plan(times)
            except ConfigError:  # a class is too slow for one step now, or a round too large: the old plan still works
                continue
            if len(proposed.training) < len(self.plan.training):
                continue  # a class that is left out is measured no more, and could never come back
            saved = self.rebalancer.capacity_saved(self.plan, proposed, times)
            if is_gain(self.plan, proposed):
                self.reason = f"{saved:.1%} of what all can do would wait no more"
                self.follow(proposed)
                break
        return self.plan

    def run_segment(self, segment: Segment, worker: Worker, comm: Comm) -> None:
        if self.merging is not None:
            part = self.mine.batch_size / self.batch_size[self.mine.name]  # of a step, where the batch is shrunk
            self.merging.run_segment(segment, worker, self.mine.tau, part)
            return
        super().run_segment(segment, worker, comm)
        if self.delayed is not None:
            self.delayed.settle()
            self._average(worker, comm)

    def end_epoch(self, worker: Worker, comm: Comm) -> None:
        average_others(comm, worker.state, self.mine.weight, only_new=self.merging is None)

    def counts(self) -> Counts | None:
        return None if self.merging is None else self.merging.counts()

    def close(self) -> None:
        for running in (self.merging, self.delayed):
            if running is not None:
                running.close()

    def run_round(self, worker: Worker, batches: Iterator[Batch], comm: Comm) -> None:
        self.outer.remember()
        worker.local_steps(batches, self.mine.tau)
        if self.delayed is None:
            self._average(worker, comm)
            return
        self.delayed.settle()
        self.delayed.begin(self.mine.weight)
        if self.aggregation.optimizer_state == "reset":
            worker.optimizer.state.clear()

    def _average(self, worker: Worker, comm: Comm) -> None:
        """Averages the models that are here now, and takes the outer step."""
        worker.rest()
        good, kept = average(comm, worker.state, self.mine.weight), self.aggregation.optimizer_state
        if kept == "average":
            self.optimizer_average.average(worker.optimizer, self.mine.weight, good)
        if kept == "reset" or (kept == "local" and not good):
            worker.optimizer.state.clear()
        self.outer.step()

    def state_dict(self) -> dict[str, Any]:
        merged = {} if self.merging is None else {"round": self.merging.version}
        paced = {} if self.rebalancer is None else {"rebalancer": self.rebalancer.state_dict()}
        return {**self.outer.state_dict(), **merged, **paced}

    def carry_over(self, state: Mapping[str, Any]) -> None:
        self.outer.carry_over(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.outer.load_state_dict(state)
        if self.rebalancer is not None:
            self.rebalancer.load_state_dict(state["rebalancer"])
        if "round" in state and self.merging is None:  # it was decided by the speeds at the job's start, and stays
            self.merging = self._merge()
        if "round" not in state and self.merging is not None:
            self.merging.close()
            self.merging = None
        if self.merging is not None:
            self.merging.go_on_from(int(state["round"]))
