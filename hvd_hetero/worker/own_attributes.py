"""What training changes outside of parameters, buffers and saved states: each rank's own, in no average.

Modules, losses and optimizers may keep anything in their attributes: counts, lists of tensors, a generator of random
numbers, a module inside of a list. Nobody sends such things, and no checkpoint has them.
"""

from __future__ import annotations

import inspect
import random
import types
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvd_hetero.comm.tensor_slots import digest

PLAIN = (int, float, str)
GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
MODULES_OWN = frozenset(vars(nn.Module()))
OPTIMIZERS_OWN = frozenset(["state", "param_groups", "defaults"])
MOST, DEPTH = 4096, 4
"""Items of a container that is looked into, and how deep."""

MODEL, LOSS, OPTIMIZER = "model", "loss", "optimizer"
REMEDIES = {
    MODEL: "change in training and are plain attributes: each rank has its own, and checkpoints have none; make them "
           "buffers, or give get_extra_state",
    LOSS: "change in training: each rank has its own, and checkpoints have none but buffers; keep them in the model, "
          "as buffers, and return what the loss needs of them",
    OPTIMIZER: "change in training and are not in its state_dict: checkpoints have none; keep them in its state, or "
               "give state_dict and load_state_dict",
}  # fmt: skip

Content = Mapping[str, Any]
"""What tells whether a value has changed: of each part of it, by its path."""


def held(model: nn.Module, loss: Callable[..., Any], optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Content]]:
    """Return what each of them holds of its own, by the dotted name of the attribute; for :func:`warn_of_changes`."""
    look = _Look(model)
    return {MODEL: _of_model(model, look), LOSS: _of_loss(loss, model, look), OPTIMIZER: _of_optimizer(optimizer, look)}


def warn_of_changes(before: Mapping[str, Mapping[str, Content]], after: Mapping[str, Mapping[str, Content]]) -> None:
    """Tell which attributes have changed from one look to the next; what was not there then may be a cache."""
    for whose, remedy in REMEDIES.items():
        names = [name for name, content in before[whose].items() if _differ(content, after[whose].get(name, {}))]
        if names:
            warnings.warn(f"the {whose}'s {', '.join(names)} {remedy}", stacklevel=2)


def _differ(before: Content, after: Content) -> bool:
    return any(path in after and after[path] != said for path, said in before.items())


def _of_model(model: nn.Module, look: _Look) -> dict[str, Content]:
    """Look beside parameters and buffers; not into modules that give such things to checkpoints themselves."""
    found = dict[str, Content]()
    for prefix, module in model.named_modules():
        if type(module).get_extra_state is nn.Module.get_extra_state:
            found |= look.attributes(module, MODULES_OWN, f"{prefix}." if prefix else "")
    return found


def arrays_of(model: nn.Module, loss: Callable[..., Any]) -> dict[str, Tensor | NDArray[Any]]:
    """Return the tensors and arrays that both hold beside what ranks share, by what to call them."""
    look, found = _Look(model), dict[str, Tensor | NDArray[Any]]()
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}".lstrip("."): value for name, value in vars(module).items() if name not in MODULES_OWN}
        found |= {f"the model's {name}": value for name, value in look.arrays(own)}
    return found | {f"the loss's {name}": value for name, value in look.arrays(_values_of_loss(loss, model))}


def _of_loss(loss: Any, model: nn.Module, look: _Look) -> dict[str, Content]:
    return look.named(_values_of_loss(loss, model))


def _values_of_loss(loss: Any, model: nn.Module) -> dict[str, Any]:
    """Return what an object has, one that a method belongs to, or what a function has captured."""
    loss = inspect.unwrap(loss.func if isinstance(loss, partial) else loss)
    if isinstance(loss, types.MethodType):
        loss = loss.__self__
    if isinstance(loss, types.FunctionType):
        return _captured(loss)
    if loss is model or not hasattr(loss, "__dict__"):
        return {}
    without = MODULES_OWN if isinstance(loss, nn.Module) else frozenset[str]()
    return {name: value for name, value in vars(loss).items() if name not in without} | dict(_tensors(loss))


def _of_optimizer(optimizer: torch.optim.Optimizer, look: _Look) -> dict[str, Content]:
    """Look at what ``state_dict`` has not, unless it is one of the optimizer's own."""
    if type(optimizer).state_dict is not torch.optim.Optimizer.state_dict:
        return {}
    modes = {name for name, value in vars(optimizer).items() if name[0] == "_" or isinstance(value, (bool, str))}
    return look.attributes(optimizer, OPTIMIZERS_OWN | modes)


class _Look:
    """One look at attributes; what is a parameter or a buffer of the model, or its memory, is passed over."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {id(module) for module in model.modules()}
        self._memory = {_memory(tensor) for _, tensor in _tensors(model)} - {0}

    def attributes(self, owner: Any, without: frozenset[str], prefix: str = "") -> dict[str, Content]:
        """Return the attributes that have something to compare."""
        return self.named({f"{prefix}{name}": value for name, value in vars(owner).items() if name not in without})

    def named(self, values: Mapping[str, Any]) -> dict[str, Content]:
        found = {name: dict(self._parts(value, "", DEPTH)) for name, value in values.items()}
        return {name: content for name, content in found.items() if content}

    def arrays(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor | NDArray[Any]]]:
        """Yield the tensors and arrays in these values, by their paths."""
        for name, value in values.items():
            for path, leaf in self._leaves(value, name, DEPTH):
                if isinstance(leaf, (Tensor, np.ndarray)):
                    yield path, leaf

    def _parts(self, value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
        for place, leaf in self._leaves(value, path, depth):
            if isinstance(leaf, PLAIN):
                yield place, (type(leaf), repr(leaf))
            elif isinstance(leaf, Tensor):
                yield place, digest(leaf)
            elif isinstance(leaf, np.ndarray):
                yield place, (leaf.dtype, leaf.shape, zlib.crc32(leaf.tobytes()))
            else:
                yield place, _generator_state(leaf)

    def _leaves(self, value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
        """Yield what has something to compare in a value."""
        if isinstance(value, Tensor):
            # a result may be kept to be looked at, as attention is
            is_result = value.requires_grad and not isinstance(value, nn.Parameter)
            if not is_result and _memory(value) and _memory(value) not in self._memory:
                yield path, value
        elif isinstance(value, np.ndarray):
            if not value.dtype.hasobject and not isinstance(value, np.memmap):  # a file may be larger than memory
                yield path, value
        elif isinstance(value, (*PLAIN, *GENERATORS)):
            yield path, value
        elif depth:
            for name, part in self._inside(value):
                yield from self._leaves(part, f"{path}.{name}", depth - 1)

    def _inside(self, value: Any) -> Iterator[tuple[str, Any]]:
        """Yield the parts of a container, and the tensors of a module that is none of the model's."""
        if isinstance(value, nn.Module):
            if id(value) not in self._modules:
                yield from _tensors(value)
        elif isinstance(value, (dict, list, tuple, deque)) and len(value) <= MOST:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((str(name), part) for name, part in items)


def _tensors(owner: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(owner, nn.Module):
        yield from owner.named_parameters()
        yield from owner.named_buffers()


def _memory(tensor: Tensor) -> int:
    """Return where the memory of a tensor lies; 0 of one that has none to be looked at."""
    plain = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)
    return tensor.untyped_storage().data_ptr() if plain and not nn.parameter.is_lazy(tensor) else 0


def _captured(function: types.FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # some are empty yet
            found[name] = cell.cell_contents
    return found


def _generator_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return digest(value.get_state())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state(legacy=False))
    return repr(value.bit_generator.state)
