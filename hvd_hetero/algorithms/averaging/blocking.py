"""Averages that every rank waits for, at the end of each round, and the interface of all averaging strategies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_hetero.algorithms.averaging.optimizer_average import SEEDED, OptimizerAverage
from hvd_hetero.algorithms.averaging.outer_optimizer import OuterOptimizer
from hvd_hetero.algorithms.execution.base import run_rounds
from hvd_hetero.algorithms.execution.resumable import Resumable, WireResumable
from hvd_hetero.algorithms.local_sgd import AVERAGED, LocalSGD
from hvd_hetero.algorithms.policy import FLOAT32
from hvd_hetero.comm.averaging import ModelDifferences, average
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.wire import Wire
from hvd_hetero.data import Batch
from hvd_hetero.planning.plan import ClassPlan
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker


class Averaging(Resumable):
    """Take local steps and average the models of all ranks, by the strategy of a subclass.

    Attributes:
        outer: takes the step that an average proposes.
    """

    def __init__(self, policy: LocalSGD, worker: Worker, comm: Comm) -> None:
        self.policy, self.worker, self.comm, self.spec = policy, worker, comm, policy.aggregation
        spec = self.spec
        self.outer = OuterOptimizer(worker.state, spec.outer_lr, spec.outer_momentum, spec.outer_nesterov)

    def run_segment(self, segment: Segment, class_plan: ClassPlan) -> None:
        """Run the rounds of a segment; when this returns, all ranks hold the same model."""
        raise NotImplementedError(type(self).__name__)

    def state_dict(self) -> dict[str, Any]:
        return self.outer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.outer.load_state_dict(state)


@torch.no_grad()
def scale_progress(params: Sequence[Tensor], base: Sequence[Tensor], factor: float) -> None:
    """Move parameters to x + f (x_i - x) from where they are, x_i, in place.

    Args:
        base: x, what the round began with; more may lie behind it in the same vectors.
    """
    for x, before in zip(params, base, strict=True):
        before = before[: len(x)]
        x.sub_(before).mul_(factor).add_(before)


class BlockingAveraging(WireResumable, Averaging):
    """Average the models of all ranks at the end of each round, x = sum_i w_i x_i.

    The optimizer's own state (momentum) stays each rank's own, is averaged with the models, or starts anew after every
    average: ``aggregation.optimizer_state: local | average | average_seed | reset``. A rank with non-finite values is
    excluded from the average, takes it as its model, and forgets its optimizer's state.

    With ``aggregation.wire`` the difference from the model that the round began with travels, in fewer bits.
    """

    def __init__(self, policy: LocalSGD, worker: Worker, comm: Comm) -> None:
        super().__init__(policy, worker, comm)
        is_plain = self.spec.wire == FLOAT32 or comm.size == 1
        self.wire = None if is_plain else Wire(comm, self.spec.wire, worker.device, policy.seed)
        self._optimizer_average = OptimizerAverage([p for p in worker.model.parameters() if p.requires_grad], comm,
                                                   SEEDED if self.spec.optimizer_state == "average_seed" else {})

    def run_segment(self, segment: Segment, class_plan: ClassPlan) -> None:
        run_rounds(segment, class_plan.tau, lambda batches: self.run_round(batches, class_plan))

    def run_round(self, batches: Iterator[Batch], class_plan: ClassPlan) -> None:
        """Take the local steps of one round, and average the models."""
        self.outer.snapshot()
        factor, state = self.policy.progress_factor(class_plan.name), self.worker.state
        base = None if factor == 1 and self.wire is None else [vector.clone() for vector in state.vectors]
        self.worker.local_steps(batches, class_plan.tau)
        if base is not None and factor != 1:
            state.refresh()
            scale_progress(state.parameters(), base, factor)
        self.average_models(self.policy.weight_of(class_plan), base)

    def average_models(self, weight: float, base: Sequence[Tensor] | None) -> None:
        """Average the models that are here now, and take the outer step.

        Args:
            base: the vectors of a model that all ranks held, where differences from it are sent.
        """
        optimizer, kept = self.worker.optimizer, self.spec.optimizer_state
        self.worker.set_eval_mode()
        differences = None if self.wire is None or base is None else ModelDifferences(base, self.wire)
        is_finite = average(self.comm, self.worker.state, weight, differences=differences)
        if kept in AVERAGED:
            self._optimizer_average.average(optimizer, weight, is_finite)
        if kept == "reset" or (kept == "local" and not is_finite):
            optimizer.state.clear()
        self.outer.step()
