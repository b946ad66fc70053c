"""Modules as losses and metrics: those that return the mean of a batch are made to give each sample its own number."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hvd_hetero.config.instantiate import call
from hvd_hetero.worker.losses import LOSS_ARGS, PerSample, name_of, named_loss, with_arguments, with_tensors

MEAN, EACH = "mean", "none"
OF_TORCH = nn.MSELoss.__module__
"""Where PyTorch's own are; the mean of all of them but those that know classes is that over elements."""


class SampleLosses(nn.Module):
    """One number a sample of a module that returns their mean.

    Args:
        given: the module, with ``reduction='mean'``; it stays as it is.
        losses: what it gives with ``reduction='none'``.
        mean: what it gives as it is; None: it needs no comparison.
    """

    def __init__(self, module: nn.Module, losses: PerSample, mean: PerSample | None) -> None:
        super().__init__()
        self.module, self.losses, self.mean = module, losses, mean
        self.__qualname__ = name_of(module)

    def forward(self, outputs: Any, targets: Any) -> Any:
        """Return each sample's mean over its elements, or what is none of it as it is."""
        returned = self.losses(outputs, targets)
        return returned.flatten(1).mean(1) if isinstance(returned, Tensor) and returned.dim() > 1 else returned


def module_of(own: Any, args: Mapping[str, Any], key: str = LOSS_ARGS) -> tuple[Any, Mapping[str, Any]]:
    """Make a class of modules with the arguments; return it, or what it is else, and the arguments that are left.

    Args:
        key: names the arguments in messages.

    Raises:
        ConfigError: it cannot take them.
    """
    if isinstance(own, type) and issubclass(own, nn.Module):
        return call(key, own, with_tensors(own, args, key)), {}
    return own, args


def loss_of_module(
    loss: Any, at_hand: Sequence[Any] = (), args: Mapping[str, Any] | None = None, key: str = LOSS_ARGS
) -> PerSample:
    """Take the losses of ``torch.nn`` that know class weights and ignored targets as what they are.

    Others are taken as given, but for modules that return a mean, see :class:`SampleLosses`.

    Args:
        at_hand: see :func:`hvd_hetero.worker.losses.named_loss`.
        args: that it is called with.
        key: names its arguments in messages.
    """
    of_classes = None if args else _of_classes(loss, at_hand, key)
    if of_classes is not None:
        return SampleLosses(loss, of_classes, None) if loss.reduction == MEAN else of_classes
    each = _switched(loss)
    if each is None:
        taken: PerSample = with_arguments(loss, args, key) if args else loss
        return taken
    mean, losses = (with_arguments(part, args, key) if args else part for part in (loss, each))
    return SampleLosses(loss, losses, mean)


def _of_classes(loss: Any, at_hand: Sequence[Any], key: str) -> PerSample | None:
    """Return what the modules are that divide by the weights of classes, and by what is not ignored."""
    if _reduction(loss) not in (MEAN, EACH):
        return None
    forward = getattr(type(loss), "forward", None)
    if forward is nn.CrossEntropyLoss.forward:
        args = {"weight": loss.weight, "ignore_index": loss.ignore_index, "label_smoothing": loss.label_smoothing}
        return named_loss("cross_entropy", nn.functional.cross_entropy, args, at_hand, key)
    if forward is nn.NLLLoss.forward:
        args = {"weight": loss.weight, "ignore_index": loss.ignore_index}
        return named_loss("nll_loss", nn.functional.nll_loss, args, at_hand, key)
    return None


def _switched(loss: Any) -> nn.Module | None:
    """Return a copy with ``reduction='none'``; None where that is not the mean's opposite, or nobody knows.

    A user's module with class weights or ignored targets divides by what only its code says.
    """
    if not isinstance(loss, nn.Module) or _reduction(loss) != MEAN:
        return None
    is_users = type(loss).forward.__module__ != OF_TORCH
    if is_users and any(getattr(loss, name, None) is not None for name in ("weight", "ignore_index")):
        return None
    try:
        each = copy.copy(loss)  # what it refers to, a part of the model for instance, stays the same
        each.reduction = EACH  # type: ignore[assignment]
    except (AttributeError, TypeError, RuntimeError):
        return None
    return each if _reduction(each) == EACH else None


def _reduction(loss: Any) -> Any:
    return getattr(loss, "reduction", None) if isinstance(loss, nn.Module) else None
