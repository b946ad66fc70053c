"""Execute the asynchronous methods: ranks push to a server on rank 0, which does what the method's rule says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_hetero.algorithms.asynchronous import Asynchronous, AsynchronousLocal
from hvd_hetero.algorithms.execution.base import Executor
from hvd_hetero.algorithms.server_rule import Rule
from hvd_hetero.comm.averaging import average_buffers, average_unlike_parameters, check_partial
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.flat_params import concat, split_like
from hvd_hetero.comm.gradient_staging import HostGradients
from hvd_hetero.comm.model_server import Answer, ModelLink
from hvd_hetero.comm.nonfinite import all_finite
from hvd_hetero.data import Batch
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import Plan
from hvd_hetero.telemetry.staleness import Counts
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.modes import has_modes
from hvd_hetero.worker.optimizer_state import load_state, save_state
from hvd_hetero.worker.unused_parameters import UnusedParameters
from hvd_hetero.worker.worker import Worker


class ServedModel:
    """The model of the server and its optimizer, on rank 0's host; the rates are those of rank 0's worker.

    Args:
        rule: the method's; this is what makes its steps.
    """

    def __init__(self, worker: Worker, rule: Rule) -> None:
        self._worker, self.rule = worker, rule
        self._vectors, self._gradients, copies = worker.state.on_host()
        self._params = list(copies.values())
        self._optimizer = worker.optimizer_of(copies)
        self._unused = UnusedParameters({str(place): param for place, param in enumerate(self._params)})
        self._made_at = list(rule.made_at)
        self._begins = [True] * rule.size
        rule.step = self._outer_step if rule.is_outer else self._step

    @property
    def version(self) -> int:
        return self.rule.version

    def arrive(self, rank: int, vector: Tensor) -> tuple[int, bool]:
        delay = self.rule.delay(rank)
        with torch.no_grad():
            return delay, self.rule.arrive(rank, vector)

    def skip(self, rank: int) -> None:
        self.rule.skip(rank)

    def give(self, rank: int) -> Tensor | None:
        at = self.rule.made_at[rank]
        if self._made_at[rank] == at:
            return None
        self._made_at[rank] = at
        return concat(self._vectors)

    def finish(self) -> None:
        for rank in range(self.rule.size):
            self.rule.restart(rank)

    def _step(self, direction: Tensor, factor: float) -> None:
        for gradient, part in zip(self._gradients, split_like(direction, self._gradients), strict=True):
            torch.mul(part.to(gradient), factor, out=gradient)
        for group, theirs in zip(self._optimizer.param_groups, self._worker.optimizer.param_groups, strict=True):
            group |= {key: value for key, value in theirs.items() if key != "params"}  # a schedule may set any of them
        with self._unused.without_gradients():
            self._worker.clip(self._params)
            self._optimizer.step()

    def _outer_step(self, direction: Tensor, factor: float) -> None:
        for vector, part in zip(self._vectors, split_like(direction, self._vectors), strict=True):
            vector.sub_(part.to(vector).mul_(factor))

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": save_state(self._optimizer), "rule": self.rule.state_dict(), "unused": self._unused.names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_state(self._optimizer, state["optimizer"], "optimizer")
        self._unused.names = state.get("unused", [])
        self.rule.load_state_dict(state["rule"])
        self._made_at = list(self.rule.made_at)

    def carry_over(self, state: Mapping[str, Any]) -> None:
        """Load what does not depend on the ranks: the momentum of the rule, and the state of an optimizer set alike."""
        saved, current = state["optimizer"], save_state(self._optimizer)
        if [_settings(group) for group in saved["param_groups"]] == [_settings(g) for g in current["param_groups"]]:
            load_state(self._optimizer, {**current, "state": saved["state"]}, "optimizer")
        self._unused.names = state.get("unused", [])
        self.rule.carry_over(state["rule"])


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides on the state that an optimizer has of its parameters, and on what it means."""
    return {key: value for key, value in group.items() if key not in ("lr", "initial_lr", "weight_decay")}


