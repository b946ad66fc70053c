"""Execute BVR-L-SGD: a common gradient estimate, local steps that correct it, and the model of one rank for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_hetero.algorithms.averaging.blocking import Averaging
from hvd_hetero.algorithms.bvr_l_sgd import BVRLSGD
from hvd_hetero.algorithms.execution.base import run_rounds
from hvd_hetero.algorithms.execution.local_sgd import LocalSGDExecutor
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import FLAG_SLOTS, all_finite, summable
from hvd_hetero.comm.weighted_sums import sum_finite_
from hvd_hetero.data import Batch
from hvd_hetero.errors import NonFiniteError
from hvd_hetero.planning.plan import ClassPlan
from hvd_hetero.random_state import RandomState
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker


class VarianceReduced(Averaging):
    """Take the rounds of BVR-L-SGD; in place of an average comes one rank's model.

    Attributes:
        rounds: so far.
        anchor: v, the estimate that all ranks share, ``[P]`` each; None before the first round.
        before: the model that it was last made or corrected at.
    """

    policy: BVRLSGD

    def __init__(self, policy: BVRLSGD, worker: Worker, comm: Comm) -> None:
        super().__init__(policy, worker, comm)
        self.rounds = 0
        self.anchor: list[Tensor] = []
        self.before: list[Tensor] = []
        self._gradients = worker.flat_gradients()

    def run_segment(self, segment: Segment, class_plan: ClassPlan) -> None:
        run_rounds(segment, class_plan.tau, lambda batches: self.run_round(batches, class_plan))

    def run_round(self, batches: Iterator[Batch], class_plan: ClassPlan) -> None:
        """Make or correct the common estimate, take this rank's steps, and go on from the model that was drawn."""
        count = self.policy.anchor_of(class_plan.tau)
        self._anchor(batches, count, class_plan)
        if class_plan.tau:
            self._steps(batches, class_plan.tau - count)
        self._draw(bool(class_plan.tau))
        self.rounds += 1

    def _anchor(self, batches: Iterator[Batch], count: int, class_plan: ClassPlan) -> None:
        worker, is_new = self.worker, self.rounds % self.policy.options.stage_rounds == 0
        sums = [torch.zeros_like(vector) for vector in worker.state.padded_gradients]
        for inputs, targets in worker.emulator.steps(batches, count) if class_plan.tau else ():
            self._difference(inputs, targets, [] if is_new else self.before, class_plan.weight / count)
            for total, gradient in zip(sums, self._gradients, strict=True):
                total[:-FLAG_SLOTS].add_(gradient)
        is_finite = all_finite(sums)
        worker.emulator.pause()
        sent = [summable(total) for total in sums]
        with self.comm.timed():
            sum_finite_(self.comm, sent, is_finite, "anchor", prescaled_weight=class_plan.weight)
        if not is_finite:
            self.comm.excluded.record()
        found = [total[:-FLAG_SLOTS].to(gradient) for total, gradient in zip(sent, self._gradients, strict=True)]
        if not is_new:
            torch._foreach_add_(found, self.anchor)
        self.anchor, self.before = found, self._copy()

    def _steps(self, batches: Iterator[Batch], count: int) -> None:
        """Take one step along the common estimate, and ``count`` along corrected ones."""
        worker, before = self.worker, self.before
        estimate = [vector.clone() for vector in self.anchor]
        self._apply(estimate)
        for inputs, targets in worker.emulator.steps(batches, count):
            self._difference(inputs, targets, before)
            torch._foreach_add_(estimate, self._gradients)
            before = self._copy()
            self._apply(estimate)

    def _difference(self, inputs: Any, targets: Any, before: Sequence[Tensor], weight: float = 1.0) -> None:
        """Leave the gradient in the parameters, less that at another model; with the same samples, and chance."""
        worker = self.worker
        random = RandomState.capture(worker.device) if before else None
        worker.gradient(inputs, targets, weight)
        if random is not None:
            here = self._copy()
            random.restore()
            self._write(before)
            again = worker.gradient_again(inputs, targets, weight)
            self._write(here)
            torch._foreach_sub_(worker.gradients(), again)

    def _apply(self, estimate: Sequence[Tensor]) -> None:
        for gradient, part in zip(self._gradients, estimate, strict=True):
            gradient.copy_(part)
        self.worker.apply()

    def _draw(self, is_training: bool) -> None:
        """Go on from the model of one of the ranks whose values are finite."""
        worker, comm = self.worker, self.comm
        worker.set_eval_mode()
        worker.state.refresh()
        is_finite = all_finite([*worker.state.parameters(), *worker.state.buffers()])
        worker.emulator.pause()
        with comm.timed():
            flags = [int(flag) for flag in comm.gather(torch.tensor([2 * (not is_finite) + is_training]), "drawn.good")]
            finite_ranks = [r for r, flag in enumerate(flags) if flag == 1]
            non_finite_ranks = [r for r, flag in enumerate(flags) if flag > 1]
            if not finite_ranks or (non_finite_ranks and comm.excluded.stops):
                raise NonFiniteError(comm.excluded.round, non_finite_ranks, not finite_ranks)
            comm.broadcast_state(worker.state, self.policy.drawn(self.rounds, finite_ranks))
        if not is_finite:
            comm.excluded.record()

    def _copy(self) -> list[Tensor]:
        return [vector.detach().clone() for vector in self.worker.state.parameters()]

    @torch.no_grad()
    def _write(self, vectors: Sequence[Tensor]) -> None:
        self.worker.state.refresh()
        for param, vector in zip(self.worker.state.parameters(), vectors, strict=True):
            param.copy_(vector)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rounds": self.rounds, "anchor": self.anchor, "before": self.before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.rounds = state["rounds"]
        self.anchor, self.before = ([vector.to(self.worker.device) for vector in state[name]]
                                    for name in ("anchor", "before"))  # fmt: skip


class BVRLSGDExecutor(LocalSGDExecutor):
    """Take the rounds of BVR-L-SGD."""

    policy: BVRLSGD

    @property
    def _strategy(self) -> type[Averaging]:
        return VarianceReduced
