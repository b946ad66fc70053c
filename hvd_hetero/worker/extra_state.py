"""State that modules keep themselves, by ``get_extra_state``: each rank's own, never averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hvd_hetero.comm.tensor_slots import Slot, slots_of


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


def state_beside(module: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Return what a module beside the model keeps, a loss for instance: buffers and extra state, but the model's."""
    buffers = {slot.name: slot.get() for slot in _slots_beside(module, model)}
    return {"buffers": {name: tensor for name, tensor in buffers.items() if tensor is not None},
            "extra": {name: part for name, part in extra_state(module).items()
                      if module.get_submodule(name) not in set(model.modules())}}  # fmt: skip


def load_state_beside(module: nn.Module, model: nn.Module, state: Mapping[str, Any], device: torch.device) -> None:
    """Give a module back what :func:`state_beside` returned."""
    for slot in _slots_beside(module, model):
        if slot.name in state["buffers"]:
            slot.set(state["buffers"][slot.name].to(device, copy=True))
    load_extra_state(module, state["extra"])


def _slots_beside(module: nn.Module, model: nn.Module) -> list[Slot]:
    modules = set(model.modules())
    return [slot for slot in slots_of(module) if not slot.is_parameter and slot.module not in modules]
