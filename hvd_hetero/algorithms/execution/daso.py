"""Execute DASO: gradients averaged within a host, models across hosts, which are taken in late."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_hetero.algorithms.daso import DASO, Cadence
from hvd_hetero.algorithms.execution.grouped import GroupedExecutor
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import FLAG_SLOTS, all_finite, summable, write_validity_flags
from hvd_hetero.comm.weighted_sums import sum_in_group_
from hvd_hetero.data import Batch
from hvd_hetero.planning.groups import group_of
from hvd_hetero.planning.plan import Plan
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker


@dataclass
class Flight:
    """Models of a group that travel.

    Attributes:
        begun: the batch after which they were sent, and ``due``, the one after which their sum is taken in.
        place: of the group's rank on its host.
        total: the sum, once it has been waited for; None on ranks of other groups.
    """

    begun: int
    due: int
    place: int
    total: Tensor | None
    wait: Callable[[], None]


class DASOExecutor(GroupedExecutor):
    """Step along the host's gradient, and take in what the hosts have sent one another."""

    policy: DASO

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        self._gradients = worker.flat_gradients()
        self._host = group_of(self.policy.local_groups, comm.rank)
        self._across = group_of(self.policy.global_groups, comm.rank)
        batches = [plan.of_rank(rank).batch_size for rank in self._host]
        self._batch_fraction = self.class_plan.batch_size / sum(batches)
        self._place, self._is_apart, self._losses = 0, False, [0.0, 0.0]
        self._flight: Flight | None = None

    def run_segment(self, segment: Segment) -> None:
        """Run rounds, of which the last one ends with the average of all models."""
        batches, cadence, last = segment.batches(), self.policy.cadence, segment.rounds - 1
        for number in range(segment.rounds):
            segment.start_round(number)
            self._step(batches, cadence.averages_gradients(number, last))
            self._exchange(cadence, number, last)
            segment.record(1, number)
            segment.finish_round()
        self.end_segment(segment)

    def _step(self, batches: Iterator[Batch], together: bool) -> None:
        worker = self.worker
        for inputs, targets in worker.emulator.steps(batches, 1):
            self.keep_buffers()
            losses = worker.gradient(inputs, targets, self._batch_fraction if together else 1.0)
            self._note(losses)
            is_finite = any_finite = all_finite(self._gradients)
            if together:
                worker.emulator.pause()
                any_finite = self._average_gradients(is_finite)
            if not is_finite:
                self.exclude_step()
            if any_finite:
                self.comm.excluded.since = 0
                worker.apply()
        self._is_apart |= not together

    def _average_gradients(self, is_finite: bool) -> bool:
        """Average the host's gradients; return whether there is a finite one."""
        gradients = self.worker.state.padded_gradients
        sums = [summable(vector) for vector in gradients]
        with self.comm.timed():
            kept = sum_in_group_(self.comm, sums, is_finite, self._batch_fraction, "daso.gradient", self._host)
        for gradient, total in zip(gradients, sums, strict=True):
            if gradient is not total:
                gradient.copy_(total)
        return kept > 0

    def _note(self, losses: Tensor) -> None:
        mean = float(losses.float().mean())
        if math.isfinite(mean):
            self._losses = [self._losses[0] + mean, self._losses[1] + 1]

    def _exchange(self, cadence: Cadence, batch: int, last: int) -> None:
        """Take in what is due, and send what is to be sent after a batch; all ranks do so together."""
        delay = cadence.delay(batch, last)
        if self._flight is not None and (delay is not None or batch >= self._flight.due):
            self._receive(batch)
        if delay is None or batch == last:
            return
        self._send(batch, batch + delay)
        if delay == 0:
            self._receive(batch)

    def _send(self, batch: int, due: int) -> None:
        self._settle()
        place, total, wait = self._place, None, lambda: None
        if self._host.index(self.comm.rank) == place:
            vector = self.flat_model().to("cpu")
            total = torch.cat([vector, vector.new_empty(FLAG_SLOTS)])
            write_validity_flags([total], all_finite([vector]))
            wait = self.comm.sum_async_(total, "daso.models", self._across)
        self._flight = Flight(batch, due, place, total, wait)
        self._place = (place + 1) % len(self._host)

    @torch.no_grad()
    def _receive(self, batch: int) -> None:
        """Give all ranks of the host what the hosts' sum and the batches since then come to."""
        flight, self._flight = self._flight, None
        assert flight is not None
        self._settle()
        vector = self.flat_model().to("cpu", copy=True)
        is_finite = all_finite([vector])
        with self.comm.timed():
            if flight.total is not None:
                flight.wait()
                weight, count = 2 * (batch - flight.begun) if is_finite else 0, float(flight.total[-FLAG_SLOTS])
                if weight + count:  # else no rank's model is finite, which the average of all ranks finds
                    vector = vector if is_finite else vector.zero_()
                    vector.mul_(weight).add_(flight.total[:-FLAG_SLOTS]).mul_(1 / (weight + count))
            self.write(self.comm.broadcast(vector, "daso.host", self._host[flight.place], self._host))
        if not is_finite:
            self.worker.optimizer.state.clear()
            self.comm.excluded.record()

    def _settle(self) -> None:
        """Average the host's models, once its ranks have taken steps of their own: momentum keeps them apart."""
        if self._is_apart and len(self._host) > 1:
            vector = self.flat_model()
            is_finite = all_finite([vector])
            mean = torch.cat([vector, vector.new_empty(FLAG_SLOTS)])
            mean[:-FLAG_SLOTS].mul_(1 / len(self._host))
            with self.comm.timed():
                kept = sum_in_group_(self.comm, [mean], is_finite, 1 / len(self._host), "daso.settle", self._host)
            if kept:
                self.write(mean[:-FLAG_SLOTS])
                if not is_finite:  # else the average over hosts does so
                    self.worker.optimizer.state.clear()
                    self.comm.excluded.record()

    def end_epoch(self) -> None:
        super().end_epoch()
        total, count = self.comm.sum(self._losses, "daso.loss")
        self.policy.loss, self._losses = total / count if count else None, [0.0, 0.0]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "place": self._place, "losses": self._losses, "is_apart": self._is_apart}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._place, self._losses, self._is_apart = state["place"], list(state["losses"]), state["is_apart"]
