"""The modes, training or evaluation, of modules and of optimizers: as the user left them while training.

An optimizer has modes where it has methods ``train()`` and ``eval()``, as schedule-free ones do: the parameters are
then one set of weights while it steps, and another one that is evaluated, averaged and kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule into evaluation mode, and then each back into the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # Through train(), whose overrides may do more than set the flag: merged adapters are taken apart there.
        # Parents come first, so that what a parent sets in its children is set right afterwards.
        for module, training in modes:
            if module.training != training:
                module.train(training)


def has_modes(optimizer: Any) -> bool:
    """Say whether an optimizer has modes."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def set_mode(optimizer: Any, training: bool) -> None:
    """Call the optimizer's ``train()`` or ``eval()`` where it has them."""
    if has_modes(optimizer):
        (optimizer.train if training else optimizer.eval)()


def warn_of_evaluation_mode(model: nn.Module) -> None:
    """Tell of what stays in evaluation mode and has something to learn: it may not be meant."""
    if not model.training:
        return  # all of it is put into training mode
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside or module.training or not any(p.requires_grad for p in module.parameters()):
            continue
        inside |= {id(part) for part in module.modules()}
        warnings.warn(f"{name} is in evaluation mode and has trainable parameters: it is trained in that mode, as it "
                      "was given; call its train() if that is not meant", stacklevel=2)
