"""The modes, training or evaluation, of modules and of optimizers: as the user left them while training.

An optimizer has modes where it has methods ``train()`` and ``eval()``, as schedule-free ones do: the parameters are
then one set of weights while it steps, and another one that is evaluated, averaged and kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Put every submodule and the optimizer into evaluation mode, and then each back into the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    with evaluation_weights(optimizer):
        model.eval()
        try:
            yield
        finally:
            # Through train(), whose overrides may do more than set the flag: merged adapters are taken apart there.
            # Parents come first, so that what a parent sets in its children is set right afterwards.
            for module, training in modes:
                if module.training != training:
                    module.train(training)


@contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Let the parameters be what is to be evaluated, averaged or saved."""
    set_mode(optimizer, training=False)
    try:
        yield
    finally:
        set_mode(optimizer, training=True)


def set_mode(optimizer: torch.optim.Optimizer | None, training: bool) -> None:
    """Call the optimizer's ``train()`` or ``eval()`` where it has them."""
    if has_modes(optimizer):
        getattr(optimizer, "train" if training else "eval")()


def has_modes(optimizer: torch.optim.Optimizer | None) -> bool:
    """Say whether an optimizer has modes."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
