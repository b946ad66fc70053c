"""Execute DecentLaM: a trial step, its average over the neighbours, and momentum on what that comes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_hetero.algorithms.decentlam import UNFIT, DecentLaM
from hvd_hetero.algorithms.execution.grouped import GroupedExecutor
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import FLAG_SLOTS, all_finite
from hvd_hetero.comm.weighted_sums import sum_in_group_
from hvd_hetero.data import Batch
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.groups import group_of
from hvd_hetero.planning.plan import Plan
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker


class DecentLaMExecutor(GroupedExecutor):
    """Take momentum steps along decentralised gradients."""

    policy: DecentLaM

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        if type(worker.optimizer) is not torch.optim.SGD:  # a program may have given one of its own
            problem = "decentlam has momentum of its own, which is that of torch's SGD"
            raise ConfigError("train.optimizer", type(worker.optimizer).__name__, problem, "use that, or take sync_sgd")
        for key in UNFIT:
            if any(group[key] for group in worker.optimizer.param_groups):
                problem = f"decentlam's momentum knows no {key}"
                raise ConfigError("train.optimizer", "SGD", problem, f"leave {key} out, or take sync_sgd")
        self._groups = [group_of(partition, comm.rank) for partition in self.policy.partitions]
        self._params = [p for p in worker.model.parameters() if p.requires_grad]
        self._steps = 0

    def run_segment(self, segment: Segment) -> None:
        """Run rounds of one step, and then average all models."""
        batches = segment.batches()
        for number in range(segment.rounds):
            segment.start_round(number)
            self._step(batches)
            segment.record(1, number)
            segment.finish_round()
        self.end_segment(segment)

    def _step(self, batches: Iterator[Batch]) -> None:
        worker, optimizer = self.worker, self.worker.optimizer
        for inputs, targets in worker.emulator.steps(batches, 1):
            self.keep_buffers()
            worker.gradient(inputs, targets)
            worker.clip(self._params)
            before: dict[Tensor, Tensor] = {param: param.detach().clone() for param in self._params}
            self._try_step()
            worker.emulator.pause()
            vector = self.flat_model()
            is_finite = all_finite([vector])
            if not is_finite:
                self.exclude_step()
                optimizer.state.clear()
            if not self._average(vector, is_finite):  # no rank's model is finite
                for param, kept in before.items():
                    param.detach().copy_(kept)
            elif is_finite:
                self.comm.excluded.since = 0
                self._apply(before)

    @torch.no_grad()
    def _try_step(self) -> None:
        """Step along the gradient at hand, without momentum."""
        for group in self.worker.optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    gradient = param.grad.to_dense() if param.grad.is_sparse else param.grad
                    param.sub_(gradient.add(param, alpha=group["weight_decay"]), alpha=group["lr"])

    @torch.no_grad()
    def _average(self, vector: Tensor, is_finite: bool) -> bool:
        """Set the model to the mean over this step's finite neighbours; return whether there is one."""
        group = self._groups[self._steps % len(self._groups)]
        self._steps += 1
        mean = torch.cat([vector, vector.new_empty(FLAG_SLOTS)])
        mean[:-FLAG_SLOTS].mul_(1 / len(group))
        with self.comm.timed():
            kept = sum_in_group_(self.comm, [mean], is_finite, 1 / len(group), "decentlam", group)
        if kept:
            self.write(mean[:-FLAG_SLOTS])
        return kept > 0

    @torch.no_grad()
    def _apply(self, before: Mapping[Tensor, Tensor]) -> None:
        """Take the momentum step from the model as it was, along what it has come to, over the learning rate."""
        optimizer, decay = self.worker.optimizer, []
        for group in optimizer.param_groups:
            decay.append(group["weight_decay"])
            group["weight_decay"] = 0.0  # it is in the trial step
            for param in group["params"]:
                if group["lr"]:
                    param.grad = (before[param] - param) / group["lr"]
                    param.copy_(before[param])
                else:
                    param.grad = None  # a rate of 0 leaves nothing but the average
        optimizer.step()
        for group, kept in zip(optimizer.param_groups, decay, strict=True):
            group["weight_decay"] = kept

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps = state["steps"]
