"""Evaluate the model on the test set, on all ranks together."""

from __future__ import annotations

import numpy as np

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.config.schema import EvalConfig
from hvd_hetero.data import Source
from hvd_hetero.planning.plan import Plan, apportion
from hvd_hetero.worker.worker import Worker


def evaluate(comm: Comm, worker: Worker, test: Source, plan: Plan, spec: EvalConfig, prefix: str) -> dict[str, float]:
    """Loss and metrics on the test set; every rank does a part in proportion to its speed, so that all end together.

    Returns:
        The figures by name, with a prefix; the same on all ranks.
    """
    counts = apportion(len(test), [c.speed for c in plan.by_rank()])
    start = sum(counts[: comm.rank])
    worker.evaluate(test, np.arange(start, start + counts[comm.rank]), spec.batch_size)
    root = next(rank for rank, count in enumerate(counts) if count)
    figures: dict[str, float] = {}
    for metric in worker.measures:
        figures |= metric.figures(comm, root)
    return {prefix + name: value for name, value in figures.items()}
