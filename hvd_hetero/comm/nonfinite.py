"""Non-finite values (NaN, Inf): how they are found, how a sum says that a rank was left out of it, and who has been.

Every vector that is summed has elements for flags at its end. A finite rank puts its weight into the first of them and
0 into the second; a non-finite one sends nothing but its weight in the second. So the sum itself tells all ranks,
exactly, whether anybody was left out and whether anybody was not, without a further collective. The third tells them in
the same way that a rank has something for all to agree on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_hetero.comm.tensor_slots import real_view
from hvd_hetero.errors import NonFiniteError
from hvd_hetero.log import LOGGER

FLAG_SLOTS = 3
SUMMED = (torch.float16, torch.float32, torch.float64)
"""Floating types that Horovod has sums for."""
CHUNK, PIECE = 1 << 26, 1 << 18
"""Elements: cuBLAS takes no longer vectors than 2**31, and a core's cache holds about a megabyte."""


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether there is no NaN and no Inf in tensors of one device."""
    parts = [part for tensor in tensors for part in real_view(tensor.detach()).reshape(-1).split(CHUNK)]
    if not parts:
        return True
    squares = [torch.dot(part, part) for part in parts]
    if parts[0].device.type == "cpu":
        total = sum(map(float, squares))
    else:  # to wait for the device once is enough
        total = float(torch.stack([square.float() for square in squares]).sum())
    return math.isfinite(total) or _has_finite_extremes(parts)


def scale_(vectors: Sequence[Tensor], weight: float) -> bool:
    """Multiplies host vectors in place; returns whether there is no NaN and no Inf in them.

    Piece by piece: a piece is still in the core's cache when it is multiplied, so most of the looking costs no time.
    """
    total = 0.0
    for vector in vectors:
        for piece in vector.split(PIECE):
            total += float(torch.dot(piece, piece))
            piece.mul_(weight)
    return math.isfinite(total) or _has_finite_extremes(vectors)


def _has_finite_extremes(tensors: Sequence[Tensor]) -> bool:
    """The test that counts: squares of finite numbers may be too large; a NaN among the numbers is both extremes."""
    return all(bool(torch.stack(torch.aminmax(t)).isfinite().all()) for t in tensors if t.numel())


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which tensors of a real floating type are summed: itself, or float32 where Horovod lacks it."""
    return dtype if dtype in SUMMED else torch.float32


def summable(vector: Tensor) -> Tensor:
    """The vector itself, or a copy in a type that Horovod sums."""
    return vector.to(sum_type(vector.dtype))


def write_validity_flags(
    vectors: Sequence[Tensor], is_finite: bool, prescaled_weight: float = 1.0, needs_agreement: bool = False
) -> None:
    """Makes ready what a rank is about to send.

    Args:
        vectors: ``[P + FLAG_SLOTS]``, of which a non-finite rank sends zeros.
        prescaled_weight: of this rank, as far as it is in the numbers already.
        needs_agreement: whether this rank has something for all to agree on.
    """
    for vector in vectors:
        if not is_finite:
            vector.zero_()
        flags = [prescaled_weight if is_finite else 0.0, 0.0 if is_finite else prescaled_weight, float(needs_agreement)]
        vector[-FLAG_SLOTS:] = torch.tensor(flags, dtype=vector.dtype)


class Exclusions:
    """What a rank was left out of, because its values were non-finite.

    Args:
        stops: end the job instead.

    Attributes:
        round: the one that is worked on, counted from 1 over the whole run.
        count: contributions that were left out, and ``since``, those after the last average that was made.
    """

    def __init__(self, rank: int, stops: bool = False) -> None:
        self._rank, self.stops = rank, stops
        self.round = self.count = self.since = self._popped = 0

    def record(self) -> None:
        """This rank's contribution has been left out; the first, second, fourth, ... time it says so.

        Raises:
            NonFiniteError: one is enough to stop.
        """
        if self.stops:
            raise NonFiniteError(self.round, [self._rank])
        self.count += 1
        self.since += 1
        if self.count & (self.count - 1) == 0:
            times = "" if self.count == 1 else f", {self.count} times so far"
            LOGGER.warning("hvd-hetero: rank %s: its values are non-finite (NaN, Inf) in round %s; it was excluded%s",
                           self._rank, self.round, times)  # fmt: skip

    @property
    def pending(self) -> int:
        """How many since the last :meth:`pop`."""
        return self.count - self._popped

    def pop(self) -> int:
        """How many since the last call."""
        taken, self._popped = self.pending, self.count
        return taken
