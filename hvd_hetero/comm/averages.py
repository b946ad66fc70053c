"""Averages over ranks into which no NaN and no Inf goes.

Ranks whose numbers are bad are left out, and the weights of the others are scaled up to 1. Where all are good, the
weighted sum stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvd_hetero.comm.finite import SPARE, finite, mark, scale_
from hvd_hetero.comm.flat import FlatState
from hvd_hetero.comm.horovod import Comm
from hvd_hetero.comm.paths import FLAT
from hvd_hetero.errors import BadNumbers


def average(comm: Comm, state: FlatState, weight: float, name: str = "average") -> bool:
    """Replaces every rank's model by sum_i w_i x_i (paper, eq. 4) over the good ranks.

    Integer buffers take the maximum over all.

    Args:
        weight: w of this rank; the weights of all ranks sum to 1 and are equal within a class.

    Returns:
        Whether this rank's own model was good. If not, all else that its steps have made is to be forgotten too.

    Raises:
        BadNumbers: on all ranks, if no rank's model is good, or if a bad one is to stop the job.
    """
    if comm.path == FLAT:
        good, weight, share = scale_(state.vectors, weight), 1.0, weight
    else:
        good, share = finite(state.vectors), 1.0
    finish = _begin_integers(comm, state, name)
    _sum_good_(comm, state.padded, good, name, weight=weight, share=share)
    finish()
    if not good:
        comm.left_out.note()
    return good


def average_buffers(comm: Comm, state: FlatState, weight: float, ranks: tuple[int, ...], name: str = "buffers") -> None:
    """Replaces the buffers alone, on the given ranks; integer buffers take the maximum.

    Args:
        weight: of this rank; may differ within a class.
        ranks: all ranks, or those of one class.

    Raises:
        BadNumbers: as :func:`average`.
    """
    good = finite(state.buffers())
    for buffers in state.buffers():
        buffers.mul_(weight)
    finish = _begin_integers(comm, state, name, ranks)
    _sum_good_(comm, state.padded_buffers(), good, name, share=weight, ranks=ranks)
    finish()
    if not good:
        comm.left_out.note()


def average_tensors(
    comm: Comm, tensors: Sequence[Tensor], good: bool, name: str, *,
    weight: float = 1.0, share: float = 1.0, ranks: tuple[int, ...] | None = None,
) -> None:  # fmt: skip
    """Replaces tensors, of the same shapes and types on all ranks, by their weighted sums over the good ranks.

    Args:
        good: whether this rank is one.
        weight: that they are to be multiplied with, equal within a class; ``share``: what is in them already.
        ranks: those that take part: all, or one class.

    Raises:
        BadNumbers: as :func:`average`.
    """
    groups = [[t for t in tensors if t.dtype == dtype] for dtype in dict.fromkeys(t.dtype for t in tensors)]
    vectors = [torch.cat([*(t.reshape(-1) for t in group), group[0].new_empty(SPARE)]) for group in groups]
    _sum_good_(comm, vectors, good, name, weight=weight, share=share, ranks=ranks)
    for vector, group in zip(vectors, groups, strict=True):
        for tensor, part in zip(group, vector[:-SPARE].split([t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def settle(comm: Comm, vectors: Sequence[Tensor], good: bool, name: str, ranks: tuple[int, ...] | None = None) -> None:
    """Makes an average of sums to which not all ranks may have contributed; the same on all of them.

    Args:
        vectors: ``[P + SPARE]``, marked before they were summed.
        good: whether this rank has contributed.

    Raises:
        BadNumbers: as :func:`average`.
    """
    for vector in vectors:
        kept, lost = vector[-SPARE:].tolist()
        if lost and (not kept or comm.left_out.stops):
            said = torch.zeros(comm.size, dtype=torch.float64)
            said[comm.rank] = float(not good)
            comm.weighted_sum_(said, 1.0, f"{name}.bad", ranks)
            raise BadNumbers(comm.left_out.round, [r for r, bad in enumerate(said.tolist()) if bad], bool(not kept))
        if lost:
            vector.mul_(1 / kept)  # devices differ in how they divide by a number, and do not in how they multiply


def check_partial(comm: Comm, parameters: Sequence[Tensor], averages: int) -> None:
    """Ends the job where nobody's numbers are good; all ranks call it after the same rounds of partial collectives.

    Args:
        parameters: the model that all ranks hold then.
        averages: rounds to which somebody had contributed.

    Raises:
        BadNumbers: on all ranks.
    """
    if not finite(parameters) or (not averages and comm.max([-float(comm.left_out.since)], "partial.bad")[0] < 0):
        raise BadNumbers(comm.left_out.round, range(comm.size), everybody=True)


def _sum_good_(
    comm: Comm, vectors: Sequence[Tensor], good: bool, name: str, *,
    weight: float = 1.0, share: float = 1.0, ranks: tuple[int, ...] | None = None,
) -> None:  # fmt: skip
    mark(vectors, good, share)
    for i, vector in enumerate(vectors):
        comm.weighted_sum_(vector, weight, f"{name}.{i}", ranks)
    settle(comm, vectors, good, name, ranks)


def _begin_integers(
    comm: Comm, state: FlatState, name: str, ranks: tuple[int, ...] | None = None
) -> Callable[[], None]:
    """Begins to take the maxima of integer buffers; the result waits for them.

    They travel beside the sums: one collective after the other would wait for slow ranks to wake up once more. Where
    the sums fail, they are left on their way, and no more is sent: the rank ends.
    """
    integers = state.integers()
    if integers is None:
        return lambda: None
    finish = comm.max_async_(integers, f"{name}.integers", ranks)

    def put_back() -> None:
        finish()
        state.set_integers(integers)

    return put_back
