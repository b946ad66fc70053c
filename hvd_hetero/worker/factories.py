"""Losses, metrics, optimizers and schedulers by the names that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvd_hetero.config.instantiate import import_target
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.schedules import NAMES
from hvd_hetero.worker.loss_modules import loss_of_module, module_of
from hvd_hetero.worker.losses import IGNORED, Numbers, PerSample, mean_of_targets, named_loss
from hvd_hetero.worker.parameter_groups import MakeOptimizer, asks_for_names

ACCURACY = "accuracy"


def per_sample_loss(name: str, args: Mapping[str, Any], at_hand: Sequence[Any] = ()) -> PerSample:
    """Make a loss by its name (a function of ``torch.nn.functional``) or import path.

    A class of modules is made with the arguments; all else is called with them.

    Args:
        at_hand: see :func:`hvd_hetero.worker.losses.named_loss`.

    Raises:
        ConfigError: there is no such loss, or it cannot take its arguments.
    """
    if ":" in name:
        loss, args = module_of(import_target("train.loss", name), args)
        return loss_of_module(loss, at_hand, args)
    function = getattr(nn.functional, name, None)
    if not callable(function):
        raise ConfigError("train.loss", name, "is no function of torch.nn.functional",
                          "give one, for example cross_entropy, or package.module:function")
    return named_loss(name, function, args, at_hand)


def accuracy(outputs: Tensor, targets: Tensor, ignored: int = IGNORED) -> Numbers:
    """Return the share of a sample's targets that have the highest logit; of ``[B, C, ...]`` and ``[B, ...]``.

    NaN is never right: a model that has diverged would have the accuracy of its first class.
    """
    right = (outputs.argmax(1) == targets) & ~outputs.isnan().any(1)
    return mean_of_targets(right.float(), targets, ignored)


def is_accuracy(metric: PerSample | None) -> bool:
    """Say whether a metric is the one by the name of ``accuracy``."""
    return getattr(metric, "func", metric) is accuracy


def optimizer_maker(name: str, lr: float, args: Mapping[str, Any]) -> MakeOptimizer:
    """Makes an optimizer by its ``torch.optim`` name or import path.

    Raises:
        ConfigError: unknown name or argument.
    """
    kind = _torch_class("train.optimizer", name, torch.optim, torch.optim.Optimizer)

    def make(params: Any) -> Any:
        return _checked_make("train.optimizer_args", lambda: kind(params, lr=lr, **args), args)

    return (lambda named_parameters: make(named_parameters)) if asks_for_names(kind) else make


def scheduler_maker(name: str | None, args: Mapping[str, Any]) -> Callable[[torch.optim.Optimizer], Any] | None:
    """Makes a learning-rate scheduler by its ``torch.optim.lr_scheduler`` name or import path.

    Schedules by progress are none: see :mod:`hvd_hetero.planning.schedules`.

    Raises:
        ConfigError: unknown name or argument.
    """
    if name is None or name in NAMES:
        return None
    kind = _torch_class("train.scheduler", name, torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    return lambda optimizer: _checked_make("train.scheduler_args", lambda: kind(optimizer, **args), args)


def _torch_class(key: str, name: str, module: Any, kind: type) -> Callable[..., Any]:
    if ":" in name:
        return import_target(key, name)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        also = f", {', '.join(NAMES)}" if key == "train.scheduler" else ""
        known = ", ".join(n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, kind))
        remedy = f"known are {known}{also}; or give package.module:class"
        raise ConfigError(key, name, f"is not in {module.__name__}", remedy)
    return found


def _checked_make(key: str, make: Callable[[], Any], args: Mapping[str, Any]) -> Any:
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise ConfigError(key, dict(args), str(error), "see the class's documentation in PyTorch") from error
