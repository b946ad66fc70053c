"""Frozen parameters and buffers outside of the flat vectors: which of them change, and what is to become of those.

Nothing of them travels before it has changed on some rank. From then on each of them follows its policy
(``aggregation.state``) whenever all ranks meet:

==========  =========================================================================================================
average     the weighted average, as of trainable parameters; for floating and complex tensors
root        what one rank has, bit by bit: the first of those with the largest weight
max         the largest, element by element
sum         what it was, plus what every rank has added to it
local       each rank keeps its own
==========  =========================================================================================================

Unless the user says otherwise, frozen parameters (the teacher of a self-distillation) are averaged, and so are running
statistics that were finite at the start; of how many batches these have seen the maximum is taken. Any other buffer may
be a queue, a pointer into it or a table, of which an average would mean nothing: all of them come from one rank, as
with PyTorch's DistributedDataParallel, so that they fit together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hvd_hetero.comm.nonfinite import all_finite
from hvd_hetero.comm.tensor_slots import Slot, compact, digest, from_bytes, real_view
from hvd_hetero.errors import ConfigError, UserError, nearest

AVERAGE, ROOT, MAX, SUM, LOCAL = "average", "root", "max", "sum", "local"
POLICIES = (AVERAGE, ROOT, MAX, SUM, LOCAL)
KEY = "aggregation.state"


class UntrainedState:
    """The tensors of a module that no optimizer trains and no flat vector holds.

    Args:
        module: the whole model.
        slots: places that hold such tensors, or are empty.
        policies: pattern of names to policy; the last pattern that fits counts.

    Attributes:
        active: those that have changed on some rank, and the policy of each.
        base: of those that are summed, what they were when all ranks last met.
    """

    def __init__(self, module: nn.Module, slots: Iterable[Slot], policies: Mapping[str, str]) -> None:
        self._module, self._policies = module, policies
        self._slots: dict[str, Slot] = {}
        self._seen: dict[str, _Seen] = {}
        self._digests: dict[str, tuple[Any, ...]] = {}
        self._kinds: dict[str, str] = {}
        self._began_infinite: set[str] = set()
        self.active: dict[str, str] = {}
        self.base: dict[str, Tensor] = {}
        self.add(slots)
        self._first = set(self._slots)

    def add(self, slots: Iterable[Slot]) -> None:
        """Look after further places; what lies there already counts as changed."""
        for slot in slots:
            self._slots.setdefault(slot.name, slot)

    def follow(self, slots: Iterable[Slot]) -> None:
        """Look after these places from now on, in place of those that there were."""
        self._slots = {slot.name: slot for slot in slots}

    def tensors(self) -> dict[str, Tensor]:
        """What lies in these places now, by name; a tensor that several share has the name of the first."""
        found: dict[int, tuple[str, Tensor]] = {}
        for name, slot in self._slots.items():
            tensor = slot.get()
            if tensor is not None:
                found.setdefault(id(tensor), (name, tensor.detach()))
        return dict(found.values())

    # ---- what has changed -------------------------------------------------------------------------------------------

    def remember(self) -> None:
        """Take what there is for what all ranks have; called when they have just been given it."""
        is_start = not self._digests
        for name, tensor in self.tensors().items():
            self._digests[name] = digest(tensor)
            self._see(name)
            if is_start and not self._slots[name].is_parameter and not is_tensor_finite(tensor):
                self._began_infinite.add(name)
            if self.policy(name) == SUM:
                self.base[name] = tensor.clone()
        for name in self._slots.keys() - self._digests.keys():
            self._see(name)

    def changed(self, thorough: bool = False) -> list[str]:
        """The names of those that are not active yet, and are no more what all ranks were given.

        Args:
            thorough: look at the content of all. Else only at that of tensors which PyTorch says were written to; it
                does not know what was written through ``.data``, or by some of its own kernels, as those of observers.
        """
        found = []
        for name, slot in self._slots.items():
            tensor = None if name in self.active else slot.get()
            if tensor is None:
                continue
            if not thorough and name in self._seen and self._seen[name].is_still(tensor):
                continue
            if self.policy(name) == LOCAL or self._digests.get(name) == digest(tensor):
                self._see(name)
            else:
                found.append(name)
        if not found:
            return []
        named = self.tensors()
        for name in found:
            if name not in named:  # it is shared with another one, which is looked at
                self._see(name)
        return [name for name in found if name in named]

    def _see(self, name: str) -> None:
        tensor = self._slots[name].get()
        if tensor is not None:
            self._seen[name] = _Seen(tensor)

    def marks(self) -> dict[str, Any]:
        """Return what tells later whether any of these tensors has been replaced or written to since.

        Of a buffer it is the content, as not all that writes to one tells PyTorch.
        """
        return {name: _Seen(tensor) if self._slots[name].is_parameter else digest(tensor)
                for name, tensor in self._followed().items()}  # fmt: skip

    def moved_since(self, marks: Mapping[str, Any]) -> bool:
        """Say whether one has that ranks share; active ones too, and new ones."""

        def is_still(mark: Any, tensor: Tensor) -> bool:
            return mark.is_still(tensor) if isinstance(mark, _Seen) else bool(mark == digest(tensor))

        return not all(is_still(marks.get(name), tensor) for name, tensor in self._followed().items())

    def _followed(self) -> dict[str, Tensor]:
        """The tensors themselves, which :meth:`tensors` detaches, of all whose policy is not to be local."""
        found = {name: slot.get() for name, slot in self._slots.items() if self.policy(name) != LOCAL}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def policy(self, name: str) -> str:
        """What is to be done with one that has changed."""
        fitting = [policy for pattern, policy in self._policies.items() if fnmatchcase(name, pattern)]
        if fitting:
            return fitting[-1]
        usual = default_policy(self._slots[name])
        return ROOT if usual == AVERAGE and name in self._began_infinite else usual

    def activate(self, names: Iterable[str]) -> None:
        """Let these follow their policies from now on; the same on all ranks."""
        tensors = self.tensors()
        self.active |= {name: self.policy(name) for name in names}
        for name, policy in self.active.items():
            if policy == SUM and name not in self.base:
                self.base[name] = torch.zeros_like(tensors[name])

    def keep_local(self, names: Iterable[str]) -> None:
        """Let each rank keep its own of these, whatever they become."""
        self.active |= dict.fromkeys(names, LOCAL)

    def is_cache(self, name: str, tensor: Tensor) -> bool:
        """Whether a module keeps something there that it can make again: not saved, and of no fixed shape."""
        known = self._digests.get(name)
        return not self._slots[name].persistent and (known is None or known[:2] != digest(tensor)[:2])

    def checked(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The active tensors of these names.

        Raises:
            UserError: one is gone, or has another shape or type than when it became active.
        """
        tensors = {}
        for name in names:
            tensor = self._slots[name].get() if name in self._slots else None
            kind = "gone" if tensor is None else f"{list(tensor.shape)} {_type(tensor)}"
            if tensor is None or kind != self._kinds.setdefault(name, kind):
                problem = f"{name} was {self._kinds.get(name)} and is {kind} now, so ranks cannot agree on it"
                raise UserError(f"{problem}; keep its shape, or set {KEY}.{name}=local")
            tensors[name] = tensor.detach()
        return tensors

    # ---- what is put there ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Give a place the content of a tensor: in place where that can be, so that who shares the tensor sees it."""
        current = self._slots[name].get()
        same = current is not None and (current.shape, current.dtype) == (value.shape, value.dtype)
        if current is not None and same and not current.is_inference():
            narrow = compact(current.detach())
            part = value[tuple(slice(size) for size in narrow.shape)]
            if narrow.shape == current.shape or torch.equal(part.expand(current.shape), value):
                narrow.copy_(part)
                return
        value = value.detach().clone()
        if current is not None and self._slots[name].is_parameter:
            current.data = value
            return
        for slot in self._slots.values():
            if slot.name == name or (current is not None and slot.get() is current):
                slot.set(nn.Parameter(value, requires_grad=False) if slot.is_parameter else value)

    def kinds(self) -> list[list[Any]]:
        """Name, type, shape and kind of each tensor; what :meth:`receive` needs beside their bytes."""
        return [
            [name, _type(t), list(t.shape), self._slots[name].is_parameter, self._slots[name].persistent]
            for name, t in self.tensors().items()
        ]

    def receive(self, kinds: Iterable[Sequence[Any]], data: Tensor) -> None:
        """Take the tensors of another rank, also those that this rank's module has not made yet.

        Args:
            data: ``[K]`` bytes of all of them, one after the other.
        """
        start = 0
        for name, type_name, shape, is_parameter, persistent in kinds:
            if name not in self._slots:
                self._register(name, is_parameter, persistent)
            dtype = getattr(torch, type_name)
            end = start + math.prod(shape) * dtype.itemsize
            self.put(name, from_bytes(data[start:end], dtype, shape).to(self._device()))
            start = end

    def _device(self) -> torch.device:
        return next(self._module.parameters()).device

    def state_dict(self) -> dict[str, Any]:
        """The tensors, and how far it is known that they change."""
        names = list(self.tensors())
        return {
            "tensors": self.tensors(),
            "parameters": [name for name in names if self._slots[name].is_parameter],
            "persistent": [name for name in names if self._slots[name].persistent],
            "digests": {name: list(known) for name, known in self._digests.items()},
            "active": self.active,
            "base": self.base,
        }

    def copy(self) -> dict[str, Any]:
        """What :meth:`state_dict` gives, in memory of its own."""
        state = self.state_dict()
        for key in ("tensors", "base"):
            state[key] = {name: tensor.clone() for name, tensor in state[key].items()}
        return state | {"active": dict(self.active)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave: make what a module had made by then, remove what it has made since."""
        device = self._device()
        for name, tensor in state["tensors"].items():
            if name not in self._slots:
                self._register(name, name in state["parameters"], name in state["persistent"])
            self.put(name, tensor.to(device))
        for name in self.tensors().keys() - state["tensors"].keys():
            slot = self._slots[name]
            if name in self._first:
                slot.holder[slot.key] = None
            else:
                del slot.holder[slot.key], self._slots[name]
        self._kinds.clear()
        self._seen.clear()
        self._digests = {name: (kind, tuple(shape), check) for name, (kind, shape, check) in state["digests"].items()}
        self.active = dict(state["active"])
        self.base = {name: tensor.to(device, copy=True) for name, tensor in state["base"].items()}

    def _register(self, name: str, is_parameter: bool, persistent: bool) -> None:
        path, _, key = name.rpartition(".")
        try:
            part = self._module.get_submodule(path)
        except AttributeError as error:
            problem = f"the model has no module {path!r}, whose {key} the checkpoint holds"
            raise UserError(f"{problem}: make it in the model's __init__, not while it is trained") from error
        if is_parameter:
            part.register_parameter(key, None)
        else:
            part.register_buffer(key, None, persistent)
        self.add([Slot(name, part, part._parameters if is_parameter else part._buffers, key, is_parameter)])


def default_policy(slot: Slot) -> str:
    """What becomes of the tensor in a place if the user has not said it."""
    if slot.is_parameter:
        return AVERAGE
    if not isinstance(slot.module, _NormBase) and not slot.key.startswith("running_"):
        return ROOT
    tensor = slot.get()
    return AVERAGE if tensor is None or _is_floating(tensor) else MAX


def check_policies(policies: Mapping[str, Any], names: Mapping[str, Tensor], trained: Iterable[str]) -> None:
    """Check ``aggregation.state`` against a model.

    Args:
        names: frozen parameters and buffers, by name.
        trained: names of the parameters that are trained.

    Raises:
        ConfigError: an unknown policy, one that a tensor's type has no meaning for, or a pattern that fits nothing.
    """
    for pattern, policy in policies.items():
        if policy not in POLICIES:
            raise ConfigError(f"{KEY}.{pattern}", policy, "is no policy", f"choose {', '.join(POLICIES)}")
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            matched = [name for name in trained if fnmatchcase(name, pattern)]
            always = "which are always averaged"
            problem = f"fits only trained parameters ({matched[0]}), {always}" if matched else "fits no tensor"
            remedy = "name frozen parameters or buffers" if matched else nearest(pattern, names)
            raise ConfigError(f"{KEY}.{pattern}", policy, problem, remedy)
        for name in fitting:
            if policy == AVERAGE and not _is_floating(names[name]):
                problem = f"{name} is of type {_type(names[name])}, which has no average"
                raise ConfigError(f"{KEY}.{pattern}", policy, problem, "choose root, max, sum or local")
            has_sum = not names[name].is_complex() and (policy == MAX or names[name].dtype != torch.bool)
            if policy in (MAX, SUM) and not has_sum:
                problem = f"{name} is of type {_type(names[name])}, which has no {policy}"
                raise ConfigError(f"{KEY}.{pattern}", policy, problem, "choose root or local")


def is_tensor_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no Inf in a tensor of any type."""
    if not _is_floating(tensor):
        return True
    real = real_view(compact(tensor.detach()))
    return all_finite([real.float() if real.element_size() == 1 else real])


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class _Seen:
    """What lay in a place, kept alive: memory that was given back could hold something else at the same address."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._alias = tensor, tensor.detach()
        self._version = _version(tensor)

    def is_still(self, tensor: Tensor) -> bool:
        """Whether that is what lies there, and nobody has written to it, but perhaps through ``.data``."""
        same = tensor is self._tensor and tensor.data_ptr() == self._alias.data_ptr()
        return same and _version(tensor) == self._version


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
