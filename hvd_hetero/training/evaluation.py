"""Evaluate the model on the test set, on all ranks together."""

from __future__ import annotations

import numpy as np

from hvd_hetero.comm.averaging import average_buffers
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.tensor_slots import digest
from hvd_hetero.config.schema import EvalConfig
from hvd_hetero.data import Source
from hvd_hetero.planning.plan import Plan, apportion
from hvd_hetero.training.iterate_average import IterateAverage
from hvd_hetero.worker.worker import Worker

EVAL, AVERAGED = "eval_", "averaged_"
"""What the names of figures begin with: of the model, and of an average of models."""


def evaluate(
    comm: Comm, worker: Worker, test: Source, plan: Plan, spec: EvalConfig, averaged: IterateAverage | None = None
) -> dict[str, float]:
    """Loss and metrics on the test set; every rank does a part in proportion to its speed, so that all end together.

    A module may change its buffers here too, as observers of a quantization do, and BatchNorm that stays in training
    mode: of what has changed on a rank, all have the same afterwards, by their policies.

    Args:
        averaged: an average of models, to be evaluated too.

    Returns:
        The figures by name; the same on all ranks.
    """
    counts = apportion(len(test), [c.speed for c in plan.by_rank()])
    start = sum(counts[: comm.rank])
    mine, root = np.arange(start, start + counts[comm.rank]), next(rank for rank, count in enumerate(counts) if count)

    def figures(prefix: str) -> dict[str, float]:
        worker.evaluate(test, mine, spec.batch_size)
        found = [metric.figures(comm, root) for metric in worker.measures]
        return {prefix + name: value for one in found for name, value in one.items()}

    state = worker.state
    marks, statistics = state.untrained.marks(), [digest(part) for part in state.buffers()]
    result = figures(EVAL)
    if averaged is not None:
        with averaged.in_place(comm):
            result |= figures(AVERAGED)
    moved = state.untrained.moved_since(marks) or statistics != [digest(part) for part in state.buffers()]
    if comm.size > 1 and comm.max([float(moved)], "evaluation.changed")[0]:
        # where one class trains alone, only its ranks know of what has changed so far
        ranks = plan.training[0].ranks if len(plan.training) == 1 else tuple(range(comm.size))
        if comm.rank in ranks:
            weight = plan.by_rank()[comm.rank].weight
            average_buffers(comm, state, weight, ranks, "evaluation")
    return result
