"""Making a batch of items: as torch's default does, and of more kinds of items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from hvd_hetero.config.instantiate import cause
from hvd_hetero.data.batch import entries, with_entries
from hvd_hetero.describe import describe
from hvd_hetero.errors import ConfigError, Unquoted

ITEM = "item"
REMEDY = "make the items alike, or make batches of them yourself: hvd_hetero.data.MapSource(dataset, collate=...)"
NUMBER = (bool, int, float, complex, np.number, np.bool_)
KINDS = (str, bytes, Tensor, np.ndarray, NUMBER, Mapping)
"""Of what counts as one kind whatever its class."""


def collate(items: Sequence[Any]) -> Any:
    """Make a batch of items: each of their entries becomes one of the batch.

    Tensors and arrays are stacked. Numbers, and lists of numbers, become a tensor, by the types of ``torch.tensor``.
    Texts become a list, and None stays None. Tuples, lists, mappings and dataclasses are gone through, and keep their
    class.

    Raises:
        ConfigError: no batch is made of such entries, or they are not alike; names the entry.
    """
    for item in {type(item): item for item in items}.values():
        if entries(item) is None:
            raise _refused(ITEM, item, "is not inputs and a target")
    return _joined(list(items), ITEM)


def _joined(parts: Sequence[Any], path: str) -> Any:
    first, alike = parts[0], len(set(map(type, parts))) == 1
    for other in () if alike else parts:
        if _kind(other) is not _kind(first):
            raise _refused(path, other, f"{describe(first)} in another sample of the batch")
    if first is None:
        return None
    if isinstance(first, (str, bytes)):
        return list(parts)
    if all(isinstance(part, (Tensor, np.ndarray)) for part in (parts[:1] if alike else parts)):
        return _stacked(parts, path)
    if _kind(first) is NUMBER or (path != ITEM and is_vector(first)):
        return _tensor(parts, path)
    return with_entries(first, {
        name: _joined(column, _below(path, first, name)) for name, column in _columns(parts, path).items()
    })  # fmt: skip


def _columns(parts: Sequence[Any], path: str) -> dict[Any, Sequence[Any]]:
    """What containers have in each of their entries."""
    first = parts[0]
    if isinstance(first, (tuple, list)):
        for part in parts:
            if len(part) != len(first):
                raise _refused(path, part, f"{describe(first)} in another sample of the batch")
        return dict(enumerate(zip(*parts, strict=True)))
    inside = [entries(part) or {} for part in parts]
    if not inside[0]:
        raise _refused(path, first, "no batch is made of such objects")
    for part, names in zip(parts, inside, strict=True):
        if names.keys() != inside[0].keys():
            raise _refused(path, part, f"{describe(first)} in another sample of the batch")
    return {name: [names[name] for names in inside] for name in inside[0]}


def _kind(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray)) and not value.ndim:
        return NUMBER
    return next((kind for kind in KINDS if isinstance(value, kind)), type(value))


def is_vector(value: Any) -> bool:
    """Say whether this is a list of numbers, or of such lists."""
    return isinstance(value, list) and all(isinstance(part, NUMBER) or is_vector(part) for part in value)


def _tensor(parts: Sequence[Any], path: str) -> Tensor:
    try:
        # numpy's own numbers keep their types
        return torch.as_tensor(np.array(parts)) if isinstance(parts[0], np.generic) else torch.tensor(parts)
    except (ValueError, TypeError, RuntimeError) as error:
        raise _refused(path, parts[0], f"the samples of a batch make no tensor: {cause(error)}") from error


def _stacked(parts: Sequence[Any], path: str) -> Any:
    for other in parts:
        if other.shape != parts[0].shape:
            raise _refused(path, other, f"{describe(parts[0])} in another sample of the batch")
    try:
        return default_collate(list(parts))  # in a worker process it stacks into shared memory
    except (TypeError, RuntimeError) as error:
        raise _refused(path, parts[0], f"the samples of a batch make no tensor: {cause(error)}") from error


def _below(path: str, container: Any, name: Any) -> str:
    fields = getattr(container, "_fields", None)  # of a named tuple
    if fields is not None:
        return f"{path}.{fields[name]}"
    return f"{path}[{name!r}]" if isinstance(container, (Mapping, tuple, list)) else f"{path}.{name}"


def _refused(path: str, value: Any, problem: str) -> ConfigError:
    return ConfigError(f"data {path}", Unquoted(describe(value)), problem, REMEDY)
