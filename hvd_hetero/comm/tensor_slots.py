"""The places in a module that hold its parameters and buffers, and the memory of what lies there.

A module may put another tensor into such a place at any time: ``self.mean = 0.9 * self.mean + ...`` in a forward pass
replaces a buffer. So what has to follow the model remembers places, not tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

COLUMNS = 4093
"""A digest adds up rows of so many words; a prime, so that what moves within a tensor is seen to have moved."""


@dataclass(frozen=True, eq=False, slots=True)
class Slot:
    """One place: a key of a module's parameters or buffers.

    Attributes:
        name: dotted, as in ``named_parameters``.
        holder: the module's own dictionary of parameters or of buffers.
        persistent: whether the module's ``state_dict`` has it.
    """

    name: str
    module: nn.Module
    holder: Any
    key: str
    is_parameter: bool

    @property
    def persistent(self) -> bool:
        return self.is_parameter or self.key not in self.module._non_persistent_buffers_set

    def get(self) -> Tensor | None:
        """Return what lies there now; None if nothing does."""
        return self.holder[self.key] if self.key in self.holder else None

    def set(self, tensor: Tensor) -> None:
        """Put a tensor there in place of what there was."""
        self.holder[self.key] = tensor


def slots_of(module: nn.Module) -> Iterator[Slot]:
    """Yield all places of a module and of those below it, also the empty ones and those that share a tensor."""
    for prefix, part in module.named_modules():
        for holder, is_parameter in ((part._parameters, True), (part._buffers, False)):
            for key in list(holder.keys()):
                yield Slot(f"{prefix}.{key}" if prefix else key, part, holder, key, is_parameter)


class Structure:
    """Tells whether places have come or gone, or belong to another module, without walking through all of them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._note()

    def _note(self) -> None:
        parts = list(self._module.modules())
        self._sizes = [(holder, len(holder)) for part in parts for holder in (part._parameters, part._buffers)]
        self._children = [(part._modules, list(part._modules.values())) for part in parts]

    def has_changed(self) -> bool:
        """Whether any module has got or lost a parameter or a buffer, or has another module than before."""
        same = all(len(holder) == size for holder, size in self._sizes)
        if same and all(list(holder.values()) == children for holder, children in self._children):
            return False
        self._note()
        return True


def real_view(tensor: Tensor) -> Tensor:
    """A complex tensor ``[...]`` as pairs of real numbers ``[..., 2]``, a view; others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def compact(tensor: Tensor) -> Tensor:
    """The elements that a tensor really has, as a view: of one that was expanded, each once."""
    if 0 not in tensor.stride() or not tensor.numel():
        return tensor
    sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(sizes, tensor.stride())


def as_bytes(tensor: Tensor) -> Tensor:
    """The elements of a tensor as ``[K]`` bytes on its device; a copy where they do not lie together."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)  # one element alone may have any stride


def from_bytes(data: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """What :func:`as_bytes` was given, in memory of its own."""
    return data.clone().view(dtype).view(tuple(shape))


def digest(tensor: Tensor) -> tuple[Any, ...]:
    """Type, shape and a checksum of the content of a tensor; ten times as fast as copying it to the host."""
    data = as_bytes(tensor)
    if data.storage_offset() % 8:
        data = data.clone()
    in_rows = data.numel() // (8 * COLUMNS) * COLUMNS
    sums = data[: 8 * in_rows].view(torch.int64).view(-1, COLUMNS).sum(0) if in_rows else data[:0]
    # copies: the memory of a tensor that numpy has seen could not be resized any more, as observers do it
    parts = [part.to("cpu", copy=True).numpy().tobytes() for part in (sums, data[8 * in_rows :])]
    checksum = zlib.crc32(parts[1], zlib.crc32(parts[0]))
    return str(tensor.dtype), tuple(tensor.shape), checksum


def overlapping(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, str]]:
    """Find tensors that share elements without being the same view of them.

    Returns:
        Pairs of names, each with another one that it shares memory with.
    """
    views: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
    for name, tensor in tensors:
        if tensor.numel():
            views.setdefault(memory_of(tensor), (name, tensor))
    spans = sorted((t.untyped_storage().data_ptr(), *_span(t), name, t) for name, t in views.values())
    found, cluster, end = list[tuple[str, str]](), list[tuple[int, str, Tensor]](), (0, 0)
    for storage, first, last, name, tensor in spans:
        if (storage, first) >= end:
            cluster, end = [], (storage, last)
        cluster.append((first, name, tensor))
        end = max(end, (storage, last))
        if len(cluster) > 1 and (other := _shares_with(cluster)) is not None:
            found.append((other, name))
    return found


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """What tells one view of memory from another: storage, place, shape, strides and type."""
    if not tensor.numel():
        return (id(tensor),)
    storage = tensor.untyped_storage().data_ptr()
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage between which a tensor lies."""
    first, size = int(tensor.storage_offset()), tensor.element_size()
    reach = zip(tensor.shape, tensor.stride(), strict=True)
    last = first + sum((int(count) - 1) * int(stride) for count, stride in reach)
    return first * size, (last + 1) * size


def _shares_with(cluster: list[tuple[int, str, Tensor]]) -> str | None:
    """The name of one whose elements the last one has too; their spans intersect, as columns of a matrix do."""
    start = cluster[0][0]
    owners = torch.full((max(_span(t)[1] for _, _, t in cluster) - start,), -1, dtype=torch.int32)
    shared = owners[:0]
    for number, (_, _, tensor) in enumerate(cluster):
        narrow, size = compact(tensor), tensor.element_size()
        shared = owners.as_strided(narrow.shape, [s * size for s in narrow.stride()], _span(tensor)[0] - start)
        if number < len(cluster) - 1:
            shared.fill_(number)
    other = int(shared.max())
    return None if other < 0 else cluster[other][1]
