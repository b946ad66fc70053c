"""What the dry run looks at closely: gradients, rates and targets that a method or a loss cannot deal with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from hvd_hetero import data
from hvd_hetero.algorithms.policy import Policy
from hvd_hetero.comm.tensor_slots import digest
from hvd_hetero.config.schema import Config
from hvd_hetero.data import Dataset
from hvd_hetero.errors import ConfigError
from hvd_hetero.worker.components import Origins, UserObjects
from hvd_hetero.worker.loss_checks import is_shaped
from hvd_hetero.worker.losses import IGNORED, OF_CLASSES
from hvd_hetero.worker.parameter_groups import LR_SCALE


def check_gradients(
    model: nn.Module, times: Mapping[str, int], config: Config, method: type[Policy], origins: Origins
) -> None:
    """Refuse gradients that the method, or their clipping, cannot deal with.

    Args:
        times: how often the gradient of a parameter was added to, by name.
    """
    norm, chosen = config.train.clip_norm, config.algorithm.name
    for name, param in model.named_parameters():
        if method.sends_at_once and times.get(name, 0) > 1:
            problem = f"the gradient of {name} is made in {times[name]} pieces, and {chosen} sends the first one"
            remedy = "checkpoint it with use_reentrant=False, or choose another method"
            raise ConfigError(*origins.model, problem, remedy)
        if param.grad is None or not param.grad.is_sparse:
            continue
        if method.sends_at_once:
            problem = f"{name} has sparse gradients, and {chosen} sums dense ones"
            raise ConfigError(*origins.model, problem, "make it with sparse=False, or choose another method")
        if norm is not None:
            problem = f"{name} has sparse gradients, which cannot be clipped"
            raise ConfigError("train.clip_norm", norm, problem, "make it with sparse=False, or leave it null")


def trained_digests(model: nn.Module) -> dict[str, Any]:
    """Return checksums of the trained parameters, by name."""
    return {name: digest(param.detach()) for name, param in model.named_parameters() if param.requires_grad}


def check_unwritten(model: nn.Module, before: Mapping[str, Any], config: Config, origins: Origins) -> None:
    """Refuse a module that writes to its trained parameters itself, where the model is a server's.

    Args:
        before: their checksums before the forward pass; those that are to stay as they are.
    """
    after = trained_digests(model) if before else {}
    for name, known in before.items():
        if after.get(name) != known:
            problem = f"it writes to its trained parameter {name}, and {config.algorithm.name} takes gradients alone"
            remedy = "make it a buffer, or freeze it, or choose a method without a server"
            raise ConfigError(*origins.model, problem, remedy)


def check_rates(before: Sequence[Any], optimizer: torch.optim.Optimizer, config: Config, origins: Origins) -> None:
    """Refuse a scheduler that gives one rate to groups which are to have several (train.groups).

    Args:
        before: the rates of the optimizer's groups, as they were before there was a scheduler.
    """
    after = [group["lr"] for group in optimizer.param_groups]
    if not any(LR_SCALE in group for group in config.train.groups):
        return
    for (one, other), (now, then) in zip(combinations(before, 2), combinations(after, 2), strict=True):
        if one != other and now == then != 0:
            problem = f"sets one rate for all parameters, so that {LR_SCALE} of train.groups would have no effect"
            raise ConfigError(*origins.scheduler, problem, "choose one that scales the rates there are, as cosine does")


def check_classes(
    dataset: Dataset, outputs: Any, config: Config, objects: UserObjects | None, origins: Origins
) -> None:
    """Refuse class numbers of which none counts or that the model has no output for, where they are at hand."""
    own_loss = objects is not None and objects.loss is not None
    if own_loss or config.train.loss not in OF_CLASSES or not is_shaped(outputs) or outputs.dim() < 2:
        return
    ignored = config.train.loss_args.get("ignore_index", IGNORED)
    for name, source in (("training", dataset.train), ("test", dataset.test)):
        targets = data.targets_of(source)
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
            continue
        if not targets.numel():
            continue
        if not targets.dtype.is_signed:  # of wide unsigned numbers torch knows no minimum
            targets = targets.long()
        used = targets if ignored < int(targets.min()) else targets[targets != ignored]
        if not len(used):
            problem = f"none of the {name} targets counts: all are {ignored}, which is ignored"
            raise ConfigError(*origins.data, problem, "correct the targets, or train.loss_args.ignore_index")
        if not 0 <= int(used.min()) <= int(used.max()) < outputs.shape[1]:
            found = f"the {name} targets are {used.min()} to {used.max()}"
            problem = f"has outputs for {outputs.shape[1]} classes, {found}"
            raise ConfigError(*origins.model, problem, "make its number of classes fit the data")
