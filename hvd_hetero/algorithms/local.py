"""What the local-SGD methods share: tau_g local steps of every rank, then the weighted average of all models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from hvd_hetero.algorithms.base import Algorithm
from hvd_hetero.algorithms.merging import Merging, check_merging
from hvd_hetero.algorithms.outer import Outer, average_optimizer
from hvd_hetero.comm.horovod import Comm
from hvd_hetero.comm.partial import Counts
from hvd_hetero.config import per_class
from hvd_hetero.data import Batch
from hvd_hetero.errors import ConfigError
from hvd_hetero.feed import Pass, Worked
from hvd_hetero.pacing import Pacing
from hvd_hetero.plan import Plan, check_least_round, derive_tau, make_plan
from hvd_hetero.worker import Worker

BLOCKING = "blocking"


class LocalSGD(Algorithm):
    """x_i = tau_g(i) local steps from x; x = sum_i w_i x_i; then the outer optimizer, if there is one.

    The optimizer's own state (momentum) stays each rank's own, is averaged with the models, or starts anew after every
    average: ``aggregation.optimizer_state: local | average | reset``. With ``aggregation.mode: solo | majority`` no
    class waits for another one: see :mod:`hvd_hetero.algorithms.merging`.
    """

    @property
    def needs_speeds(self) -> bool:
        return not isinstance(self.train.tau, Mapping)

    def check(self) -> None:
        super().check()
        if self.aggregation.outer_nesterov and self.aggregation.outer_momentum == 0:
            remedy = "set aggregation.outer_momentum too"
            raise ConfigError("aggregation.outer_nesterov", True, "needs momentum", remedy)
        if self.aggregation.mode != BLOCKING:
            check_merging(self.aggregation, self.cluster)
        if self.needs_speeds:
            check_least_round(self.cluster, self.samples, self.train.tau, self.batch_size, self.train.epoch)

    def taus(self, step_sec: Mapping[str, float] | None) -> dict[str, int]:
        """Local steps by class: as set, or derived from the fastest class's tau and the measured step times."""
        if isinstance(self.train.tau, Mapping):
            return per_class("train.tau", self.train.tau, [c.name for c in self.cluster.classes])
        assert step_sec is not None
        return derive_tau(self.train.tau, step_sec)

    def make_plan(self, step_sec: Mapping[str, float] | None) -> Plan:
        weights, epoch = str(self.aggregation.weights), self.train.epoch
        taus = self.taus(step_sec)
        return make_plan(
            self.cluster, self.samples, taus, self.batch_size, weights=weights, epoch=epoch, step_sec=step_sec
        )

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        spec = self.aggregation
        self.outer = Outer(worker.state, spec.outer_lr, spec.outer_momentum, spec.outer_nesterov)
        self.merging = None
        if spec.mode != BLOCKING:
            self.merging = Merging(worker, comm, self.cluster, spec, self.outer, self.seed)
        measured = {c.name: c.step_sec for c in plan.classes if c.step_sec is not None}
        self.pacing = Pacing(measured) if self.train.adapt_tau and self.needs_speeds and len(measured) > 1 else None

    def replan(self, work_sec: Sequence[float], steps: Sequence[int]) -> Plan:
        """Derives tau anew from the pass's own step times, where that leaves clearly less of the cluster waiting."""
        if self.pacing is None or min(steps) == 0:
            return self.plan
        ranks = {c.name: c.ranks for c in self.plan.classes}
        self.pacing.observe({name: max(work_sec[r] / steps[r] for r in own) for name, own in ranks.items()})
        try:
            proposed = self.make_plan(self.pacing.step_sec)
        except ConfigError:  # a class has become too slow for one step, or a round too large: the old plan still works
            return self.plan
        if self.pacing.worth(self.plan, proposed):
            self.follow(proposed)
        return self.plan

    def run_pass(self, given: Pass, worker: Worker, comm: Comm) -> Worked:
        if self.merging is not None:
            return self.merging.run_pass(given, worker, self.mine.tau)
        return super().run_pass(given, worker, comm)

    def end_pass(self, worker: Worker, comm: Comm) -> None:
        integers = worker.state.integers()
        if self.merging is not None and integers is not None:
            most = comm.max(integers.tolist(), "integers")
            worker.state.set_integers(torch.tensor(most).round().to(integers.dtype))

    def counts(self) -> Counts | None:
        return None if self.merging is None else self.merging.counts()

    def close(self) -> None:
        if self.merging is not None:
            self.merging.close()

    def run_round(self, worker: Worker, batches: Iterator[Batch], comm: Comm) -> None:
        self.outer.remember()
        worker.local_steps(batches, self.mine.tau)
        comm.average(worker.state, self.mine.weight)
        if self.aggregation.optimizer_state == "average":
            average_optimizer(worker.optimizer, self.mine.weight, comm)
        worker.watch.collective()
        if self.aggregation.optimizer_state == "reset":
            worker.optimizer.state.clear()
        self.outer.step()

    def state_dict(self) -> dict[str, Any]:
        merged = {} if self.merging is None else {"round": self.merging.version}
        return {**self.outer.state_dict(), **merged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.outer.load_state_dict(state)
        if self.merging is not None:
            self.merging.go_on_from(int(state["round"]))
