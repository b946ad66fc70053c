"""Batches, whatever they are made of: taken apart into inputs and targets, moved, pinned, and their samples counted."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_hetero.describe import describe
from hvd_hetero.errors import ConfigError, Unquoted

Batch = tuple[Any, Any]
"""Inputs, as :func:`hvd_hetero.worker.forward.forward` takes them, and targets, as the loss does."""


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Targets of samples that weigh differently: ``weights`` ``[B]`` multiply their parts of the batch's gradient."""

    targets: Any
    weights: Tensor


def weighted(batches: Iterable[Batch], weights: np.ndarray | None) -> Iterator[Batch]:
    """Yield batches with weights ``[steps, B]`` of their samples; as they are, where there are none."""
    if weights is None:
        yield from batches
        return
    for (inputs, targets), row in zip(batches, weights, strict=False):  # a list of batches may be read in parts
        yield inputs, Weighted(targets, torch.from_numpy(row))


TARGETS = ("labels", "label")
"""By these names targets are found among named entries."""


def split_target(batch: Any) -> Batch:
    """Take a batch apart into inputs and targets.

    A tuple or list ends with its targets; of a named tuple they may also be the entry ``labels`` or ``label``. In a
    mapping or a dataclass they are; its other entries become a dict of inputs.

    Raises:
        ConfigError: it has no targets.
    """
    known = entries(batch)
    if known is None or (isinstance(batch, (tuple, list)) and len(batch) < 2):
        remedy = f"return (input, ..., target), or a dict with the target under {TARGETS[0]!r}"
        raise ConfigError("data", Unquoted(describe(batch)), "not a batch of inputs and targets", remedy)
    if isinstance(batch, (tuple, list)):
        names = getattr(batch, "_fields", ())
        at = next((names.index(name) for name in TARGETS if name in names), len(batch) - 1)
        inputs = (*batch[:at], *batch[at + 1 :])
        return inputs[0] if len(inputs) == 1 else inputs, _as_tensor(batch[at])
    for target in TARGETS:
        if target in known:
            return {name: part for name, part in known.items() if name != target}, _as_tensor(known[target])
    remedy = f"name it {' or '.join(map(repr, TARGETS))}"
    raise ConfigError("data", Unquoted(describe(batch)), "no target among a batch's entries", remedy)


def _as_tensor(targets: Any) -> Any:
    return torch.as_tensor(targets) if isinstance(targets, np.ndarray) and targets.dtype.kind in "biufc" else targets


# ---- containers -----------------------------------------------------------------------------------------------------


def entries(value: Any) -> dict[Any, Any] | None:
    """Return what is in a mapping, dataclass, tuple or list, by name or place; None for anything else."""
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if isinstance(value, Mapping):
        return dict(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def with_entries(value: Any, children: Mapping[Any, Any]) -> Any:
    """Return a container of the same class with other entries, which are as :func:`entries` has them."""
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)  # a mapping may hold more than its entries
        changed.update(children)
        return changed
    if hasattr(value, "_fields"):
        return type(value)(*children.values())
    if isinstance(value, (Mapping, tuple, list)):
        return type(value)(children if isinstance(value, Mapping) else children.values())  # type: ignore[call-arg]
    changed = copy.copy(value)
    for name, child in children.items():
        object.__setattr__(changed, name, child)  # it may be frozen
    return changed


def _applied(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change a value, or what is in it where ``change`` returns NotImplemented; what has no parts stays as it is."""
    changed = change(value)
    if changed is not NotImplemented:
        return changed
    children = entries(value)
    if children is None:
        return value
    new = {name: _applied(child, change) for name, child in children.items()}
    return value if all(new[name] is child for name, child in children.items()) else with_entries(value, new)


# ---- devices --------------------------------------------------------------------------------------------------------


def to_device(value: Any, device: torch.device | str) -> Any:
    """Return a batch, or a part of one, on a device: what has a method ``to`` is moved, the rest stays as it is."""

    def move(part: Any) -> Any:
        return part.to(device, non_blocking=True) if isinstance(part, Tensor) else _called(part, "to", device)

    return _applied(value, move)


def pinned(value: Any) -> Any:
    """Return a batch, or a part of one, in page-locked memory, from where a GPU reads while it computes."""

    def pin(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return _called(part, "pin_memory")
        return part.pin_memory() if part.device.type == "cpu" and part.layout == torch.strided else part

    return _applied(value, pin)


def _called(value: Any, method: str, *args: Any) -> Any:
    """Call a method of an object, which may return the object or nothing; NotImplemented if it has none."""
    function = None if isinstance(value, type) else getattr(value, method, None)
    if not callable(function):
        return NotImplemented
    result = function(*args)
    return value if result is None else result


# ---- samples --------------------------------------------------------------------------------------------------------


def sample_counts(targets: Any) -> set[int]:
    """Return the numbers of samples that targets may be of; empty where they do not tell.

    A list may hold one target a sample, or several targets of all samples; both are counted.
    """
    if isinstance(targets, (Tensor, np.ndarray)):
        return {targets.shape[0]} if targets.ndim else set()
    children = entries(targets)
    if children is None:
        return set()
    inside = _common(sample_counts(child) for child in children.values())
    return inside | {len(children)} if type(targets) in (tuple, list) else inside


def _common(counts: Iterable[set[int]]) -> set[int]:
    known = [count for count in counts if count]
    return set.intersection(*known) if known else set()


def split_batch(batch: Batch, micro_batches: int, least: int = 1) -> tuple[int, list[Batch]]:
    """Count a batch's samples, B, and cut it into parts that follow one another, as equal as can be.

    Tensors and arrays ``[B, ...]`` are cut, in containers too, and so are plain lists and tuples with an entry for each
    sample. Numbers, texts and tensors without dimensions go with every part.

    Args:
        least: samples of a part; a batch that has too few for all parts is cut into fewer.

    Raises:
        ConfigError: how many samples it has cannot be told, or something in it does not go by samples.
    """
    counts = _common([sample_counts(batch[1]), sample_counts(batch[0])])
    if len(counts) != 1:
        raise _uncut(batch, "does not tell how many samples it has")
    size = counts.pop()
    count = max(1, min(micro_batches, size // least))
    ends = [size * number // count for number in range(count + 1)]
    inputs, targets = ([_rows(half, size, start, end) for start, end in pairwise(ends)] for half in batch)
    return size, list(zip(inputs, targets, strict=True))


def _rows(value: Any, size: int, start: int, end: int) -> Any:
    """Return the samples from ``start`` to ``end`` of what holds ``size`` samples."""

    def rows(part: Any) -> Any:
        if isinstance(part, (Tensor, np.ndarray)):
            if part.ndim and len(part) != size:
                raise _uncut(part, f"is not of the batch's {size} samples")
            return part[start:end] if part.ndim else part
        if type(part) in (list, tuple) and len(part) == size:
            if all(size in sample_counts(entry) for entry in part):
                raise _uncut(part, f"may be {size} parts of all samples or of one each")
            return part[start:end]
        if entries(part) is None and not isinstance(part, (str, bytes, int, float, complex, type(None))):
            raise _uncut(part, "cannot be cut by samples")
        return NotImplemented

    return _applied(value, rows)


def _uncut(part: Any, problem: str) -> ConfigError:
    remedy = "give tensors [B, ...], or leave train.micro_batches at 1"
    return ConfigError("train.micro_batches", Unquoted(describe(part)), problem, remedy)
