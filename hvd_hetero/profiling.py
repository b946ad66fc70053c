"""How long a local step takes on each device class, measured with all classes running at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from hvd_hetero.cluster import Cluster
from hvd_hetero.comm.horovod import Comm
from hvd_hetero.data import Source
from hvd_hetero.worker import Worker

CHUNK_SEC = 0.1
MIN_CHUNKS = 3


def measure_step(
    worker: Worker, source: Source, batch_size: int, seconds: float, warmup_steps: int, ready: Callable[[], None]
) -> float:
    """Seconds of one local step of this rank; model, optimizer and random state are left as they were.

    The median is taken over chunks of steps of at least :data:`CHUNK_SEC`, not over single steps: a CPU quota or a
    neighbour stops a rank for a moment now and then, which a median over short steps would not see at all.

    Args:
        seconds: how long to measure, after ``warmup_steps`` steps that do not count.
        ready: called between the two; waits for the other ranks, so that all measure at the same time.
    """
    restore = worker.snapshot()
    rng = np.random.default_rng(0)

    def steps(count: int) -> None:
        rows = rng.integers(len(source), size=(count, batch_size))
        worker.local_steps(source.batches(rows, worker.generator), count)
        worker.take_losses()

    steps(max(warmup_steps, 1))
    start = time.perf_counter()
    steps(1)
    count = max(1, int(CHUNK_SEC / max(time.perf_counter() - start, 1e-6)))
    ready()
    chunks: list[float] = []
    begin = time.perf_counter()
    while len(chunks) < MIN_CHUNKS or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        steps(count)
        chunks.append((time.perf_counter() - start) / count)
    restore()
    return statistics.median(chunks)


def measure_classes(
    worker: Worker, source: Source, batch_size: int, cluster: Cluster, comm: Comm, seconds: float, warmup_steps: int
) -> dict[str, float]:
    """Seconds of a local step by class, the same on all ranks: a class is as fast as its slowest rank."""
    start = partial(comm.barrier, "profile.start")
    mine = measure_step(worker, source, batch_size, seconds, warmup_steps, start)
    times = [float(t) for t in comm.gather(torch.tensor([mine], dtype=torch.float64), "profile.times")]
    worker.watch.take()
    return {c.name: max(times[r] for r in c.ranks) for c in cluster.classes}
