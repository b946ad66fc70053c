"""How long a local step takes on each device class, measured with all classes running at once."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.comm.averaging import average
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.data import Source, read
from hvd_hetero.errors import RankError, UserError
from hvd_hetero.worker.worker import Worker

CHUNK_SEC, CHUNKS = 0.1, 10
"""A chunk of steps takes a tenth of the measurement, and at least so long. The first takes so long going by one step,
and so do all of an emulated rank: in longer ones its caches would be warmer than in rounds, as it sleeps so often."""
MIN_CHUNKS = 3
AVERAGES = 10
TURNS = 3
FIRST_STEPS = 3
"""CUDA graphs are recorded in the second step and played from the third on."""


@dataclass(frozen=True)
class Measured:
    """Seconds of a local step, and the standard deviation of single steps over it."""

    step_sec: float
    jitter: float


def measure_step(
    worker: Worker, source: Source, batch_size: int, seconds: float, warmup_steps: int, ready: Callable[[], None]
) -> Measured:
    """How long a local step of this rank takes; model, optimizer and random state are left as they were.

    The median is taken over chunks of steps, see :data:`CHUNK_SEC`, not over single steps: a CPU quota or a neighbour
    stops a rank for a moment now and then, which a median over short steps would not see.

    Args:
        seconds: how long to measure, after ``warmup_steps`` steps that do not count.
        ready: called between the two; waits for the other ranks, so that all measure at the same time.
    """
    restore = worker.snapshot()
    rng = np.random.default_rng(0)

    def steps(count: int) -> None:
        rows = rng.integers(len(source), size=(count, batch_size))
        worker.local_steps(read(source, rows, worker.generator), count)
        worker.pop_losses()

    with worker.emulator.at_full_speed():
        steps(max(warmup_steps, 1))
    start = time.perf_counter()
    steps(1)
    count = max(1, int(CHUNK_SEC / max(time.perf_counter() - start, 1e-6)))
    ready()
    chunks: list[float] = []
    counts: list[int] = []
    begin = time.perf_counter()
    while len(chunks) < MIN_CHUNKS or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        steps(count)
        now = time.perf_counter()
        chunks.append((now - start) / count)
        counts.append(count)
        if not worker.emulator.emulates:
            count = max(1, int(max(CHUNK_SEC, seconds / CHUNKS) * sum(counts) / (now - begin)))
    restore()
    step_sec = statistics.median(chunks)
    mean = sum(n * sec for n, sec in zip(counts, chunks, strict=True)) / sum(counts)
    # the mean of a chunk deviates by 1 / sqrt(steps) of what a single step does
    squares = sum(n * (sec - mean) ** 2 for n, sec in zip(counts, chunks, strict=True))
    return Measured(step_sec, math.sqrt(squares / (len(chunks) - 1)) / step_sec)


def warm_up(worker: Worker, source: Source, batch_size: int) -> None:
    """Take the steps that compile and load kernels before training starts, and leave everything as it was.

    Without this the first round of a class that compiles, or is on a GPU, takes so much longer than it is planned to,
    and all other ranks wait for it. Their time is not booked.
    """
    if batch_size and (worker.compiles or worker.device.type == "cuda"):
        restore = worker.snapshot()
        rows = np.random.default_rng(0).integers(len(source), size=(FIRST_STEPS, batch_size))
        worker.local_steps(read(source, rows, worker.generator), FIRST_STEPS)
        restore()
        worker.watch.drain()


@dataclass(frozen=True)
class Measurement:
    """What all measurements of a job share; every rank takes part in each of them.

    A rank whose own data cannot be used raises RankError, while the others wait for it.

    Attributes:
        seconds: of each measurement.
    """

    worker: Worker
    source: Source
    cluster: Cluster
    comm: Comm
    seconds: float
    warmup_steps: int

    def classes(self, batch_size: Mapping[str, int]) -> dict[str, Measured]:
        """Every class's step with all of them running, the same on all ranks; a class is as fast as its slowest."""
        mine = batch_size[self.cluster.class_of(self.comm.rank).name]
        start = partial(self.comm.barrier, "profile.start")
        found = self._measure(mine, start)
        numbers = torch.tensor([found.step_sec, found.jitter], dtype=torch.float64)
        ranks = [Measured(*row.tolist()) for row in self.comm.gather(numbers, "profile.times")]
        self.worker.watch.drain()
        return {c.name: max((ranks[r] for r in c.ranks), key=lambda m: m.step_sec) for c in self.cluster.classes}

    def alone(self, batch_size: Mapping[str, int]) -> dict[str, float]:
        """Every class's step while all other ranks wait."""
        mine, seconds = self.cluster.class_of(self.comm.rank).name, 0.0
        for c in self.cluster.classes:
            if c.name == mine:
                seconds = self._measure(batch_size[mine], lambda: None).step_sec
            self.comm.barrier("profile.next")
        times = [float(t) for t in self.comm.gather(torch.tensor([seconds], dtype=torch.float64), "profile.alone")]
        self.worker.watch.drain()
        return {c.name: max(times[r] for r in c.ranks) for c in self.cluster.classes}

    def _measure(self, batch_size: int, ready: Callable[[], None]) -> Measured:
        try:
            return measure_step(self.worker, self.source, batch_size, self.seconds, self.warmup_steps, ready)
        except UserError as error:  # one rank's own trouble, a broken file for instance
            raise RankError(str(error)) from error

    def choose_path(self) -> dict[str, float]:
        """Lets averages go the way that is fastest here; returns the seconds of each. The model stays as it is."""
        restore = self.worker.snapshot()
        times: dict[str, list[float]] = {}
        for path in self.comm.paths * TURNS:
            self.comm.set_path(path)
            times.setdefault(path, []).append(max(self._averages_sec(AVERAGES // TURNS)))  # the last to have it
        restore()
        found = {path: statistics.median(seconds) for path, seconds in times.items()}
        self.comm.set_path(min(found, key=found.__getitem__))
        return found

    def average_sec(self) -> float:
        """Seconds of one weighted average that nobody is late for, the same on all ranks; the model stays as it is."""
        restore = self.worker.snapshot()
        found = min(self._averages_sec(AVERAGES))
        restore()
        return found

    def _averages_sec(self, count: int) -> list[float]:
        """The median of so many averages, by rank."""
        times = []
        for _ in range(count):
            self.comm.barrier("profile.average")
            start = time.perf_counter()
            average(self.comm, self.worker.state, 1 / self.comm.size)
            times.append(time.perf_counter() - start)
        self.worker.watch.drain()
        mine = torch.tensor([statistics.median(times)], dtype=torch.float64)
        return [float(t) for t in self.comm.gather(mine, "profile.averages")]
