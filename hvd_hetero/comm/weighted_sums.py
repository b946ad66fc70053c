"""Weighted sums over ranks into which no NaN and no Inf goes, of any tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import FLAG_SLOTS, sum_type, write_validity_flags
from hvd_hetero.comm.tensor_slots import real_view
from hvd_hetero.comm.wire import Wire
from hvd_hetero.errors import NonFiniteError


def average_tensors(
    comm: Comm, tensors: Sequence[Tensor], is_finite: bool, name: str, *,
    weight: float = 1.0, prescaled_weight: float = 1.0, ranks: tuple[int, ...] | None = None,
    wire: Wire | None = None,
) -> None:  # fmt: skip
    """Replaces tensors, of the same shapes and types on all ranks, by their weighted sums over the finite ranks.

    Args:
        is_finite: whether all values of this rank are finite.
        weight: that they are to be multiplied with, equal within a class.
        prescaled_weight: what is in them already.
        ranks: those that take part: all, or one class; ``wire``: what sums travel in.

    Raises:
        NonFiniteError: as :func:`average`.
    """
    types = dict.fromkeys(sum_type(real_view(t).dtype) for t in tensors)
    groups = [[t for t in tensors if sum_type(real_view(t).dtype) == dtype] for dtype in types]
    vectors = []
    for dtype, group in zip(types, groups, strict=True):
        flags = torch.empty(FLAG_SLOTS, dtype=dtype, device=group[0].device)
        vectors.append(torch.cat([*(real_view(t).reshape(-1).to(dtype) for t in group), flags]))
    sum_finite_(comm, vectors, is_finite, name, weight=weight, prescaled_weight=prescaled_weight,
                ranks=ranks, wire=wire)  # fmt: skip
    for vector, group in zip(vectors, groups, strict=True):
        reals = [real_view(t) for t in group]
        for tensor, part in zip(reals, vector[:-FLAG_SLOTS].split([t.numel() for t in reals]), strict=True):
            tensor.copy_(part.view_as(tensor))


def renormalize(
    comm: Comm, vectors: Sequence[Tensor], is_finite: bool, name: str, ranks: tuple[int, ...] | None = None
) -> bool:
    """Makes an average of sums to which not all ranks may have contributed; the same on all of them.

    Args:
        vectors: ``[P + FLAG_SLOTS]``, marked before they were summed.
        is_finite: whether this rank has contributed.

    Returns:
        Whether a rank has something for all to agree on.

    Raises:
        NonFiniteError: as :func:`average`.
    """
    if not vectors:
        return False
    # all vectors have the same flags, the widest the most exact ones
    kept, lost, needs_agreement = max(vectors, key=lambda v: v.element_size())[-FLAG_SLOTS:].tolist()
    if lost and (not kept or comm.excluded.stops):
        flags = torch.zeros(comm.size, dtype=torch.float64)
        flags[comm.rank] = float(not is_finite)
        comm.weighted_sum_(flags, 1.0, f"{name}.bad", ranks)
        raise NonFiniteError(comm.excluded.round, [r for r, flag in enumerate(flags.tolist()) if flag], bool(not kept))
    for vector in vectors if lost else ():
        vector.mul_(1 / kept)  # devices differ in how they divide by a number, and do not in how they multiply
    return bool(needs_agreement)


def sum_finite_(
    comm: Comm, vectors: Sequence[Tensor], is_finite: bool, name: str, *,
    weight: float = 1.0, prescaled_weight: float = 1.0, ranks: tuple[int, ...] | None = None,
    needs_agreement: bool = False, wire: Wire | None = None, states: Sequence[int] = (),
) -> bool:  # fmt: skip
    """Replaces marked vectors by their weighted sums over the finite ranks; see :func:`average_tensors`.

    Args:
        needs_agreement: whether this rank has something for all to agree on.
        wire: what sums over these ranks travel in; None: as they are.
        states: for each vector, how many elements before its flags travel as they are in any case.

    Returns:
        Whether any rank has.
    """
    write_validity_flags(vectors, is_finite, prescaled_weight, needs_agreement)
    for i, vector in enumerate(vectors):
        if wire is None:
            comm.weighted_sum_(vector, weight, f"{name}.{i}", ranks)
        else:
            wire.sum_(comm, vector, weight, f"{name}.{i}", states[i] if states else 0)
    return renormalize(comm, vectors, is_finite, name, ranks)


def sum_in_group_(
    comm: Comm, vectors: Sequence[Tensor], is_finite: bool, prescaled_weight: float, name: str, ranks: tuple[int, ...]
) -> float:
    """Replaces marked vectors by their sums over a group's finite ranks, over the weights of these.

    Unlike all ranks together, a group may have no finite one: then the vectors become zeros.

    Args:
        prescaled_weight: of this rank, which is in the numbers already.

    Returns:
        The weights of the finite ones.
    """
    write_validity_flags(vectors, is_finite, prescaled_weight)
    for i, vector in enumerate(vectors):
        comm.weighted_sum_(vector, 1.0, f"{name}.{i}", ranks)
    kept, lost, _ = max(vectors, key=lambda v: v.element_size())[-FLAG_SLOTS:].tolist()
    for vector in vectors if lost and kept else ():
        vector.mul_(1 / kept)
    return float(kept)
