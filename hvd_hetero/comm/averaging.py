"""Averages over ranks into which no NaN and no Inf goes.

Ranks whose values are non-finite are left out, and the weights of the others are scaled up to 1. Where all are finite,
the weighted sum stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.flat_params import FlatState
from hvd_hetero.comm.nonfinite import FLAG_SLOTS, all_finite, scale_, summable
from hvd_hetero.comm.paths import FLAT
from hvd_hetero.comm.tensor_slots import digest
from hvd_hetero.comm.untrained_averaging import UntrainedAverages
from hvd_hetero.comm.weighted_sums import average_tensors, sum_finite_
from hvd_hetero.comm.wire import Wire
from hvd_hetero.errors import NonFiniteError


@dataclass(frozen=True)
class ModelDifferences:
    """What an average of models sends in place of them: their differences from a model that all ranks hold.

    Attributes:
        base: that model's vectors, in memory of their own.
        wire: what the differences travel in.
    """

    base: Sequence[Tensor]
    wire: Wire

    def subtract_base(self, vectors: Sequence[Tensor]) -> None:
        """Turn models into differences, in place."""
        for vector, base in zip(vectors, self.base, strict=True):
            vector.sub_(base)

    def add_base(self, vectors: Sequence[Tensor]) -> None:
        """Turn differences into models again."""
        for vector, base in zip(vectors, self.base, strict=True):
            vector.add_(base)


def average(
    comm: Comm, state: FlatState, weight: float, name: str = "average", differences: ModelDifferences | None = None
) -> bool:
    """Replaces every rank's model by sum_i w_i x_i (paper, eq. 4) over the ranks with finite values.

    What is in no flat vector follows its policy, see :mod:`hvd_hetero.comm.untrained_state`.

    Args:
        weight: w of this rank; the weights of all ranks sum to 1 and are equal within a class.
        differences: how differences are sent; None: models are, as they are.

    Returns:
        Whether this rank's own model was finite. If not, all else that its steps have made is to be forgotten too.

    Raises:
        NonFiniteError: on all ranks, if no rank's model is finite, or if one that is not is to stop the job.
        UserError: a tensor is not what it was, so that it cannot be averaged.
    """
    with comm.timed():
        is_finite = _average(comm, state, weight, name, differences)
    if not is_finite:
        comm.excluded.record()
    return is_finite


def _average(comm: Comm, state: FlatState, weight: float, name: str, differences: ModelDifferences | None) -> bool:
    needs_agreement = state.refresh()
    vectors = [summable(vector) for vector in state.padded]
    contents = [vector[:-FLAG_SLOTS] for vector in vectors]
    own_weight = weight
    if differences is not None:
        differences.subtract_base(contents)
    if comm.path == FLAT:
        is_finite, weight, prescaled_weight = scale_(contents, weight), 1.0, weight
    else:
        is_finite, prescaled_weight = all_finite(contents), 1.0
    untrained = UntrainedAverages(comm, state.untrained, own_weight, is_finite, f"{name}.others")
    untrained.begin()
    states = [len(content) - params for content, params in zip(contents, state.params, strict=True)]
    needs_agreement = sum_finite_(comm, vectors, is_finite, name, weight=weight, prescaled_weight=prescaled_weight,
                                  needs_agreement=needs_agreement, states=states,
                                  wire=None if differences is None else differences.wire)  # fmt: skip
    if differences is not None:
        differences.add_base(contents)
    for padded, total in zip(state.padded, vectors, strict=True):
        if padded is not total:
            padded.copy_(total)
    untrained.finish()
    if needs_agreement:
        untrained.agree()
    return is_finite


def average_buffers(comm: Comm, state: FlatState, weight: float, ranks: tuple[int, ...], name: str = "buffers") -> None:
    """Replaces everything but the trainable parameters, on the given ranks.

    Args:
        weight: of this rank; may differ within a class.
        ranks: all ranks, or those of one class.

    Raises:
        NonFiniteError, UserError: as :func:`average`.
    """
    state.refresh()
    is_finite = all_finite(state.buffers())
    vectors = [summable(vector) for vector in state.padded_buffers()]
    for vector in vectors:
        vector[:-FLAG_SLOTS].mul_(weight)
    untrained = UntrainedAverages(comm, state.untrained, weight, is_finite, f"{name}.others", ranks)
    untrained.begin()
    sum_finite_(comm, vectors, is_finite, name, prescaled_weight=weight, ranks=ranks)
    for buffer, total in zip(state.padded_buffers(), vectors, strict=True):
        if buffer is not total:
            buffer.copy_(total)
    untrained.finish()
    untrained.agree_on_changes()
    if not is_finite:
        comm.excluded.record()


def average_unlike_parameters(comm: Comm, state: FlatState, weight: float, ranks: tuple[int, ...]) -> None:
    """Replaces trained parameters that synchronous replicas should share, where some rank's have become others.

    Steps along one gradient keep them equal; a module that writes to its own parameters from its batch does not.

    Args:
        weight: of this rank; those of the given ranks sum to 1.
        ranks: all ranks, or those of one class.

    Raises:
        NonFiniteError: as :func:`average`.
    """
    mine = torch.tensor([digest(part)[-1] for part in state.parameters()])
    first, *others = comm.gather(mine, "parameters.digest", ranks=ranks)
    if not all(torch.equal(first, other) for other in others):
        parts = [part.clone() for part in state.parameters()]
        average_tensors(comm, parts, all_finite(parts), "parameters", weight=weight, ranks=ranks)
        for param, average in zip(state.parameters(), parts, strict=True):
            param.copy_(average)


def average_untrained(
    comm: Comm, state: FlatState, weight: float, name: str = "others", only_new: bool = False,
    ranks: tuple[int, ...] | None = None,
) -> None:  # fmt: skip
    """Replaces what is in no flat vector, on all ranks, after a thorough look at what has changed.

    Args:
        weight: of this rank.
        only_new: leave alone what is known to change: it has just been averaged.
        ranks: those that take part: all, or one class.

    Raises:
        UserError: as :func:`average`.
    """
    state.refresh()
    untrained = UntrainedAverages(comm, state.untrained, weight, True, name, ranks)
    if not only_new:
        untrained.begin()
        untrained.finish()
    untrained.agree_on_changes()


def check_partial(comm: Comm, parameters: Sequence[Tensor], averages: int) -> None:
    """Ends the job where no rank's values are finite; all ranks call it after the same rounds of partial collectives.

    Args:
        parameters: the model that all ranks hold then.
        averages: rounds to which somebody had contributed.

    Raises:
        NonFiniteError: on all ranks.
    """
    if not all_finite(parameters) or (not averages and comm.max([-float(comm.excluded.since)], "partial.bad")[0] < 0):
        raise NonFiniteError(comm.excluded.round, range(comm.size), all_ranks=True)
