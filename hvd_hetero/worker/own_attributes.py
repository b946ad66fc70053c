"""What modules keep in plain attributes: each rank's own, in no average and no checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

PLAIN = (int, float, str)
MODULES_OWN = frozenset(vars(nn.Module()))


def attributes_of(model: nn.Module) -> dict[str, Any]:
    """Return the numbers, texts and detached tensors that modules hold beside parameters and buffers, by dotted name.

    Not those of modules that give them to checkpoints themselves, by ``get_extra_state``.
    """
    return dict(_attributes(model))


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for prefix, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            continue
        for name, value in vars(module).items():
            is_result = isinstance(value, Tensor) and value.requires_grad  # kept to be looked at, as attention is
            if name not in MODULES_OWN and isinstance(value, (*PLAIN, Tensor)) and not is_result:
                yield f"{prefix}.{name}" if prefix else name, value.clone() if isinstance(value, Tensor) else value


def warn_of_changes(before: Mapping[str, Any], model: nn.Module) -> None:
    """Tell which attributes have changed since :func:`attributes_of`; what was not there then may be a cache."""
    after = attributes_of(model)
    names = [name for name in before if name in after and not _same(before[name], after[name])]
    if names:
        warnings.warn(f"the model's {', '.join(names)} change in training and are plain attributes: each rank has its "
                      "own, and checkpoints have none; make them buffers, or give get_extra_state", stacklevel=2)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())
    return type(one) is type(other) and not isinstance(one, Tensor) and one == other
