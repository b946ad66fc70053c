"""What is averaged of a model, as views into one flat vector per dtype: aggregation is one in-place call, no copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvd_hetero.comm.finite import SPARE, finite

ALIGNMENT = 64
"""Bytes: at multiples of these a tensor begins in its vector. A cache line's; at others than multiples of 16, compiled
steps copy parameters for their CUDA graphs, and have none that write to buffers (torch 2.13's source, not tried)."""


class FlatState:
    """Moves a module's trainable parameters and floating buffers into flat vectors, of which they become views.

    Build it after the module is on its device and before the optimizer. Frozen parameters are the same on every rank
    for ever, so they stay out. Integer buffers (BatchNorm's ``num_batches_tracked``) are few and tiny: they are copied
    to and fro as one int64 vector. A buffer that holds Inf or NaN before training (an attention mask) is taken for a
    constant, and stays out as well.

    Args:
        channels_last: lay out tensors of four dimensions with the second one last, on all ranks.

    Attributes:
        vectors: one ``[P]`` vector per floating dtype; trainable parameters first, and zeros between tensors where the
            next one would not be aligned.
        padded: the same memory, ``[P + SPARE]``, with the spare elements that travel with it.
        params: for each vector, how many of its elements belong to parameters (the rest to buffers).
        padded_gradients: as :meth:`flat_gradients`, with spare elements.
    """

    def __init__(self, module: nn.Module, channels_last: bool = False) -> None:
        self._channels_last = channels_last
        trainable = [p for p in module.parameters() if p.requires_grad]
        floating = [b for b in module.buffers() if b.is_floating_point()]
        self._integer = [b for b in module.buffers() if not b.is_floating_point() and not b.is_complex()]
        self._frozen: list[Tensor] = [p for p in module.parameters() if not p.requires_grad]
        self._frozen += [b for b in floating if not finite([b])]
        floating = [b for b in floating if finite([b])]
        dtypes = dict.fromkeys(t.dtype for t in [*trainable, *floating])
        self.padded: list[Tensor] = []
        self.padded_gradients: list[Tensor] = []
        self.params: list[int] = []
        self._by_vector: list[list[nn.Parameter]] = []
        for dtype in dtypes:
            params = [p for p in trainable if p.dtype == dtype]
            adopted = [*params, *(b for b in floating if b.dtype == dtype)]
            self.padded.append(_adopt(adopted, channels_last))
            whole = len(params) == len(adopted)
            self.params.append(len(self.padded[-1]) - SPARE if whole else _places(adopted)[len(params)])
            self._by_vector.append(params)
        self.vectors = [vector[:-SPARE] for vector in self.padded]

    def parameters(self) -> list[Tensor]:
        """For each vector the ``[P]`` part that holds trainable parameters, as a view."""
        return [vector[:count] for vector, count in zip(self.vectors, self.params, strict=True)]

    def buffers(self) -> list[Tensor]:
        """For each vector that has any, the part that holds buffers, as a view."""
        parts = [vector[count:] for vector, count in zip(self.vectors, self.params, strict=True)]
        return [part for part in parts if part.numel()]

    def padded_buffers(self) -> list[Tensor]:
        """The same, with spare elements."""
        parts = [vector[count:] for vector, count in zip(self.padded, self.params, strict=True)]
        return [part for part in parts if part.numel() > SPARE]

    def flat_gradients(self) -> list[Tensor]:
        """Gives each trainable parameter a zero gradient that is a view into one flat vector per dtype.

        Returns:
            The vectors, ``[P]`` as :meth:`parameters`; backward passes add to them in place, as long as nobody sets a
            gradient to None.
        """
        self.padded_gradients = [part.new_zeros(part.numel() + SPARE) for part in self.parameters()]
        gradients = [vector[:-SPARE] for vector in self.padded_gradients]
        for params, gradient in zip(self._by_vector, gradients, strict=True):
            for param, part in zip(params, _parts(gradient, params), strict=True):
                param.grad = _shaped(part, param, self._channels_last)
        return gradients

    def integers(self) -> Tensor | None:
        """The integer buffers as one ``[K]`` int64 vector on the CPU, or None if there are none."""
        if not self._integer:
            return None
        return torch.cat([b.detach().reshape(-1).to(torch.int64) for b in self._integer]).cpu()

    def set_integers(self, values: Tensor) -> None:
        """Writes back what :meth:`integers` gave, after it was aggregated."""
        parts = values.to(self._integer[0].device).split([b.numel() for b in self._integer])
        with torch.no_grad():
            for buffer, part in zip(self._integer, parts, strict=True):
                buffer.copy_(part.view(buffer.shape))

    def everything(self) -> list[Tensor]:
        """All tensors that decide the model's outputs, for the first broadcast; vectors, integers and frozen ones."""
        return [*self.vectors, *self._integer, *(p.detach() for p in self._frozen)]


def _adopt(tensors: list[Tensor], channels_last: bool) -> Tensor:
    """Copies tensors of one dtype into a new flat vector with spare elements; makes each of them a view of its part."""
    with torch.no_grad():
        last = tensors[-1]
        flat = torch.zeros(_places(tensors)[-1] + last.numel() + SPARE, dtype=last.dtype, device=last.device)
        for tensor, part in zip(tensors, _parts(flat, tensors), strict=True):
            view = _shaped(part, tensor, channels_last)
            view.copy_(tensor)
            tensor.data = view
    return flat


def _places(tensors: Sequence[Tensor]) -> list[int]:
    """Where in a vector each of the tensors begins."""
    places, end = [], 0
    for tensor in tensors:
        step = max(1, ALIGNMENT // tensor.element_size())
        places.append(-(-end // step) * step)
        end = places[-1] + tensor.numel()
    return places


def _parts(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a vector that belong to the tensors, as views."""
    return [vector[start : start + t.numel()] for start, t in zip(_places(tensors), tensors, strict=True)]


def _shaped(part: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """A view of a flat part with the shape of a tensor."""
    if channels_last and like.dim() == 4:
        n, c, h, w = like.shape
        return part.view(n, h, w, c).permute(0, 3, 1, 2)
    return part.view(like.shape)


def joined(vectors: list[Tensor]) -> Tensor:
    """Vectors of several dtypes as one of the widest; a single vector as it is."""
    if len(vectors) == 1:
        return vectors[0]
    dtype = max((v.dtype for v in vectors), key=lambda d: d.itemsize)
    return torch.cat([v.to(dtype) for v in vectors])


def parts_of(vector: Tensor, vectors: list[Tensor]) -> tuple[Tensor, ...]:
    """The parts of what :func:`joined` made of these vectors, as views."""
    return vector.split([v.numel() for v in vectors])