class ServerExecutor(Executor):
    """Compute on the model that was given, push what came of it, go on from the answer."""

    policy: Asynchronous | AsynchronousLocal

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        if has_modes(worker.optimizer):
            problem = f"has modes of its own, which {self.policy.options.name} knows nothing of"
            raise ConfigError("train.optimizer", type(worker.optimizer).__name__, problem, "choose another optimizer")
        self._params = worker.state.parameters()
        self._gradients = worker.flat_gradients() if self.policy.flat_gradients else []
        as_they_come = bool(self._gradients) and self._gradients[0].is_cuda and worker.micro_batches == 1
        self._host = HostGradients(worker.model.parameters(), self._gradients) if as_they_come else None
        self._sent = Counts()
        self._open()

    def _open(self, state: Mapping[str, Any] | None = None) -> None:
        rule, cluster = self.policy.server_rule(), self.policy.cluster
        self.served = ServedModel(self.worker, rule) if self.comm.rank == 0 else None
        if self.served is not None and state is not None:
            self.served.load_state_dict(state)
        self.link = ModelLink(
            self.comm, self.served, concat(self._params).to("cpu"),
            [(rank,) for rank in range(cluster.size)] if rule.needs_every_rank else [c.ranks for c in cluster.classes],
            hosts=len({fact.host for fact in cluster.facts}),
        )  # fmt: skip
        self._version = self.link.first

    def run_segment(self, segment: Segment) -> None:
        self._first = self._version
        if self.policy.claims_samples:
            self._work_on_claims(segment)
        else:
            self._work_on_own(segment)
        self._take(self.link.finish())
        self.worker.state.refresh()
        averages = self._version - self._first
        check_partial(self.comm, self._params, averages)
        segment.averages = averages

    def _work_on_claims(self, segment: Segment) -> None:
        size = self.class_plan.batch_size
        answer = self._exchange(None, size)  # others may have pushed already
        while (batch := segment.claim(answer.offered, size)) is not None:
            segment.start_round(self._version - self._first)
            vector = self._gradient(batch) if self.policy.pushes_gradients else self._progress(batch, 1)[0]
            segment.record(1, self._version - self._first)
            # to claim everything leaves the others nothing
            answer = self._exchange(vector, segment.samples if segment.is_stopping() else size)
            segment.finish_round()

    def _work_on_own(self, segment: Segment) -> None:
        batches, tau = segment.batches(), self.class_plan.tau
        at_once = self.policy.steps_of_push or tau
        closing = segment.is_stopping()
        for _ in range(segment.rounds * tau // at_once):
            if closing:
                break
            segment.start_round(self._version - self._first)
            if at_once == tau and self.policy.steps_of_push is None:
                vector, steps = self._progress(batches, tau)
            else:
                vector, steps = self._gradient(batches), 1
            segment.record(steps, self._version - self._first)
            closing = self._exchange(vector, 0).closing or segment.is_stopping()
            segment.finish_round()

    def _gradient(self, batches: Iterator[Batch]) -> Tensor | None:
        """Compute the gradient of the next batch, on the host; None if it is non-finite."""
        for inputs, targets in self.worker.emulator.steps(batches, 1):
            self._keep_buffers()
            self.worker.gradient(inputs, targets)
        gradient = concat(self._gradients).cpu() if self._host is None else self._host.synchronize()
        return gradient if self._check_finite([gradient]) else None

    def _progress(self, batches: Iterator[Batch], tau: int) -> tuple[Tensor | None, int]:
        """Take local steps; return x - x_i on the host, None if it is non-finite, and the steps."""
        before = concat(self._params).clone()
        self._keep_buffers()
        steps = self.worker.local_steps(batches, tau)
        self.worker.state.refresh()
        if not self._check_finite([*self._params, *self.worker.state.buffers()]):
            self.worker.optimizer.state.clear()
            self._write(before)
            return None, steps
        return before.sub_(concat(self._params)).to("cpu"), steps

    def _keep_buffers(self) -> None:
        self._kept = [buffers.clone() for buffers in self.worker.state.buffers()]

    def _check_finite(self, tensors: list[Tensor]) -> bool:
        """Tell whether all is finite; if not, put running statistics back and count it."""
        is_finite = all_finite(tensors)
        if not is_finite:
            self.worker.state.refresh()
            for buffers, kept in zip(self.worker.state.buffers(), self._kept, strict=True):
                buffers.copy_(kept)
            self.comm.excluded.record()
        return is_finite

    def _exchange(self, vector: Tensor | None, claim: int) -> Answer:
        answer = self.link.exchange(vector, claim)
        if vector is not None:
            self._sent.fresh += answer.is_used and answer.delay == 0
            self._sent.late += answer.is_used and answer.delay > 0
            if answer.is_used:
                self._sent.staleness[answer.delay] += 1
                self.comm.excluded.since = 0
            else:
                self._sent.dropped += 1
                steps = self.policy.steps_of_push or self.class_plan.tau
                self._sent.lost_samples += self.class_plan.batch_size * steps
        self._take(answer)
        return answer

    def _take(self, answer: Answer) -> None:
        """Go on from the model that was given, if there is one."""
        self._version = answer.version
        if answer.model is not None:
            self._write(answer.model)

    @torch.no_grad()
    def _write(self, flat: Tensor) -> None:
        self.worker.state.refresh()
        for vector, part in zip(self._params, split_like(flat, self._params), strict=True):
            vector.copy_(part)

    def end_epoch(self) -> None:
        worker, ranks = self.worker, self.averaged_ranks
        worker.set_eval_mode()
        average_buffers(self.comm, worker.state, self.class_plan.weight, ranks)
        average_unlike_parameters(self.comm, worker.state, self.class_plan.weight, ranks)

    def counts(self) -> Counts:
        taken, self._sent = self._sent, Counts()
        return taken

    def close(self) -> None:
        if "link" in vars(self):  # else it was never started
            self.link.close()

    def state_dict(self) -> dict[str, Any]:
        served = {} if self.served is None else {"server": self.served.state_dict()}
        return {**super().state_dict(), **served}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.link.close()
        self._open(state.get("server"))

    def carry_over(self, state: Mapping[str, Any]) -> None:
        if self.served is not None and "server" in state:
            self.served.carry_over(state["server"])
