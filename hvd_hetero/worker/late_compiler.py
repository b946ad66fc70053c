"""Import torch's compiler where something is compiled, and not in every process that takes a step.

An optimizer imports it (``torch._dynamo``) only to say that it is not to look into its methods, and that a graph ends
there. That takes about a second of a core, on every rank of a job and in its launcher. While nothing has asked for
more, a module stands in its place for which both mean nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"
EXEMPT = "__dynamo_disable"
"""Under this name torch keeps, with a function, what :func:`torch._dynamo.disable` has made of it."""


class LateCompiler(ModuleType):
    """Stands for the compiler until it is asked for anything that only the compiler has."""

    def __init__(self) -> None:
        super().__init__(COMPILER)
        spec = find_spec(COMPILER)
        self.__file__ = None if spec is None else spec.origin  # who goes through all modules looks for their files
        self._exempt: list[Callable[..., Any]] = []

    def graph_break(self, *args: Any, **options: Any) -> None:
        """End a graph: there is none."""

    def disable(self, function: Callable[..., Any] | None = None, recursive: bool = True, **options: Any) -> Any:
        """Exempt a function: nothing looks into it."""
        if function is None:
            return self._load().disable(recursive=recursive, **options)
        self._exempt.append(function)
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # that of a package, whose parts are imported
            raise AttributeError(f"module {COMPILER!r} has no attribute {name!r}")
        return getattr(self._load(), name)

    def _load(self) -> ModuleType:
        """Import the compiler; it is asked anew whether functions are exempt."""
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
            for function in self._exempt:
                vars(function).pop(EXEMPT, None)
        return import_module(COMPILER)


def import_compiler_late() -> None:
    """Put off the import of the compiler, if it has not been imported yet."""
    if COMPILER not in sys.modules:
        vars(torch)["_dynamo"] = sys.modules[COMPILER] = LateCompiler()
