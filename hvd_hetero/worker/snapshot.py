"""Remembering everything that objects hold, in place, so that it can be put back: tensors, containers, attributes.

A copy (``copy.deepcopy``) would not do. Modules hold what cannot be copied (locks, files, tensors that are results),
and what people write refers to the very objects: an optimizer to parameters, a loss to the model.
"""

from __future__ import annotations

import random
import sys
import types
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
CODE = (type, types.ModuleType, types.BuiltinFunctionType)
Undo = Callable[[], Any]


def snapshot(*roots: Any) -> Callable[[], None]:
    """Remember everything that is reached from some objects; calling the result puts it back, bit for bit.

    Reached are the attributes of objects, the items of containers, what functions have captured, and of tensors
    their memory and their gradients. Not looked into are classes, modules of Python, datasets, which may be large, and
    what the standard library has (threads, files, loggers): what happens there cannot be undone. Only what has changed
    is touched. What is in a GPU's memory is kept in the host's.
    """
    kept: dict[Any, Any] = {}  # by id; kept alive, since an id is given to another object later
    undos: list[Undo] = []
    left = list(roots)
    while left:
        value = left.pop()
        if isinstance(value, PLAIN) or id(value) in kept:
            continue
        kept[id(value)] = value
        if isinstance(value, Tensor):
            inside, undo = _tensor(value, kept)
        else:
            inside, undo = _other(value)
        left += inside
        undos += undo

    def restore() -> None:
        for undo in undos:
            undo()

    return restore


def _other(value: Any) -> tuple[list[Any], list[Undo]]:
    """Return what is inside of a value that is no tensor, and what puts the value back."""
    if isinstance(value, (dict, list, deque, set)):
        return _container(value)
    if isinstance(value, (tuple, frozenset)):
        return list(value), []
    if isinstance(value, np.ndarray):
        if not value.flags.writeable or isinstance(value, np.memmap):
            return [], []
        numbers = value.copy()
        return [], [lambda: np.copyto(value, numbers)]
    if isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
        return [], [_generator(value)]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__], []
    if isinstance(value, types.FunctionType):
        return [vars(value), *_captured(value)], []
    of_python = type(value).__module__.partition(".")[0] in sys.stdlib_module_names
    if isinstance(value, (*CODE, Dataset)) or (of_python and not isinstance(value, types.SimpleNamespace)):
        return [], []
    return [vars(value)] if hasattr(value, "__dict__") else [], []


def _captured(function: types.FunctionType) -> list[Any]:
    """Return the variables around a function that it uses."""
    found = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # some are empty yet
            found.append(cell.cell_contents)
    return found


def _container(value: Any) -> tuple[list[Any], list[Undo]]:
    def parts() -> list[Any]:
        return [part for item in value.items() for part in item] if isinstance(value, dict) else list(value)

    before = parts()

    def undo() -> None:
        now = parts()
        if len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True)):
            return
        value.clear()
        if isinstance(value, dict):
            for key, part in zip(before[::2], before[1::2], strict=True):
                value[key] = part
        else:
            (value.update if isinstance(value, set) else value.extend)(before)

    return before, [undo]


def _generator(value: Any) -> Undo:
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state(legacy=False))
    return partial(setattr, value.bit_generator, "state", value.bit_generator.state)


def _tensor(tensor: Tensor, kept: dict[Any, Any]) -> tuple[list[Any], list[Undo]]:
    """As :func:`_other`; ``kept`` says which memory is kept already, as tensors may share it."""
    if is_lazy(tensor) or tensor.layout != torch.strided:
        return [], []  # there is no memory that could be kept
    memory = tensor.untyped_storage()
    alias, learns, grad = tensor.detach(), tensor.requires_grad, tensor.grad if tensor.is_leaf else None

    def undo() -> None:
        if _place(tensor) != _place(alias):
            tensor.data = alias
        if tensor.requires_grad and not learns:
            tensor.detach_()
        elif learns and not tensor.requires_grad:
            tensor.requires_grad_()
        if tensor.is_leaf and tensor.grad is not grad:
            tensor.grad = grad

    undos: list[Undo] = [undo]
    if memory.nbytes() and not tensor.is_meta and ("memory", memory.data_ptr()) not in kept:
        kept["memory", memory.data_ptr()] = memory
        numbers = memory.clone() if memory.device.type == "cpu" else memory.cpu()
        undos.append(partial(_restore, memory, numbers))
    return [grad, vars(tensor)], undos


def _restore(memory: torch.UntypedStorage, before: torch.UntypedStorage) -> None:
    """Write only where something has changed: a file that is mapped may not be written to."""
    if memory.nbytes() != before.nbytes():
        memory.resize_(before.nbytes())
    elif memory.device.type == "cpu":
        word = torch.uint8 if memory.nbytes() % 8 else torch.int64  # ten times as fast as byte by byte
        now, then = (torch.empty(0, dtype=word).set_(storage) for storage in (memory, before))
        if torch.equal(now, then):
            return
    memory.copy_(before)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return where the numbers of a tensor lie, and how they are read."""
    return tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride()
