"""Evaluate the model on the test set, on all ranks together."""

from __future__ import annotations

import numpy as np

from hvd_hetero.comm.averaging import average_untrained
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.config.schema import EvalConfig
from hvd_hetero.data import Source
from hvd_hetero.planning.plan import Plan, apportion
from hvd_hetero.training.iterate_average import IterateAverage
from hvd_hetero.worker.worker import Worker

EVAL, AVERAGED = "eval_", "averaged_"
"""What the names of figures begin with: of the model, and of an average of models."""


def evaluate(
    comm: Comm, worker: Worker, test: Source, plan: Plan, spec: EvalConfig, averaged: IterateAverage | None = None,
    ranks: tuple[int, ...] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Loss and metrics on the test set; every rank does a part in proportion to its speed, so that all end together.

    A module may change its buffers here too, as observers of a quantization do: of what has changed on a rank, all have
    the same afterwards, by their policies.

    Args:
        averaged: an average of models, to be evaluated too.
        ranks: those whose models are averaged; None: all.

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

    untrained = worker.state.untrained
    marks = untrained.marks()
    result = figures(EVAL)
    if averaged is not None:
        with averaged.in_place(comm):
            result |= figures(AVERAGED)
    if comm.size > 1 and comm.max([float(untrained.moved_since(marks))], "evaluation.changed")[0]:
        if ranks is None or comm.rank in ranks:  # others do not know of what has changed so far
            weight = plan.by_rank()[comm.rank].weight
            average_untrained(comm, worker.state, weight, "evaluation", ranks=ranks)
    return result
