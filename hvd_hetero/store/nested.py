"""Nested states, split into tensors and what JSON can hold, and joined again exactly.

What JSON has no word for becomes an object with one key that begins with ``$``::

    {"$tensor": NAME}   {"$array": NAME}   {"$number": [DTYPE, VALUE]}   {"$float": "nan"}   {"$tuple": [...]}
    {"$dict": [[KEY, VALUE], ...]}, for keys that are no strings or begin with $; likewise $OrderedDict and $Counter

Values, dtypes and shapes are exact. Not kept: strides, ``requires_grad``, the device (the reader says where tensors
are to be), attributes set on a dict, and that two lists or dicts are one object. Tensors and arrays that are the same
memory seen in the same way are saved once and are one again when joined.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from hvd_hetero.store.errors import CheckpointError
from hvd_hetero.store.tensors import DTYPES, RESERVED

MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda items: Counter(dict(items)),  # a scheduler's milestones
}
DEPTH = 100
"""Levels of nesting; a state with more contains itself."""
BITS = 10_000
"""Of an integer; beyond some more, Python refuses to write one as text."""


def split(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Splits a state; the tensors still are, or share memory with, those of the state.

    Returns:
        The tensors by dotted name, and the rest for ``json``, without NaN or infinity.

    Raises:
        CheckpointError: a part of it could only be saved by pickle; names its dotted path.
    """
    splitter = _Splitter()
    plain = splitter.take(state, "", 0)
    return splitter.tensors, plain


def join(tensors: Mapping[str, torch.Tensor], plain: Any, device: str | torch.device = "cpu") -> Any:
    """Makes the state again.

    Args:
        device: where its tensors are to be; arrays are in host memory anyway. All are copies.

    Raises:
        ValueError: this is not what :func:`split` returned.
    """
    return _Joiner(tensors, device).make(plain)


class _Splitter:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def take(self, value: Any, path: str, depth: int) -> Any:
        if depth > DEPTH:
            raise _refused(path, f"more than {DEPTH} levels deep, or contains itself", "flatten it")
        kind = type(value)  # exactly: a subclass would come back as something else
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            if value.bit_length() > BITS:
                raise _refused(path, f"an integer of more than {BITS} bits", "save it as an array")
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is list:
            return [self.take(item, _under(path, i), depth + 1) for i, item in enumerate(value)]
        if kind is tuple:
            return {"$tuple": [self.take(item, _under(path, i), depth + 1) for i, item in enumerate(value)]}
        if kind in (dict, OrderedDict, Counter):
            return self._mapping(value, path, depth)
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._tensor(value, path)}
        if kind is np.ndarray:
            return {"$array": self._tensor(_from_numpy(value, path), path)}
        if isinstance(value, np.generic) and _native(value.dtype):
            return {"$number": [value.dtype.name, self.take(value.item(), path, depth + 1)]}
        problem = f"a {kind.__module__}.{kind.__qualname__}, which only pickle could save"
        raise _refused(path, problem, "save what it is made of: numbers, strings, None, tensors, arrays, and plain "
                       "dicts, lists and tuples of them")

    def _mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> dict[str, Any]:
        if type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.take(item, _under(path, key), depth + 1) for key, item in value.items()}
        items = []
        for key, item in value.items():
            below = _under(path, key)
            items.append([self._key(key, below), self.take(item, below, depth + 1)])
        return {f"${type(value).__name__}": items}

    def _key(self, key: Any, path: str) -> Any:
        if type(key) is tuple:
            return {"$tuple": [self._key(item, path) for item in key]}
        if key is None or type(key) in (str, int, float, bool):
            return self.take(key, path, 0)
        raise _refused(path, f"a key that is a {type(key).__qualname__}", "use strings or numbers as keys")

    def _tensor(self, tensor: torch.Tensor, path: str) -> str:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in DTYPES:
            what = "on device meta" if tensor.is_meta else f"of {tensor.dtype} and layout {tensor.layout}"
            raise _refused(path, f"a tensor {what}, which the file format has no word for", "save what it is made of")
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise _refused(path, f"a {type(tensor).__qualname__}, a tensor of its own kind", "save plain tensors")
        same = (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.is_neg())
        if tensor.numel() and same in self._names:
            return self._names[same]
        # a key may hold dots, and 1 and "1" are two keys: names that are taken get a number
        base = name = path.encode("utf-8", "backslashreplace").decode() or "state"
        count = 1
        while name in self.tensors or name == RESERVED:
            count += 1
            name = f"{base}~{count}"
        self.tensors[name] = tensor.detach().resolve_neg()
        self._names[same] = name
        return name


class _Joiner:
    def __init__(self, tensors: Mapping[str, torch.Tensor], device: str | torch.device) -> None:
        self._tensors, self._device = tensors, torch.device(device)
        self._made: dict[tuple[str, torch.device], torch.Tensor] = {}

    def make(self, plain: Any) -> Any:
        if isinstance(plain, list):
            return [self.make(item) for item in plain]
        if not isinstance(plain, dict):
            return plain
        word = next(iter(plain), "")
        if not word.startswith("$"):
            return {key: self.make(item) for key, item in plain.items()}
        content = plain[word]
        if word == "$tensor":
            return self._fetch(content, self._device)
        if word == "$array":
            return self._fetch(content, torch.device("cpu")).numpy()
        if word == "$number":
            return np.dtype(content[0]).type(self.make(content[1]))
        if word == "$float":
            return float(content)
        if word == "$tuple":
            return tuple(self.make(item) for item in content)
        if word[1:] in MAPPINGS:
            return MAPPINGS[word[1:]]([(self.make(key), self.make(item)) for key, item in content])
        raise ValueError(f"{word} is not known")

    def _fetch(self, name: str, device: torch.device) -> torch.Tensor:
        made = self._made.get((name, device))
        if made is None:
            made = self._made[name, device] = self._tensors[name].to(device, copy=True)
        return made


def _from_numpy(array: np.ndarray[Any, Any], path: str) -> torch.Tensor:
    if not _native(array.dtype):
        raise _refused(path, f"an array of dtype {array.dtype}, which the file format has no word for",
                       "use numbers or booleans of this machine's byte order")
    if not array.flags.writeable or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()  # torch has no such tensors
    return torch.from_numpy(array)


def _native(dtype: np.dtype[Any]) -> bool:
    """Whether torch and the file format know it too: up to 64 bits, in the machine's own order."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8 and dtype.isnative


def _under(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _refused(path: str, problem: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"the state's {path}" if path else "the state", problem, remedy)
