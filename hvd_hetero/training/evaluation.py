"""Evaluate the model on the test set, on all ranks together."""

from __future__ import annotations

from typing import Any

import numpy as np

from hvd_hetero.comm.averaging import average_buffers, average_unlike_parameters
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
    comm: Comm, worker: Worker, test: Source, plan: Plan, spec: EvalConfig, averaged: IterateAverage | None = None,
    ranks: tuple[int, ...] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Loss and metrics on the test set; every rank does a part in proportion to its speed, so that all end together.

    A module may change itself here too: observers of a quantization and BatchNorm that stays in training mode do, and
    an embedding with ``max_norm`` its weights. Of what has changed on a rank, all have the same afterwards.

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

    def all_figures() -> dict[str, float]:
        result = figures(EVAL)
        if averaged is not None:
            with averaged.in_place(comm):
                result |= figures(AVERAGED)
        return result

    if comm.size == 1:
        return all_figures()
    worker.set_eval_mode()
    state = worker.state

    def digests() -> list[Any]:
        state.refresh()  # a module may have replaced them
        return [[digest(part) for part in parts] for parts in (state.buffers(), state.parameters())]

    marks, before = state.untrained.marks(), digests()
    result = all_figures()
    moved = [one != other for one, other in zip(before, digests(), strict=True)]
    moved[0] = moved[0] or state.untrained.moved_since(marks)
    buffers, parameters = comm.max([float(each) for each in moved], "evaluation.changed")
    ranks = ranks or tuple(range(comm.size))
    if (buffers or parameters) and comm.rank in ranks:  # others do not know of what has changed so far
        weight = plan.by_rank()[comm.rank].weight
        average_buffers(comm, state, weight, ranks, "evaluation")
        if parameters:
            average_unlike_parameters(comm, state, weight, ranks)
    return result
