"""What sums travel in: numbers as they are, or fewer bits of them.

Source of int8: Xin et al., "Global-QSGD: Allreduce-Compatible Quantization for Distributed Learning" (2023), standard
dithering. With v_i the weighted vector of rank i, of n ranks, block by block of :data:`BLOCK` elements::

    M = max_i max |v_i|                 # a MAX allreduce of one number a block
    q = floor(127 / n)                  # levels; with 127 / n itself, n of the largest may add up to 128, which is -128
    k_i = v_i q / M, rounded up or down at random, up with its fractional part as probability       # int8
    sum_i v_i = (M / q) sum_i k_i       # a SUM allreduce, in which integers add up exactly

The expectation is the sum itself, and each element errs by less than n M / q. Horovod's torch interface has no sums of
int8, but of int32: four k are the digits, to base 256, of a number that is sent in their place. As their sums are from
-127 to 127, the number's sum stays within int32, and its digits are the four sums. float16 goes the same way, rounded
to nearest, with a power of two for q / M such that no sum leaves its range.

What is sent should be small where the result is exact: differences and gradients, never a model. Running statistics
travel as they are: beside the large numbers of a block, the variance of a small one would come out below 0. Non-finite
values are found before, and the ranks that have them send zeros: who takes part travels with the maxima.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import FLAG_SLOTS
from hvd_hetero.errors import UserError

FLOAT16 = "float16"
MOST = 127
"""What a sum in int8 may come to."""
BLOCK, PIECE = 1024, 4096
"""Elements that share a maximum, and blocks that are rounded at a time, so that little memory is needed beside."""
DIGITS, ZERO, ALL_ZERO = 4, 128, 0x80808080 - 2**32
"""Of a number in int32; what a digit of 0 is in a byte, and what the number is of which all digits are 0."""
LEAST = 1e-30
"""A block whose numbers are all smaller is rounded as if its largest one were 1."""
LARGEST = 2.0**15
"""Of sums in float16; its range ends at 65504."""


class Wire:
    """Sum vectors in fewer bits; each rank rounds with random numbers of its own.

    Args:
        kind: ``float16`` or ``int8``.
        device: where the vectors lie.
        ranks: those that take part: all, or one class.

    Raises:
        UserError: Horovod cannot sum this type among these ranks.
    """

    def __init__(
        self, comm: Comm, kind: str, device: torch.device, seed: int, ranks: tuple[int, ...] | None = None
    ) -> None:
        self._rank, self._ranks = comm.rank, ranks or tuple(range(comm.size))
        self._levels = MOST // len(self._ranks)
        self._is_half = kind == FLOAT16
        self._random = torch.Generator(device).manual_seed(seed * 1000003 + comm.rank)
        trial = torch.ones(BLOCK, dtype=torch.float16 if self._is_half else torch.int32, device=device)
        try:
            comm.weighted_sum_(trial, 1.0, "wire.trial", self._ranks)
        except RuntimeError as error:
            raise UserError(f"aggregation.wire={kind!r}: this Horovod cannot sum it ({error}); set float32") from error
        if not bool((trial == len(self._ranks)).all()):
            raise UserError(f"aggregation.wire={kind!r}: this Horovod sums it wrongly; set float32")

    @torch.no_grad()
    def sum_(self, comm: Comm, vector: Tensor, weight: float, name: str, states: int = 0) -> None:
        """In place, on every rank: the sum over the ranks of weight times vector, bit-identical everywhere.

        Args:
            vector: ``[P + FLAG_SLOTS]``, with its flags written.
            weight: equal within a class.
            states: elements before the flags that travel as they are: a variance that is rounded may be below 0.
        """
        if vector.dtype == torch.float16:  # in which there is no room for what numbers are scaled with
            wide = vector.float()
            self.sum_(comm, wide, weight, name, states)
            vector.copy_(wide)
            return
        if weight != 1:
            vector.mul_(weight)
        body, exact, flags = vector.split([len(vector) - states - FLAG_SLOTS, states, FLAG_SLOTS])
        if states:
            comm.weighted_sum_(exact, 1.0, f"{name}.states", self._ranks)
        largest, total = self._agree(comm, _maxima(body), flags, name)
        if len(body):
            self._sum_rounded_(comm, body, largest, name)
        flags.copy_(total)

    def _sum_rounded_(self, comm: Comm, body: Tensor, largest: Tensor, name: str) -> None:
        up, down = (scale.to(body) for scale in self._scales(largest))
        kind = torch.float16 if self._is_half else torch.uint8
        padded = torch.full((-(-len(body) // DIGITS) * DIGITS,), self._zero, dtype=kind, device=body.device)
        sent = padded[: len(body)]
        for to, part, scale in zip(_pieces(sent), _pieces(body), up.split(PIECE), strict=True):
            to.copy_(self._rounded(_scaled(part, scale)))
        if self._is_half:
            comm.weighted_sum_(sent, 1.0, name, self._ranks)
        else:
            number = padded.view(torch.int32).sub_(ALL_ZERO)
            comm.weighted_sum_(number, 1.0, name, self._ranks)
            number.add_(ALL_ZERO)
        for to, part, scale in zip(_pieces(body), _pieces(sent), down.split(PIECE), strict=True):
            to.copy_(_scaled(part.to(to.dtype) - self._zero, scale))

    @property
    def _zero(self) -> int:
        """What a zero is while it is packed."""
        return 0 if self._is_half else ZERO

    def _agree(self, comm: Comm, maxima: Tensor, flags: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return, on the host, each block's largest maximum of all ranks, and the sums of their flags."""
        count, index = len(self._ranks), self._ranks.index(self._rank)
        shares = torch.zeros(2 * count + 1, dtype=maxima.dtype)
        kept, lost, needs_agreement = flags.tolist()
        shares[index], shares[count + index], shares[-1] = kept, lost, needs_agreement
        figures = torch.cat([maxima.cpu(), shares])
        comm.max_async_(figures, f"{name}.largest", self._ranks)()
        largest, kept_by, lost_by, agreement_of_all = figures.split([len(maxima), count, count, 1])
        return largest, torch.stack([kept_by.sum(), lost_by.sum(), agreement_of_all[0]])

    def _scales(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Return by block what is multiplied with before rounding and after, the same on all ranks to the last bit."""
        some = torch.where(largest > LEAST, largest, 1.0)
        if not self._is_half:
            return self._levels / some, some / self._levels
        most = LARGEST / len(self._ranks) / some
        up = most / torch.frexp(most).mantissa / 2
        return up, 1 / up

    def _rounded(self, numbers: Tensor) -> Tensor:
        if self._is_half:
            return numbers
        below = numbers.clamp_(-self._levels, self._levels).floor()  # a product of rounded factors may be beyond
        drawn = torch.rand(numbers.shape, dtype=numbers.dtype, device=numbers.device, generator=self._random)
        return below + (drawn < numbers - below) + ZERO

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._random.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._random.set_state(state["random"])


def _pieces(vector: Tensor) -> Sequence[Tensor]:
    return vector.split(PIECE * BLOCK)


def _blocks(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole blocks ``[blocks, BLOCK]`` and the elements that are left over ``[1, rest]``, as views."""
    in_blocks = len(vector) // BLOCK * BLOCK
    return vector[:in_blocks].view(-1, BLOCK), vector[in_blocks:].view(1, -1)


def _maxima(vector: Tensor) -> Tensor:
    """Return the largest absolute value of each block."""
    found = [torch.linalg.vector_norm(part, torch.inf, dim=1) for part in _blocks(vector) if part.numel()]
    return torch.cat(found) if found else vector.new_empty(0)


def _scaled(vector: Tensor, scale: Tensor) -> Tensor:
    """Return a vector times the scale of each block."""
    blocks, rest = _blocks(vector)
    return torch.cat([(blocks * scale[: len(blocks), None]).view(-1), (rest * scale[len(blocks) :, None]).view(-1)])
