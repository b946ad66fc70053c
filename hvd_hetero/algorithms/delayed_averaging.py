"""Delayed averaging: what a round has come to is averaged while the ranks work on the next one.

Source: Zhou et al., "DaSGD: Squeezing SGD Parallelization Performance in Distributed Training Using Delayed Averaging"
(2020). At the end of a round, on rank i, with s_i what it had at the end of the round before::

    m   = sum_i w_i s_i                 # has come meanwhile, or is waited for
    x_i = x_i + (m - s_i)               # what was done since then stays
    s_i = x_i                           # and its average begins to travel

Running statistics are states and not progress: they become those of m. At the end of an epoch, and before all ranks
meet in order to save, s_i is waited for and the models are averaged as they are, so that all have the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import finite
from hvd_hetero.comm.weighted_sums import average_tensors
from hvd_hetero.config.schema import AggregationConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.local_steps import WAIT_AVOIDING
from hvd_hetero.worker.worker import Worker


def check_delayed(spec: AggregationConfig, too_slow: str) -> None:
    """Refuses what needs the average of a round at its end.

    Raises:
        ConfigError: naming the key.
    """
    others: Mapping[str, Any] = {"mode": "blocking", "outer_lr": 1.0, "outer_momentum": 0.0}
    for key, neutral in others.items():
        if (value := getattr(spec, key)) != neutral:
            remedy = f"set aggregation.{key}={neutral}, or aggregation.delayed=false"
            raise ConfigError(f"aggregation.{key}", value, "does not go with aggregation.delayed", remedy)
    if too_slow == WAIT_AVOIDING:
        remedy = "set another cluster.too_slow, or aggregation.delayed=false"
        raise ConfigError("cluster.too_slow", too_slow, "does not go with aggregation.delayed", remedy)
    if spec.optimizer_state == "average":
        remedy = "set local or reset, or aggregation.delayed=false"
        raise ConfigError("aggregation.optimizer_state", "average", "does not go with aggregation.delayed", remedy)


class Delayed:
    """One rank's averages that are on their way; at most one at a time.

    One thread takes part in all of them, and on a GPU one stream (not tried on one): on the steps' own, each copy would
    wait for the steps.
    """

    def __init__(self, worker: Worker, comm: Comm) -> None:
        self._worker, self._comm, self._own_comm = worker, comm.clone_for_thread(), comm
        self._weights: SimpleQueue[float | None] = SimpleQueue()
        self._problems: SimpleQueue[BaseException | None] = SimpleQueue()
        self._on_its_way = False
        on_gpu = worker.device.type == "cuda"
        self._stream = torch.cuda.Stream(worker.device) if on_gpu else None
        threading.Thread(target=self._serve, name="hvd_hetero.delayed", daemon=True).start()

    def begin(self, weight: float) -> None:
        """Sends what the model is now; what was sent before has been taken in."""
        assert not self._on_its_way
        state = self._worker.state
        state.refresh()  # what it finds is agreed on where all ranks meet
        self._sent = [v.clone() for v in state.vectors]
        self._mean = [v.clone() for v in state.vectors]
        self._good = finite(self._sent)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._worker.device))
        self._on_its_way = True
        self._weights.put(weight)

    def _serve(self) -> None:
        while (weight := self._weights.get()) is not None:
            problem = None
            try:
                with self._on_stream():
                    average_tensors(self._comm, self._mean, self._good, "delayed", weight=weight)
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
    def settle(self) -> None:
        """Takes in the average that is on its way, if there is one.

        Raises:
            PeerLost, NonFiniteError: what has become of it.
        """
        if not self._on_its_way:
            return
        with self._own_comm.booked(), self._own_comm.heartbeat.waiting("delayed"):
            problem = self._problems.get()
        self._on_its_way = False
        if problem is not None:
            raise problem
        if not self._good:
            self._worker.optimizer.state.clear()
            self._comm.excluded.note()
        state = self._worker.state
        for x, mean, sent, params in zip(state.vectors, self._mean, self._sent, state.params, strict=True):
            if self._good:
                x[:params] += mean[:params] - sent[:params]
                x[params:] = mean[params:]
            else:
                x.copy_(mean)

    def close(self) -> None:
        """Lets go of the thread, which ends with what it is waiting for."""
        self._weights.put(None)

