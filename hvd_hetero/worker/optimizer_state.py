"""States of optimizers and schedules that hold more than plain values: functions, other schedules, their optimizer.

Such an object is made by the same code before it is restored, and by then has functions of its own again. So functions
are left out of what is saved, and stay what they are where it is restored; an object inside that has a state itself is
saved by that state, and restored in place.
"""

from __future__ import annotations

import copy
import functools
import logging
import types
import weakref
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch

from hvd_hetero.errors import UserError

OWN = "<own>"
"""In a saved state: stays what it is in the object that is restored."""
INNER = "<state>"
"""The key of a mapping that is the state of an object inside."""
STATELESS = (
    types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.MethodDescriptorType, types.ModuleType,
    functools.partial, type, weakref.ReferenceType, logging.Logger, torch.optim.Optimizer,
)  # fmt: skip
"""What training does not change; an optimizer it does, but that one is saved for itself."""


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state: an optimizer, a schedule, a module."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


def save_state(owner: Stateful) -> Any:
    """Return what :func:`load_state` takes: the object's ``state_dict``, in which all values are plain or tensors.

    Values that are neither, and no functions or objects with a state either, are returned as they are.
    """
    return _saved(owner.state_dict())


def load_state(owner: Stateful, saved: Any, name: str) -> None:
    """Restore what :func:`save_state` gave into a newly made object.

    Args:
        name: of the object in messages.

    Raises:
        UserError: what is to stay the object's own, it does not have.
    """
    owner.load_state_dict(_restored(saved, owner.state_dict(), name))


def lay_out(optimizer: torch.optim.Optimizer, params: Iterable[torch.Tensor]) -> None:
    """Lay out its tensors as their parameters are: files keep no strides, and fused optimizers ask for none."""
    for param in params:
        state = optimizer.state.get(param, {})
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == param.shape and value.stride() != param.stride():
                state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)


def _saved(value: Any) -> Any:
    if isinstance(value, STATELESS):
        return OWN
    if type(value) in (list, tuple):
        return type(value)(_saved(part) for part in value)
    if isinstance(value, dict):
        shallow = copy.copy(value)  # of the same kind: a Counter is none of another
        for key, part in value.items():
            shallow[key] = _saved(part)
        return shallow
    return {INNER: save_state(value)} if isinstance(value, Stateful) else value


def _restored(saved: Any, current: Any, name: str) -> Any:
    """Returns what was saved, with the parts that are not in it from the new object's state."""
    if isinstance(saved, str) and saved == OWN:
        if not isinstance(current, STATELESS):
            problem = "a function or the like when it was saved, which the new one does not have"
            raise UserError(f"{name}: was {problem}; let the same code make it as before, or set run.resume=reshape")
        return current
    if isinstance(saved, dict) and INNER in saved and isinstance(current, Stateful):
        load_state(current, saved[INNER], name)
        return current
    if type(saved) in (list, tuple):
        current_entries = dict(enumerate(current)) if isinstance(current, (list, tuple)) else {}
        return type(saved)(_restored(part, current_entries.get(i), f"{name}.{i}") for i, part in enumerate(saved))
    if isinstance(saved, dict):
        current_entries, restored = current if isinstance(current, dict) else {}, copy.copy(saved)
        for key, part in saved.items():
            restored[key] = _restored(part, current_entries.get(key), f"{name}.{key}")
        return restored
    return saved
