"""What is averaged of a model, as views into one flat vector per dtype: aggregation is one in-place call, no copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvd_hetero.comm.nonfinite import FLAG_SLOTS, sum_type
from hvd_hetero.comm.tensor_slots import Slot, Structure, memory_of, overlapping, real_view, slots_of
from hvd_hetero.comm.untrained_state import AVERAGE, UntrainedState, check_policies, is_tensor_finite
from hvd_hetero.errors import ConfigError, UserError

ALIGNMENT = 64
"""Bytes: at multiples of these a tensor begins in its vector. A cache line's; at others than multiples of 16, compiled
steps copy parameters for their CUDA graphs, and have none that write to buffers (torch 2.13's source, not tried)."""

TRAINED = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
"""Types of parameters that can be averaged."""


class FlatState:
    """Moves a module's trainable parameters and running statistics into flat vectors, of which they become views.

    Build it after the module is on its device and before the optimizer. In the vectors are trainable parameters and
    buffers that are averaged, as running statistics are; everything else is in :attr:`untrained`, and so is a buffer
    that holds Inf or NaN before training, or shares its memory with another tensor. Complex tensors are pairs of real
    numbers in the vectors.

    A module may replace what it has been given (``self.mean = ...``, ``weight.data = ...``): :meth:`refresh` takes the
    new values into the vectors and puts the views back.

    Args:
        channels_last: lay out tensors of four dimensions with the second one last, on all ranks.
        policies: ``aggregation.state``, see :mod:`hvd_hetero.comm.untrained_state`.

    Attributes:
        vectors: one ``[P]`` vector per floating dtype; trainable parameters first, and zeros between tensors where the
            next one would not be aligned.
        padded: the same memory, ``[P + FLAG_SLOTS]``, with the elements for flags that travel with it.
        params: for each vector, how many of its elements belong to parameters (the rest to buffers).
        padded_gradients: as :meth:`flat_gradients`, with elements for flags.
        untrained: frozen parameters, and buffers that are in no vector.

    Raises:
        ConfigError: see :func:`check_state`.
    """

    def __init__(
        self, module: nn.Module, channels_last: bool = False, policies: Mapping[str, str] | None = None
    ) -> None:
        self._module, self._channels_last = module, channels_last
        layout = check_state(module, policies or {})
        memories = {tensor: memory_of(tensor) for tensor in layout.slots}
        self.padded: list[Tensor] = []
        self.padded_gradients: list[Tensor] = []
        self.params: list[int] = []
        self._by_vector: list[list[Tensor]] = []
        self._places: list[_Place] = []
        for dtype in dict.fromkeys(_real_type(t) for t in [*layout.trained, *layout.averaged]):
            params = [t for t in layout.trained if _real_type(t) == dtype]
            adopted = [*params, *(t for t in layout.averaged if _real_type(t) == dtype)]
            vector, views = _adopt(adopted, channels_last)
            self.padded.append(vector)
            is_complete = len(params) == len(adopted)
            self.params.append(len(vector) - FLAG_SLOTS if is_complete else _places(adopted)[len(params)])
            self._by_vector.append(params)
            self._places += [
                _Place(tensor, view, [(s.name, s.holder, s.key) for s in layout.slots[tensor]], view.data_ptr())
                for tensor, view in zip(adopted, views, strict=True)
            ]
        for tensor, (view, slots) in _aliases(layout, [(p.tensor, p.view) for p in self._places], memories).items():
            tensor.data = view
            places = [(s.name, s.holder, s.key) for s in slots]
            self._places.append(_Place(tensor, view, places, view.data_ptr()))
        self.vectors = [vector[:-FLAG_SLOTS] for vector in self.padded]
        self._known = {name for place in self._places for name, _, _ in place.slots}
        rest = (s for s in slots_of(module) if s.name not in self._known)
        self.untrained = UntrainedState(module, rest, policies or {})
        self._structure = Structure(module)

    def refresh(self) -> bool:
        """Follow what the module has replaced since the last call.

        Returns:
            Whether something outside of the vectors has changed for the first time, so that all ranks have to agree on
            what becomes of it.

        Raises:
            UserError: a tensor of the vectors has got another shape or type, or is gone, or shared otherwise.
        """
        if self._structure.has_changed():
            self._follow_modules()
        for place in self._places:
            tensor, address = place.tensor, place.address
            for _, holder, key in place.slots:
                if (key in holder and holder[key] is tensor) and tensor.data_ptr() == address:
                    continue
                self._restore(place)
                break
        return bool(self.untrained.changed())

    def _follow_modules(self) -> None:
        """Find the places again, by their names, once modules have got others or have made new ones."""
        slots = {slot.name: slot for slot in slots_of(self._module)}
        for place in self._places:
            place.slots[:] = [
                (name, slots[name].holder if name in slots else {}, key) for name, _, key in place.slots
            ]
        self.untrained.follow(slot for name, slot in slots.items() if name not in self._known)

    @torch.no_grad()
    def _restore(self, place: _Place) -> None:
        """Take the value that the module goes on with into the vector, and make the module's tensor a view again."""
        current = [(name, holder[key] if key in holder else None) for name, holder, key in place.slots]
        found = {id(now): (name, now) for name, now in current}
        (name, now), *others = found.values()
        view, tensor = place.view, place.tensor
        problem = ""
        if others:
            problem = f"shared one tensor with {place.slots[0][0]} and has one of its own now"
            name = others[0][0]
        elif now is None:
            problem = "was removed"
        elif now.shape != view.shape or now.dtype != view.dtype:
            problem = f"was {list(view.shape)} {_type(view)} and is {list(now.shape)} {_type(now)} now"
        if problem:
            what = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            remedy = "change its values only, or set aggregation.state to local for it" if what == "buffer" else (
                "change a parameter's values while training, not what it is")  # fmt: skip
            raise UserError(f"{what} {name} {problem}, so it cannot be averaged over the ranks; {remedy}")
        assert now is not None
        view.copy_(now.detach())
        tensor.data = view
        for _, holder, key in place.slots:
            holder[key] = tensor

    def parameters(self) -> list[Tensor]:
        """For each vector the ``[P]`` part that holds trainable parameters, as a view."""
        return [vector[:count] for vector, count in zip(self.vectors, self.params, strict=True)]

    def buffers(self) -> list[Tensor]:
        """For each vector that has any, the part that holds buffers, as a view."""
        parts = [vector[count:] for vector, count in zip(self.vectors, self.params, strict=True)]
        return [part for part in parts if part.numel()]

    def padded_buffers(self) -> list[Tensor]:
        """The same, with elements for flags."""
        parts = [vector[count:] for vector, count in zip(self.padded, self.params, strict=True)]
        return [part for part in parts if part.numel() > FLAG_SLOTS]

    def flat_gradients(self) -> list[Tensor]:
        """Gives each trainable parameter a zero gradient that is a view into one flat vector per dtype.

        Returns:
            The vectors, ``[P]`` as :meth:`parameters`; backward passes add to them in place, as long as nobody sets a
            gradient to None.
        """
        self.padded_gradients = [part.new_zeros(part.numel() + FLAG_SLOTS) for part in self.parameters()]
        gradients = [vector[:-FLAG_SLOTS] for vector in self.padded_gradients]
        for params, gradient in zip(self._by_vector, gradients, strict=True):
            for param, part in zip(params, _parts(gradient, params), strict=True):
                param.grad = _shaped(part, param, self._channels_last)
        return gradients

    @torch.no_grad()
    def on_host(self) -> tuple[list[Tensor], list[Tensor], dict[Tensor, nn.Parameter]]:
        """Copy what is trained to the host.

        Returns:
            Vectors ``[P]`` as :meth:`parameters`, vectors of gradients, and for each trainable parameter of the module
            one that is, with its gradient, a view into them.
        """
        vectors = [part.to("cpu", copy=True) for part in self.parameters()]
        gradients, copies = [torch.zeros_like(vector) for vector in vectors], {}
        for place, *both in zip(self._by_vector, vectors, gradients, strict=True):
            for tensor, value, gradient in zip(place, *(_parts(vector, place) for vector in both), strict=True):
                copies[tensor] = nn.Parameter(_shaped(value, tensor, self._channels_last))
                copies[tensor].grad = _shaped(gradient, tensor, self._channels_last)
        return vectors, gradients, copies

    def tensors(self) -> list[Tensor]:
        """All tensors that decide the model's outputs, the same ones in the same order on all ranks at the start."""
        return [*self.vectors, *self.untrained.tensors().values()]

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs of the model."""
        self.refresh()
        return {"vectors": self.vectors, "layout": self.layout(), "others": self.untrained.state_dict()}

    def copy(self) -> dict[str, Any]:
        """What :meth:`state_dict` gives, in memory of its own."""
        self.refresh()
        return {"vectors": [vector.clone() for vector in self.vectors], "others": self.untrained.copy()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.refresh()
        for vector, saved in zip(self.vectors, state["vectors"], strict=True):
            vector.copy_(saved)
        self.untrained.load_state_dict(state["others"])
        if self._structure.has_changed():
            self._follow_modules()

    def layout(self) -> list[str]:
        """What is where in the vectors; another model's vectors mean the same only if it is alike."""
        return [str((place.slots[0][0], list(place.view.shape), place.view.stride())) for place in self._places]


@dataclass(frozen=True, eq=False, slots=True)
class _Place:
    """A tensor of the module that is a view into a vector, and where the module holds it."""

    tensor: Tensor
    view: Tensor
    slots: list[tuple[str, Any, str]]
    address: int


@dataclass(frozen=True)
class Layout:
    """Which tensors of a module go into flat vectors.

    Attributes:
        trained: parameters with a gradient.
        averaged: floating buffers.
        slots: of each of them.
    """

    trained: list[Tensor]
    averaged: list[Tensor]
    slots: dict[Tensor, list[Slot]]


def check_state(module: nn.Module, policies: Mapping[str, str]) -> Layout:
    """Sort a module's tensors, and refuse what cannot be kept equal on all ranks.

    Args:
        policies: ``aggregation.state``.

    Raises:
        ConfigError: a tensor of a kind that cannot be sent, trained parameters of a type that has no average or that
            share memory with other tensors, or policies that do not fit this module.
    """
    slots: dict[Tensor, list[Slot]] = {}
    for slot in slots_of(module):
        tensor = slot.get()
        if tensor is not None:
            _check_kind(slot, tensor)
            slots.setdefault(tensor, []).append(slot)
    trained: list[Tensor] = [t for t in slots if isinstance(t, nn.Parameter) and t.requires_grad]
    is_trained = set(trained)
    for tensor in trained:
        if tensor.dtype not in TRAINED:
            problem = f"is trained in {_type(tensor)}, which cannot be averaged"
            raise ConfigError("model", slots[tensor][0].name, problem, "keep it in float32, or freeze it")
    names = {places[0].name: tensor for tensor, places in slots.items()}
    in_vectors = {slots[tensor][0].name for tensor in trained}
    shared = set()
    for pair in overlapping(names.items()):
        for name, other in (pair, pair[::-1]):
            if name in in_vectors:
                problem = f"shares a part of its memory with {other}"
                raise ConfigError("model", name, problem, "share whole parameters, or compute one from the other")
        shared |= set(pair)
    state = {s.name: t for t, places in slots.items() for s in places if t not in is_trained}
    check_policies(policies, state, in_vectors)
    untrained = UntrainedState(module, slots_of(module), policies)
    averaged = [
        tensor
        for tensor, places in slots.items()
        if not places[0].is_parameter and places[0].persistent and places[0].name not in shared
        if untrained.policy(places[0].name) == AVERAGE and tensor.dtype in TRAINED and is_tensor_finite(tensor)
    ]
    return Layout(trained, averaged, slots)


def _aliases(
    layout: Layout, adopted: Sequence[tuple[Tensor, Tensor]], memories: Mapping[Tensor, Any]
) -> dict[Tensor, tuple[Tensor, list[Slot]]]:
    """Find the tensors that were the same memory as one which has become a view of a vector, each with that view.

    An output layer may be frozen and hold the ``.data`` of a trained embedding: it is to follow that.
    """
    views = {memories[tensor]: view for tensor, view in adopted}
    tensors = {tensor for tensor, _ in adopted}
    found = {t: views[memory] for t, memory in memories.items() if memory in views and t not in tensors}
    return {tensor: (view, layout.slots[tensor]) for tensor, view in found.items()}


def _check_kind(slot: Slot, tensor: Tensor) -> None:
    what = "parameter" if slot.is_parameter else "buffer"
    problem = ""
    if nn.parameter.is_lazy(tensor):
        problem, remedy = "is not initialized yet", "give its layer all sizes"
    elif tensor.layout != torch.strided:
        problem, remedy = f"is sparse ({str(tensor.layout).removeprefix('torch.')})", "keep it dense"
    elif tensor.is_quantized:
        problem, remedy = f"is quantized ({_type(tensor)})", "keep it as plain numbers"
    elif tensor.is_meta:
        problem, remedy = "is on the meta device, where it has no content", "load or initialize the model first"
    if problem:
        raise ConfigError("model", slot.name, f"this {what} {problem}, and cannot be sent to other ranks", remedy)


def _adopt(tensors: list[Tensor], channels_last: bool) -> tuple[Tensor, list[Tensor]]:
    """Copy tensors of one type into a new flat vector with elements for flags; make each of them a view of its part.

    Tensors that are the same memory seen in the same way stay so.
    """
    with torch.no_grad():
        last = real_view(tensors[-1])
        size = _places(tensors)[-1] + last.numel() + FLAG_SLOTS
        flat = torch.zeros(size, dtype=last.dtype, device=last.device)
        shared: dict[Any, Tensor] = {}
        views = []
        for tensor, part in zip(tensors, _parts(flat, tensors), strict=True):
            memory = memory_of(tensor)
            if memory not in shared:
                shared[memory] = _shaped(part, tensor, channels_last)
                shared[memory].copy_(tensor)
            views.append(shared[memory])
        for tensor, view in zip(tensors, views, strict=True):
            tensor.data = view
    return flat, views


def _places(tensors: Sequence[Tensor]) -> list[int]:
    """Where in a vector each of the tensors begins."""
    places, end = [], 0
    for tensor in map(real_view, tensors):
        step = max(1, ALIGNMENT // tensor.element_size())
        places.append(-(-end // step) * step)
        end = places[-1] + tensor.numel()
    return places


def _parts(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a vector that belong to the tensors, as views."""
    sizes = [real_view(t).numel() for t in tensors]
    return [vector[start : start + size] for start, size in zip(_places(tensors), sizes, strict=True)]


def _shaped(part: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """A view of a flat part with the shape of a tensor."""
    if like.is_complex():
        return torch.view_as_complex(part.view(*like.shape, 2))
    if channels_last and like.dim() == 4:
        n, c, h, w = like.shape
        return part.view(n, h, w, c).permute(0, 3, 1, 2)
    return part.view(like.shape)


def _real_type(tensor: Tensor) -> torch.dtype:
    """The type of its elements in a vector."""
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def concat(vectors: list[Tensor]) -> Tensor:
    """Vectors of several dtypes as one of the widest, one that Horovod sums; a single such vector as it is."""
    dtype = max((sum_type(v.dtype) for v in vectors), key=lambda d: d.itemsize)
    if len(vectors) == 1:
        return vectors[0].to(dtype)
    return torch.cat([v.to(dtype) for v in vectors])


def split_like(vector: Tensor, vectors: list[Tensor]) -> tuple[Tensor, ...]:
    """The parts of what :func:`joined` made of these vectors, as views."""
    return vector.split([v.numel() for v in vectors])
