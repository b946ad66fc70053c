"""Saying in a few words what a value is: for messages, which must not fail themselves, whatever they meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

DEPTH, ITEMS, TEXT, LENGTH = 4, 4, 30, 300
"""Levels and items of a container that are told, characters of a text in it, and of the whole."""


def describe(value: Any) -> str:
    """Say what a value is, in one short line: ``[4, 1] float32``, ``{ids: [2, 9] int64, name: 'a'}``.

    Tensors and arrays are told by shape and type, containers by what is in them, other objects by their class. Never
    fails: not for what contains itself, nor for objects that raise when they are looked at.
    """
    return _cut(_Describer().format(value), LENGTH)


class _Describer:
    def __init__(self) -> None:
        self._inside: list[int] = []

    def format(self, value: Any) -> str:
        if id(value) in self._inside or len(self._inside) > DEPTH:
            return "..."
        self._inside.append(id(value))
        try:
            return self._format(value)
        except Exception:  # a proxy, a lazy container, a tensor without a shape: its class can always be told
            return type(value).__name__
        finally:
            self._inside.pop()

    def _format(self, value: Any) -> str:
        kind = type(value).__name__
        if isinstance(value, torch.Tensor):
            layout = "" if value.layout == torch.strided else f" {_name(value.layout)}"
            return f"{list(value.shape)} {_name(value.dtype)}{layout}"
        if isinstance(value, np.ndarray):
            return f"array {list(value.shape)} {value.dtype}"
        if isinstance(value, (str, bytes)):
            return _cut(repr(value), TEXT)
        if value is None or isinstance(value, (bool, int, float, complex, np.generic)):
            return _cut(str(value), TEXT)
        if isinstance(value, Mapping):
            text = self._several(((str(name), part) for name, part in value.items()), len(value), ": ")
            return f"{'' if kind == 'dict' else kind + ' '}{{{text}}}"
        names = _field_names(value)
        if names is not None:
            return f"{kind}({self._several(((name, getattr(value, name)) for name in names), len(names), '=')})"
        if isinstance(value, (list, tuple, set, frozenset)):
            text = self._several((("", part) for part in value), len(value), "")
            is_builtin = kind in ("list", "tuple", "set")
            left, right = "()" if isinstance(value, tuple) else "[]" if isinstance(value, list) else "{}"
            many = f"{kind} of {len(value)} " if not is_builtin or len(value) > ITEMS else ""
            return f"{many}{left}{text}{right}"
        return kind

    def _several(self, parts: Iterable[tuple[str, Any]], count: int, between: str) -> str:
        texts = [_cut(name, TEXT) + between + self.format(part) for name, part in islice(parts, ITEMS)]
        return ", ".join([*texts, *(["..."] if count > ITEMS else [])])


def _field_names(value: Any) -> list[str] | None:
    """Return the names of the fields of a dataclass or named tuple; None for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [field.name for field in dataclasses.fields(value)]
    names = getattr(value, "_fields", None) if isinstance(value, tuple) else None
    return None if names is None else list(names)


def _name(of_torch: Any) -> str:
    return str(of_torch).removeprefix("torch.")


def _cut(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
