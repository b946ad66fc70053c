"""State that modules keep themselves, by ``get_extra_state``: each rank's own, never averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def extra_state(model: nn.Module) -> dict[str, Any]:
    """Return what the modules give that have such state, by their dotted names."""
    return {
        name: part.get_extra_state()
        for name, part in model.named_modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }


def load_extra_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give the modules back what :func:`extra_state` returned."""
    for name, content in state.items():
        model.get_submodule(name).set_extra_state(content)
