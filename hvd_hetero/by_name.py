"""Losses, metrics, optimizers and schedulers by the names that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hvd_hetero.errors import ConfigError
from hvd_hetero.imports import import_target

PerSample = Callable[[Any, Tensor], Tensor]


def per_sample_loss(name: str, args: Mapping[str, Any]) -> PerSample:
    """The loss by name (a function of ``torch.nn.functional``) or import path, reduced to one number a sample.

    Raises:
        ConfigError: there is no such loss.
    """
    if ":" in name:
        target = import_target("train.loss", name)
    else:
        target = getattr(nn.functional, name, None)  # type: ignore[assignment]
        if not callable(target):
            raise ConfigError("train.loss", name, "is no function of torch.nn.functional",
                              "give one, for example cross_entropy, or package.module:function")
        args = {"reduction": "none", **args}

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        losses: Tensor = target(outputs, targets, **args)
        return losses.flatten(1).mean(1) if isinstance(losses, Tensor) and losses.dim() > 1 else losses

    return loss


def metric_by_name(name: str | None) -> PerSample | None:
    """``accuracy``, None, or the user's ``package.module:function`` giving one number a sample."""
    if name is None or name == "none":
        return None
    if ":" in name:
        return import_target("eval.metric", name)
    if name != "accuracy":
        raise ConfigError("eval.metric", name, "is not known", "give accuracy, none or package.module:function")
    return accuracy


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the highest logit is the target's; ``[B, C]`` and ``[B]`` to ``[B]``."""
    return (outputs.argmax(1) == targets).float()


def optimizer_maker(
    name: str, lr: float, args: Mapping[str, Any]
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Makes an optimizer by its ``torch.optim`` name or import path.

    Raises:
        ConfigError: unknown name or argument.
    """
    kind = _torch_class("train.optimizer", name, torch.optim, torch.optim.Optimizer)
    return lambda params: _made("train.optimizer_args", lambda: kind(params, lr=lr, **args), args)


def scheduler_maker(name: str | None, args: Mapping[str, Any]) -> Callable[[torch.optim.Optimizer], Any] | None:
    """Makes a learning-rate scheduler by its ``torch.optim.lr_scheduler`` name or import path; it steps once an epoch.

    Raises:
        ConfigError: unknown name or argument.
    """
    if name is None:
        return None
    kind = _torch_class("train.scheduler", name, torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    return lambda optimizer: _made("train.scheduler_args", lambda: kind(optimizer, **args), args)


def _torch_class(key: str, name: str, module: Any, kind: type) -> Callable[..., Any]:
    if ":" in name:
        return import_target(key, name)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        known = ", ".join(n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, kind))
        raise ConfigError(key, name, f"is not in {module.__name__}", f"known are {known}; or give package.module:class")
    return found


def _made(key: str, make: Callable[[], Any], args: Mapping[str, Any]) -> Any:
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise ConfigError(key, dict(args), str(error), "see the class's documentation in PyTorch") from error
