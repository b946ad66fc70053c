"""Nested states, split into tensors and what JSON can hold, and joined again exactly.

What JSON has no word for becomes an object with one key that begins with ``$``::

    {"$tensor": NAME}   {"$array": NAME}   {"$number": [DTYPE, VALUE]}   {"$float": "nan"}
    {"$bits": [NAME, DTYPE, SHAPE]}, a tensor of a type that the file of tensors has no word for, as its bytes
    {"$sparse": [INDICES, VALUES, SHAPE, COALESCED]}
    {"$tuple": [...]}, and likewise the others of SEQUENCES; the words of ATOMS, such as {"$complex": [REAL, IMAGINARY]}
    {"$dict": [[KEY, VALUE], ...]}, for keys that are no strings or begin with $; likewise the others of MAPPINGS
    {"$defaultdict": [FACTORY, [[KEY, VALUE], ...]]}   {"$deque": [[...], MAXLEN]}

Values, dtypes and shapes are exact. Not kept: strides, ``requires_grad``, the device (the reader says where tensors
are to be), attributes set on a dict, and that two lists or dicts are one object. Tensors and arrays that are the same
memory seen in the same way are saved once and are one again when joined.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from hvd_hetero.checkpoint.errors import CheckpointError
from hvd_hetero.checkpoint.tensor_file import DTYPES, RESERVED

SEQUENCES: dict[type, str] = {tuple: "tuple", torch.Size: "Size", set: "set", frozenset: "frozenset"}
MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda items: Counter(dict(items)),  # a scheduler's milestones
}
ATOMS: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    complex: ("complex", lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    bytes: ("bytes", lambda value: b64encode(value).decode(), b64decode),
    bytearray: ("bytearray", lambda value: b64encode(value).decode(), lambda text: bytearray(b64decode(text))),
    torch.dtype: ("dtype", str, lambda name: _dtype(name)),
    torch.device: ("device", str, torch.device),
}
"""Values that are no containers: their word, and how to say and make them."""
MAKERS: dict[str, Callable[[Any], Any]] = {name: kind for kind, name in SEQUENCES.items()} | {
    name: make for name, _, make in ATOMS.values()
}
FACTORIES: dict[str, Callable[[], Any] | None] = {"None": None} | {
    kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict, set, Counter, OrderedDict, deque)
}
"""What a defaultdict may make new values with."""
AS_BITS = {
    dtype
    for name in ("complex32", "complex64", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if (dtype := getattr(torch, name, None)) is not None
}
"""Types of tensors that are saved as their bytes; older versions of PyTorch do not have all of them."""
KEYS = (str, int, float, bool, type(None), *ATOMS)
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
    json_part = splitter.encode(state, "", 0)
    return splitter.tensors, json_part


def join(tensors: Mapping[str, torch.Tensor], json_part: Any, device: str | torch.device = "cpu") -> Any:
    """Makes the state again.

    Args:
        device: where its tensors are to be; arrays are in host memory anyway. All are copies.

    Raises:
        ValueError: this is not what :func:`split` returned.
    """
    return _Joiner(tensors, device).make(json_part)


class _Splitter:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def encode(self, value: Any, path: str, depth: int) -> Any:
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
            return self._items(value, path, depth)
        if kind in SEQUENCES:
            return {f"${SEQUENCES[kind]}": self._items(value, path, depth)}
        if kind is deque:
            return {"$deque": [self._items(value, path, depth), value.maxlen]}
        if kind in (dict, OrderedDict, Counter, defaultdict):
            return self._mapping(value, path, depth)
        if kind in ATOMS:
            word, to_plain, _ = ATOMS[kind]
            return {f"${word}": self.encode(to_plain(value), path, depth + 1)}
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if kind is np.ndarray:
            tensor = self._tensor(_from_numpy(value, path), path)
            return {"$array": tensor.get("$tensor", tensor)}
        if isinstance(value, np.generic) and _native(value.dtype):
            return {"$number": [value.dtype.name, self.encode(value.item(), path, depth + 1)]}
        problem = f"a {kind.__module__}.{kind.__qualname__}, which only pickle could save"
        raise _refused(path, problem, "save what it is made of: numbers, strings, None, tensors, arrays, and plain "
                       "dicts, lists, tuples and sets of them")

    def _items(self, values: Iterable[Any], path: str, depth: int) -> list[Any]:
        return [self.encode(item, _under(path, i), depth + 1) for i, item in enumerate(values)]

    def _mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> dict[str, Any]:
        if type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, _under(path, key), depth + 1) for key, item in value.items()}
        items = []
        for key, item in value.items():
            below = _under(path, key)
            _check_key(key, below)
            items.append([self.encode(key, below, 0), self.encode(item, below, depth + 1)])
        if isinstance(value, defaultdict):
            names = [name for name, factory in FACTORIES.items() if factory is value.default_factory]
            if not names:
                raise _refused(path, f"a defaultdict that makes its values with {value.default_factory}",
                               f"use one of {', '.join(FACTORIES)}")
            return {"$defaultdict": [names[0], items]}
        return {f"${type(value).__name__}": items}

    def _tensor(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise _refused(path, f"a {type(tensor).__qualname__}, a tensor of its own kind", "save plain tensors")
        if tensor.layout == torch.sparse_coo and not tensor.is_meta:
            detached = tensor.detach()
            parts = (detached._indices(), detached._values(), list(detached.shape), detached.is_coalesced())
            return {"$sparse": self._items(parts, path, 0)}
        if (
            tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta
            or (tensor.dtype not in DTYPES and tensor.dtype not in AS_BITS)
        ):  # fmt: skip
            what = "on device meta" if tensor.is_meta else f"of {tensor.dtype} and layout {tensor.layout}"
            raise _refused(path, f"a tensor {what}, which the file format has no word for", "save what it is made of")
        if tensor.dtype in AS_BITS:
            return {"$bits": [self._name(tensor, path), str(tensor.dtype), list(tensor.shape)]}
        return {"$tensor": self._name(tensor, path)}

    def _name(self, tensor: torch.Tensor, path: str) -> str:
        """The name of a tensor that is to be saved; the same one for the same memory seen in the same way."""
        same = (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.is_neg(),
                tensor.is_conj())  # fmt: skip
        if tensor.numel() and same in self._names:
            return self._names[same]
        # a key may hold dots, and 1 and "1" are two keys: names that are taken get a number
        base = name = path.encode("utf-8", "backslashreplace").decode() or "state"
        count = 1
        while name in self.tensors or name == RESERVED:
            count += 1
            name = f"{base}~{count}"
        flat = tensor.detach().resolve_neg()
        if tensor.dtype in AS_BITS:
            flat = flat.resolve_conj().contiguous().as_strided((flat.numel(),), (1,)).view(torch.uint8)
        self.tensors[name] = flat
        self._names[same] = name
        return name


class _Joiner:
    def __init__(self, tensors: Mapping[str, torch.Tensor], device: str | torch.device) -> None:
        self._tensors, self._device = tensors, torch.device(device)
        self._placed: dict[tuple[str, torch.device], torch.Tensor] = {}

    def make(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.make(item) for item in value]
        if not isinstance(value, dict):
            return value
        word = next(iter(value), "")
        if not word.startswith("$"):
            return {key: self.make(item) for key, item in value.items()}
        content = value[word]
        if word in ("$tensor", "$bits", "$sparse"):
            return self._tensor(word, content, self._device)
        if word == "$array":
            inner = content if isinstance(content, dict) else {"$tensor": content}
            return self._tensor(*next(iter(inner.items())), torch.device("cpu")).numpy()
        if word == "$number":
            return np.dtype(content[0]).type(self.make(content[1]))
        if word == "$float":
            return float(content)
        if word == "$deque":
            return deque(self.make(content[0]), content[1])
        if word == "$defaultdict":
            return defaultdict(FACTORIES[content[0]], self._pairs(content[1]))
        if word[1:] in MAPPINGS:
            return MAPPINGS[word[1:]](self._pairs(content))
        if word[1:] in MAKERS:
            return MAKERS[word[1:]](self.make(content))
        raise ValueError(f"{word} is not known")

    def _pairs(self, items: Any) -> list[tuple[Any, Any]]:
        return [(self.make(key), self.make(item)) for key, item in items]

    def _tensor(self, word: str, content: Any, device: torch.device) -> torch.Tensor:
        if word == "$sparse":
            indices, values, shape, coalesced = self.make(content)
            return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=coalesced, check_invariants=True)
        if word == "$bits":
            name, dtype, shape = content
            return self._fetch(name, device).view(_dtype(dtype)).reshape(shape)
        return self._fetch(content, device)

    def _fetch(self, name: str, device: torch.device) -> torch.Tensor:
        placed = self._placed.get((name, device))
        if placed is None:
            placed = self._placed[name, device] = self._tensors[name].to(device, copy=True)
        return placed


def _check_key(key: Any, path: str) -> None:
    if isinstance(key, (tuple, frozenset)):
        for part in key:
            _check_key(part, path)
    elif type(key) not in KEYS and not isinstance(key, np.generic):
        raise _refused(path, f"a key that is a {type(key).__qualname__}", "use strings or numbers as keys")


def _dtype(name: str) -> torch.dtype:
    """The type that is called so, ``torch.float32``; nothing else that this may name.

    Raises:
        ValueError: there is none.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no type of tensors")
    return dtype


def _from_numpy(array: np.ndarray[Any, Any], path: str) -> torch.Tensor:
    if not _native(array.dtype):
        raise _refused(path, f"an array of dtype {array.dtype}, which the file format has no word for",
                       "use numbers or booleans of this machine's byte order")
    if not array.flags.writeable or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()  # torch has no such tensors
    return torch.from_numpy(array)


def _native(dtype: np.dtype[Any]) -> bool:
    """Whether torch has it too: real numbers up to 64 bits, complex ones of two such, in the machine's own order."""
    return dtype.kind in "biufc" and dtype.itemsize <= (16 if dtype.kind == "c" else 8) and dtype.isnative


def _under(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _refused(path: str, problem: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"the state's {path}" if path else "the state", problem, remedy)
