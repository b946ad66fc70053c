"""Help for torchvision where it was built for another torch: ``import torchvision`` works, wherever it stands.

A build for CUDA beside a CPU torch cannot load its operators, yet at import it describes two of them to torch, and
fails because they do not exist. Declared by name alone they let the import pass; only who calls them fails.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

NAME = "torchvision"
OPERATORS = ("nms", "qnms")


class Finder(MetaPathFinder):
    """Finds torchvision where Python does, and has it loaded by :class:`Helped`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != NAME:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Helped(spec.loader)
        return spec


class Helped(Loader):
    """Loads a module, and once more with the operators declared where it fails for want of them."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # from here on it is as if nobody had helped
        try:
            self._loader.exec_module(module)
        except RuntimeError as error:
            if f"{NAME}::" not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith(f"{NAME}.")]:
                del sys.modules[name]  # half imported
            _declare()
            self._loader.exec_module(module)


def _declare() -> None:
    import torch  # it is imported already, by torchvision

    for operator in OPERATORS:
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"{NAME}::{operator}", schema)


def install() -> None:
    """Help from now on, in this process."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
