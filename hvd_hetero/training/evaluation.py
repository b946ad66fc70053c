"""Evaluate the model on the test set, on all ranks together."""

from __future__ import annotations

import numpy as np

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.config.schema import EvalConfig
from hvd_hetero.data import Source
from hvd_hetero.planning.plan import Plan, apportion
from hvd_hetero.worker.factories import is_accuracy
from hvd_hetero.worker.losses import mean
from hvd_hetero.worker.worker import Worker


def evaluate(comm: Comm, worker: Worker, test: Source, plan: Plan, spec: EvalConfig) -> dict[str, float | None]:
    """Loss and metric on the test set; every rank does a part in proportion to its speed, so that all end together."""
    counts = apportion(len(test), [c.speed for c in plan.by_rank()])
    start = sum(counts[: comm.rank])
    mine = worker.evaluate(test, np.arange(start, start + counts[comm.rank]), spec.batch_size)
    sums = comm.sum(mine.tolist(), "evaluation")
    name = "eval_accuracy" if is_accuracy(worker.metric) else "eval_metric"
    figures: dict[str, float | None] = {"eval_loss": mean(*sums[:2])}
    return figures | ({} if worker.metric is None else {name: mean(*sums[2:])})
