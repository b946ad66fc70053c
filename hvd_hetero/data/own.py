"""The user's own splits made into sources; what only looks like one is told by its name, and what to give instead."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from hvd_hetero.config.instantiate import cause
from hvd_hetero.data.collate import NUMBER, is_vector
from hvd_hetero.data.source import MapSource, Source, Tensors, TensorSource
from hvd_hetero.describe import describe
from hvd_hetero.errors import ConfigError, Unquoted

REMEDY = "give a map-style dataset or tensors (inputs, targets)"


def as_source(key: str, data: Any, workers: int = 0) -> Source:
    """Make a source of a split.

    Args:
        key: what the split was given as, for messages.
        data: a pair (inputs, targets) of tensors or arrays, or of tuples or dicts of them; a map-style dataset; or a
            source, which is returned as it is.
        workers: processes that read a map-style dataset.

    Raises:
        ConfigError: it is none of these.
    """
    if callable(getattr(data, "batches", None)) and not isinstance(data, type):
        for name in ("to", "__len__"):
            if not hasattr(data, name):
                problem = f"is a source without {name}"
                raise ConfigError(key, type(data).__name__, problem, "give it what hvd_hetero.data.Source lists")
        return data
    if type(data) is TensorDataset:  # a subclass may have items of its own
        *inputs, targets = data.tensors
        if not inputs:
            raise ConfigError(key, Unquoted(describe(targets)), "has no targets", "give TensorDataset(inputs, targets)")
        return _in_memory(key, inputs[0] if len(inputs) == 1 else tuple(inputs), targets)
    if _is_pair(data):
        return _in_memory(key, _tensors(f"{key} inputs", data[0]), _tensors(f"{key} targets", data[1]))
    if (kind := _mistaken(data)) is not None:
        raise ConfigError(key, Unquoted(describe(data)), *kind)
    try:
        len(data)
    except Exception as error:  # whatever a user's class may raise
        problem = f"the length of this {type(data).__name__} cannot be told: {cause(error)}"
        raise ConfigError(key, type(data).__name__, problem, "let __len__ return the number of its samples") from error
    return MapSource(data, workers)


def _in_memory(key: str, inputs: Tensors, targets: Tensors) -> TensorSource:
    try:
        return TensorSource(inputs, targets)
    except ConfigError as error:
        raise ConfigError(key, error.value, error.problem, error.remedy) from error


# ---- pairs of arrays ------------------------------------------------------------------------------------------------


def _is_pair(data: Any) -> bool:
    """Whether this is (inputs, targets), and not a dataset of two items."""
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return False
    lengths = set(_lengths(data))
    return _is_array(data[1]) or (isinstance(data, tuple) and len(lengths) == 1 and None not in lengths)


def _is_array(value: Any) -> bool:
    """Whether this is a tensor or an array; a column or a table of pandas counts as one."""
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and not isinstance(value, (NUMBER, type)))


def _lengths(value: Any) -> Iterator[int | None]:
    """How many samples there are in each array of a structure; None for what is no array."""
    if _is_array(value):
        yield len(value) if np.ndim(value) else None
    elif is_vector(value):
        yield len(value)
    elif isinstance(value, (tuple, list, Mapping)) and value:
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _lengths(part)
    else:
        yield None


def _tensors(key: str, value: Any) -> Tensors:
    if isinstance(value, Tensor):
        return value.detach()  # nothing is learned of samples
    if isinstance(value, Mapping):
        return {name: _tensors(f"{key}[{name!r}]", part) for name, part in value.items()}
    if isinstance(value, (tuple, list)) and not is_vector(value):
        return tuple(_tensors(f"{key}[{place}]", part) for place, part in enumerate(value))
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        problem, remedy = "has masked numbers, and a tensor has no mask", "fill them, or leave their samples out"
        raise ConfigError(key, Unquoted(describe(value)), problem, remedy)
    try:
        if is_vector(value):
            return torch.tensor(value)
        array = value if isinstance(value, np.ndarray) else np.array(value)
        with warnings.catch_warnings():  # a file that is mapped to be read is none to write to, and nobody does
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            return torch.from_numpy(array.copy() if any(stride < 0 for stride in array.strides) else array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(key, Unquoted(describe(value)), f"makes no tensor: {cause(error)}", "give numbers") from error


# ---- what looks like a split ----------------------------------------------------------------------------------------


def _mistaken(data: Any) -> tuple[str, str] | None:
    """What is wrong with a thing that is no map-style dataset, and what to give; None for what looks like one."""
    names = [kind.__name__ for kind in type(data).__mro__]
    if isinstance(data, type):
        return "is a class, not a dataset", f"call it: {data.__name__}(...)"
    if "IterableDataset" in names:  # torch's own, and that of datasets, which may know nothing of torch
        return ("is an IterableDataset, which gives samples in an order of its own, but a rank reads those that it is "
                "dealt"), "give a map-style dataset, with __len__ and __getitem__; where it fits into memory, list(it)"
    if isinstance(data, DataLoader):
        return "is a DataLoader, but batches are made here, of train.batch_size samples", (
            "give its dataset, or with a collate function hvd_hetero.data.MapSource(loader.dataset, collate=...)")
    if isinstance(data, Iterator):
        return "is an iterator, which can be read once and in order", "give a list or a map-style dataset"
    if hasattr(data, "iloc"):
        return "is a table, of which nobody knows what is the target", (
            "give (inputs, targets): (table[inputs].to_numpy('float32'), table[target].to_numpy())")
    if _is_array(data):
        return "has no targets", "give (inputs, targets)"
    if isinstance(data, (tuple, list)) and len(data) == 2 and _is_array(data[0]):
        return "a tensor of inputs without one of targets", "give (inputs, targets), of one length"
    if isinstance(data, Mapping) and 0 not in data:
        return "is read by name, not by number", "give (inputs, targets), of which each may be a dict, or one split"
    if isinstance(data, (str, bytes)) or not hasattr(data, "__getitem__"):
        return "not a split", REMEDY
    if not hasattr(data, "__len__"):
        return "is a dataset without __len__", REMEDY
    return None
