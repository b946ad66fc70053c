"""Delayed averaging: what a round has come to is averaged while the ranks work on the next one.

Source: Zhou et al., "DaSGD: Squeezing SGD Parallelization Performance in Distributed Training Using Delayed Averaging"
(2020). At the end of a round, on rank i, with s_i what it had at the end of the round before::

    m   = sum_i w_i s_i                 # has come meanwhile, or is waited for
    x_i = x_i + (1 - xi) (m - s_i)      # what was done since then stays
    s_i = x_i                           # and its average begins to travel

The paper lets an average arrive d < tau steps after the round's end: with ``aggregation.delay_steps`` it is taken in
that many steps of the fastest class into the next round, by the other classes after the same share of theirs, and so
by all at the same time. With d = 0 it is the blocking average. xi, ``aggregation.own_weight``, keeps a share of each
rank's own model: x_i = xi x_i + (1 - xi) (m + x_i - s_i). The paper names such a weight; this rule is our reading.

Running statistics are states and not progress: they become those of m. At the end of an epoch, and before all ranks
meet in order to save, s_i is waited for and the models are averaged as they are, so that all have the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

import torch
from torch import Tensor

from hvd_hetero.algorithms.averaging.blocking import BlockingAveraging, scale_progress
from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.comm.averaging import ModelDifferences
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import all_finite
from hvd_hetero.comm.weighted_sums import average_tensors
from hvd_hetero.comm.wire import Wire
from hvd_hetero.data import Batch
from hvd_hetero.planning.plan import ClassPlan
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker


class DelayedAveraging(BlockingAveraging):
    """Average what a round came to while the ranks take the steps of the next one."""

    def __init__(self, policy: LocalSGD, worker: Worker, comm: Comm) -> None:
        super().__init__(policy, worker, comm)
        self._in_flight = InFlightAverage(worker, comm, self.wire, self.spec.own_weight)

    def run_segment(self, segment: Segment, class_plan: ClassPlan) -> None:
        self._in_flight.begin()
        super().run_segment(segment, class_plan)
        self._in_flight.receive()
        self.average_models(self.policy.weight_of(class_plan), self._in_flight.base)

    def run_round(self, batches: Iterator[Batch], class_plan: ClassPlan) -> None:
        delay = self.policy.delay_of(class_plan)
        self.worker.local_steps(batches, delay)
        self._in_flight.receive()
        self.worker.local_steps(batches, class_plan.tau - delay)
        self._in_flight.send(self.policy.weight_of(class_plan), self.policy.progress_factor(class_plan.name))
        if self.spec.optimizer_state == "reset":
            self.worker.optimizer.state.clear()

    def close(self) -> None:
        self._in_flight.close()


class InFlightAverage:
    """Send this rank's model to be averaged, and receive the average later; at most one is in flight.

    One thread takes part in all of them, and on a GPU one stream (not tried on one): on the steps' own, each copy would
    wait for the steps.

    Args:
        wire: what differences from the last average travel in; None: models do, as they are.
        own_weight: xi, the share of a rank's own model that stays.

    Attributes:
        base: vectors of the last model that all ranks know: what they began with, or the last average.
    """

    def __init__(self, worker: Worker, comm: Comm, wire: Wire | None = None, own_weight: float = 0.0) -> None:
        self._wire, self._own_weight = wire, own_weight
        self._worker, self._comm, self._own_comm = worker, comm.clone_for_thread(), comm
        self._weights: SimpleQueue[float | None] = SimpleQueue()
        self._problems: SimpleQueue[BaseException | None] = SimpleQueue()
        self._is_sent = False
        self._stream = torch.cuda.Stream(worker.device) if worker.device.type == "cuda" else None
        threading.Thread(target=self._serve, name="hvd_hetero.delayed", daemon=True).start()

    def begin(self) -> None:
        """Take note of the model that all ranks hold."""
        self.base = [vector.clone() for vector in self._worker.state.vectors]

    def send(self, weight: float, factor: float = 1.0) -> None:
        """Send what the model is now; what was sent before has been received.

        Args:
            factor: how often this rank's progress counts, since the last average that it has received.
        """
        assert not self._is_sent
        state = self._worker.state
        state.refresh()  # what it finds is agreed on where all ranks meet
        self._sent = [v.clone() for v in state.vectors]
        self._mean = [v.clone() for v in state.vectors]
        self._is_finite = all_finite(self._sent)
        if factor != 1:
            scale_progress(self._parts(self._mean), self._parts(self.base), factor)
        if self._wire is not None:
            ModelDifferences(self.base, self._wire).subtract_base(self._mean)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._worker.device))
        self._is_sent = True
        self._weights.put(weight)

    def _serve(self) -> None:
        while (weight := self._weights.get()) is not None:
            problem = None
            try:
                with self._on_stream():
                    self._average(weight)
            except BaseException as error:  # it is the rank's own thread that has to end with it
                problem = error
            self._problems.put(problem)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        torch.cuda.set_device(self._stream.device)  # each thread has one of its own
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    @torch.no_grad()
    def receive(self) -> None:
        """Wait for the average in flight, if there is one, and move the model by the difference it makes.

        Raises:
            PeerLost, NonFiniteError: what has become of it.
        """
        if not self._is_sent:
            return
        with self._own_comm.timed(), self._own_comm.heartbeat.waiting("delayed"):
            problem = self._problems.get()
        self._is_sent = False
        if problem is not None:
            raise problem
        if not self._is_finite:
            self._worker.optimizer.state.clear()
            self._comm.excluded.record()
        state, factor = self._worker.state, 1 - self._own_weight
        if self._wire is not None:
            ModelDifferences(self.base, self._wire).add_base(self._mean)
        for x, mean, sent, params in zip(state.vectors, self._mean, self._sent, state.params, strict=True):
            if self._is_finite:
                moved = mean[:params] - sent[:params]
                x[:params] += moved if factor == 1 else moved.mul_(factor)
                x[params:] = mean[params:]
            else:
                x.copy_(mean)
        self.base = self._mean

    def _average(self, weight: float) -> None:
        if self._wire is None:
            average_tensors(self._comm, self._mean, self._is_finite, "delayed", weight=weight)
            return
        average_tensors(self._comm, self._parts(self._mean), self._is_finite, "delayed", weight=weight, wire=self._wire)
        rest = [vector[params:] for vector, params in zip(self._mean, self._worker.state.params, strict=True)]
        if states := [part for part in rest if len(part)]:  # they are not rounded
            average_tensors(self._comm, states, self._is_finite, "delayed.states", weight=weight)

    def _parts(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters' parts of vectors, those that have one."""
        pairs = zip(vectors, self._worker.state.params, strict=True)
        return [vector[:count] for vector, count in pairs if count]

    def close(self) -> None:
        """Let the thread end, after what it is waiting for."""
        self._weights.put(None)
