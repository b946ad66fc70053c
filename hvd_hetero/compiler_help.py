"""Leave torch's compiler where it is until something is compiled: to import it takes as long as torch itself.

Making an optimizer imports ``torch._dynamo``, and so does each of its steps, only to tell it not to trace what follows.
Where it has not been imported nothing is traced. So something stands in for it that takes these two calls, and makes
way for the compiler itself at whatever else anybody asks of it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"
_lock = threading.RLock()


def install() -> None:
    """Let torch's compiler be imported only when it is used, if it is not there already."""
    import torch

    if NAME not in sys.modules:
        torch._dynamo = sys.modules[NAME] = StandIn(NAME)
        spec = PathFinder.find_spec(NAME, torch.__path__)  # for who asks whether there is one
        torch._dynamo.__spec__ = spec  # type: ignore[assignment]
        sys.meta_path.insert(0, SubmoduleFinder())


class StandIn(ModuleType):
    """What torch tells its compiler where there is nothing to compile."""

    @staticmethod
    def graph_break(*_: Any, **__: Any) -> None:
        """Do nothing: no graph is made."""

    @staticmethod
    def disable(function: Any = None, *args: Any, **options: Any) -> Any:
        """Return what calls a function, as the compiler has it once it is there; of all else it makes its own thing."""
        if not inspect.isfunction(function):
            return _compiler().disable(function, *args, **options)
        disabled: Callable[..., Any] | None = None

        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            nonlocal disabled
            if isinstance(sys.modules.get(NAME), StandIn):
                return function(*given, **named)
            disabled = disabled or _compiler().disable(function, *args, **options)
            return disabled(*given, **named)

        return call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # whoever looks through all modules asks for these
            raise AttributeError(f"module {NAME!r} has no attribute {name!r}")
        return getattr(_compiler(), name)


class SubmoduleFinder(MetaPathFinder, Loader):
    """Find submodules that have come with the compiler, when one was asked for before it was there.

    By then Python has seen that the submodule is not imported, and would run it a second time: its classes and its
    settings would be others than those that the compiler has.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return a spec that gives the module there is; None where there is none."""
        if not name.startswith(f"{NAME}.") or name not in sys.modules:
            return None
        return ModuleSpec(name, self, loader_state=sys.modules[name].__spec__)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module there is."""
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing, and let the module have its own spec again."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def _compiler() -> Any:
    """Import the compiler in place of what stands in for it."""
    with _lock:
        if isinstance(sys.modules.get(NAME), StandIn):
            del sys.modules[NAME]
    return importlib.import_module(NAME)
