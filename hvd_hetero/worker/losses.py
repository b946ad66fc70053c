"""Losses and metrics: a number for each sample of a batch, and how much each sample counts.

A function of outputs and targets returns ``values``, or ``(values, weights)``, ``[B]`` each. Over a batch, an epoch or
a test set, the mean is ``values.sum() / weights.sum()``; without weights each sample counts once. A sample of weight 0
counts nowhere: not in a gradient, not in a figure, and not in the loss table.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hvd_hetero.data.batch import entries, sample_counts
from hvd_hetero.errors import ConfigError

Numbers = tuple[Tensor, "Tensor | None"]
"""Values ``[B]``, and weights ``[B]``; None: each sample counts once."""
PerSample = Callable[[Any, Any], "Tensor | Numbers"]
OF_CLASSES = ("cross_entropy", "nll_loss")
"""Losses whose targets are class numbers, of which some may not count, and classes may weigh differently."""
IGNORED = -100
"""PyTorch's default for the target that does not count."""
NOT_COUNTED = -math.inf
"""The loss of a sample that does not count, where losses alone are passed on."""
TINY = torch.finfo(torch.float32).tiny


def per_sample(key: str, value: Any, returned: Any, samples: Collection[int]) -> Numbers:
    """Take what a loss or a metric has returned for a batch as one number a sample, in float32 or float64.

    Args:
        key: names the function in messages, with ``value``.
        samples: how many the batch may have; empty: nobody knows.

    Raises:
        ConfigError: it is not one number a sample.
    """
    values, weights = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    for part in (values,) if weights is None else (values, weights):
        if not _is_per_sample(part, samples):
            raise _refused(key, value, part, " or ".join(map(str, sorted(samples))) or "B")
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    if values.dim() != 1:
        values = values.reshape(-1)
    return values, None if weights is None else weights.reshape(-1).to(values)


def numbers_of(key: str, function: PerSample, returned: Any, inputs: Any, targets: Any) -> Numbers:
    """Take what a loss or a metric has returned as one number a sample; targets may be of another number than samples.

    Raises:
        ConfigError: it is not one number a sample.
    """
    try:
        return per_sample(key, name_of(function), returned, sample_counts(targets))
    except ConfigError:
        if not (counts := sample_counts(inputs)):
            raise
        return per_sample(key, name_of(function), returned, counts)


def _refused(key: str, value: Any, part: Any, samples: str) -> ConfigError:
    shape = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
    remedy = f"return a tensor [{samples}], for example with reduction='none'"
    if isinstance(part, Tensor) and part.dim() > 1:
        remedy += " and each sample's mean over what counts of it"
    return ConfigError(key, value, f"is not per sample: a batch of {samples} gives {shape}", remedy)


def _is_per_sample(part: Any, samples: Collection[int]) -> bool:
    """Say whether it has one number a sample; a batch of one may have lost its dimension, others one of 1 more."""
    if not isinstance(part, Tensor) or part.is_complex():
        return False
    count = part.numel()
    return (not samples or count in samples) and (count == 1 or part.shape[0] == count)


def mean_gradient(losses: Tensor, weights: Tensor | None, scale: float = 1.0) -> Tensor:
    """Return the gradient ``[B]`` of ``scale`` times the batch's mean loss; zero if no sample counts."""
    if weights is None:
        return torch.full_like(losses, scale / losses.numel())
    return torch.where(weights > 0, scale / weights.sum().clamp(min=TINY), 0.0).to(losses)


def weighted_sums(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the sums ``[2]`` of values and of weights, over the samples that count; on the host, in float64."""
    if weights is None:
        return torch.stack([values.sum().double().cpu(), torch.tensor(len(values), dtype=torch.float64)])
    return torch.stack([torch.where(weights > 0, values, 0.0).sum(), weights.sum()]).double().cpu()


def check_weights(key: str, value: Any, weights: Tensor) -> None:
    """Refuse weights of which no mean can be taken.

    Raises:
        ConfigError: some are negative, or not finite.
    """
    if not bool((weights >= 0).all() & weights.isfinite().all()):  # NaN is neither
        problem = f"returns (values, weights), and weights from {weights.min():g} to {weights.max():g} make no mean"
        raise ConfigError(key, value, problem, "give each sample 0 or more; of what is no weight, return values alone")


def concat(batches: Sequence[Numbers]) -> tuple[Tensor, Tensor]:
    """Return losses and weights ``[K]`` of batches one after the other, in float32 on the host.

    Losses of samples that do not count are :data:`NOT_COUNTED`, and no other is.
    """
    if not batches:
        return torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.float32)
    values, counts = joined(batches)
    losses = values.float().cpu()
    weights = torch.ones_like(losses) if counts is None else counts.float().cpu()
    losses = losses.where(losses != NOT_COUNTED, torch.nan)
    return losses.where(weights > 0, NOT_COUNTED), weights


def joined(parts: Sequence[Numbers]) -> Numbers:
    """Return the numbers of parts of a batch as those of the batch, where they are."""
    if len(parts) == 1:
        return parts[0]
    values = torch.cat([losses for losses, _ in parts])
    if all(weights is None for _, weights in parts):
        return values, None
    return values, torch.cat([torch.ones_like(losses) if weights is None else weights for losses, weights in parts])


def mean(total: float, weight: float) -> float:
    """Return a weighted mean from its two sums; NaN where nothing counts."""
    return total / weight if weight else math.nan


def name_of(function: Callable[..., Any]) -> str:
    """Return what a function or an object that is called like one is known by, for messages."""
    return str(getattr(function, "__qualname__", type(function).__name__))


# ---- functions of torch.nn.functional -------------------------------------------------------------------------------


LOSS_ARGS = "train.loss_args"


def named_loss(
    name: str, function: Callable[..., Tensor], args: Mapping[str, Any], at_hand: Sequence[Any] = (),
    key: str = LOSS_ARGS,
) -> PerSample:  # fmt: skip
    """Make a loss of a function of ``torch.nn.functional``, reduced to one number a sample.

    Args:
        at_hand: all targets that it will be called with, if they are in memory; those of a batch need not be looked at
            then.
        key: names the arguments in messages.

    Raises:
        ConfigError: the arguments ask for another reduction, or hold what makes no tensor.
    """
    if args.get("reduction", "none") != "none":
        problem = f"reduction={args['reduction']} gives one number a batch, and each sample's own is needed"
        raise ConfigError("train.loss", name, problem, "leave it out of train.loss_args, which means reduction='none'")
    arguments = _arguments(function, {**args, "reduction": "none"}, key)
    of_classes, ignored = name in OF_CLASSES, args.get("ignore_index", IGNORED)
    weighs = of_classes and args.get("weight") is not None
    all_count = bool(at_hand) and all(_surely_count(targets, ignored) for targets in at_hand)
    if weighs:
        _check_class_weights(f"{key}.weight", args["weight"])

    def loss(outputs: Any, targets: Any) -> Numbers:
        options = arguments(outputs)
        losses = function(outputs, targets, **options)
        # numbers and probabilities all count, as in PyTorch's mean
        if not of_classes or targets.is_floating_point() or (
            not weighs and (all_count or _surely_count(targets, ignored))
        ):  # fmt: skip
            return losses if losses.dim() < 2 else losses.flatten(1).mean(1), None
        return mean_of_targets(losses, targets, ignored, options["weight"] if weighs else None)

    loss.__qualname__ = name
    return loss


def _check_class_weights(key: str, weights: Any) -> None:
    if torch.as_tensor(weights).lt(0).any() or not torch.as_tensor(weights).any():
        problem = "a mean is taken with these weights, and some are negative, or all are 0"
        raise ConfigError(key, weights, problem, "give 0 or more for each class")


def mean_of_targets(values: Tensor, targets: Tensor, ignored: int, of_class: Tensor | None = None) -> Numbers:
    """Return each sample's mean over its targets that count, and the mean of their weights; 0 and 0 if there are none.

    Args:
        values: ``[B, ...]``, one for each target, times the weight of its class.
        targets: class numbers ``[B, ...]``.
        ignored: the class number that does not count.
        of_class: weights ``[C]``; None: 1. A class of weight 0 does not count either.
    """
    targets = targets.long()
    counts = targets != ignored
    weights = counts.to(values) if of_class is None else of_class[targets.where(counts, 0)] * counts
    values = values.where(counts, 0.0)
    if targets.dim() == 1:
        return values, weights
    number, total, weight = (part.flatten(1).sum(1) for part in (weights > 0, values, weights))
    return total / number.clamp(min=1), weight / number.clamp(min=1)


def _surely_count(targets: Any, ignored: int) -> bool:
    """Say whether all targets are known to count, in a microsecond: a GPU would have to be waited for."""
    return (
        isinstance(targets, Tensor) and targets.is_cpu and not targets.is_complex()
        and ignored < 0 and targets.numel() > 0 and (not targets.dtype.is_signed or targets.min().item() >= 0)
    )  # fmt: skip


# ---- arguments ------------------------------------------------------------------------------------------------------


def with_arguments(function: Callable[..., Any], args: Mapping[str, Any], key: str = LOSS_ARGS) -> PerSample:
    """Give a loss or a metric its other arguments; numbers and lists become tensors where it declares tensors.

    Raises:
        ConfigError: a list makes no tensor.
    """
    arguments = _arguments(function, args, key)

    def loss(outputs: Any, targets: Any) -> Any:
        return function(outputs, targets, **arguments(outputs))

    loss.__qualname__ = name_of(function)
    loss.__wrapped__ = function  # type: ignore[attr-defined]  # for who looks for what it keeps
    return loss


def with_tensors(function: Callable[..., Any], args: Mapping[str, Any], key: str = LOSS_ARGS) -> dict[str, Any]:
    """Return arguments with tensors on the host in place of numbers and lists, where a function declares them so.

    Raises:
        ConfigError: a list makes no tensor.
    """
    return {**args, **{name: _tensor(f"{key}.{name}", args[name]).float() for name in _tensors_among(function, args)}}


def _arguments(function: Callable[..., Any], args: Mapping[str, Any], key: str) -> Callable[[Any], Mapping[str, Any]]:
    """Return what gives the arguments for some outputs: tensors are on their device, and of their type."""
    tensors = {name: _tensor(f"{key}.{name}", args[name]) for name in _tensors_among(function, args)}
    if not tensors:
        return lambda outputs: args

    @cache
    def placed(device: torch.device, dtype: torch.dtype) -> Mapping[str, Any]:
        return {**args, **{name: tensor.to(device, dtype) for name, tensor in tensors.items()}}

    def arguments(outputs: Any) -> Mapping[str, Any]:
        like = first_tensor(outputs)
        if like is None:
            return placed(torch.device("cpu"), torch.float32)
        computed = torch.float32 if torch.is_autocast_enabled(like.device.type) else like.dtype
        return placed(like.device, computed)

    return arguments


def _tensors_among(function: Callable[..., Any], args: Mapping[str, Any]) -> list[str]:
    """Return the names of the arguments that a function declares as tensors, and takes as nothing else."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in functions have none
        return []
    declared = {name: str(parameters[name].annotation) for name in args if name in parameters}
    return [name for name, kind in declared.items() if "Tensor" in kind and not _is_taken(args[name], kind)]


def _is_taken(value: Any, declared: str) -> bool:
    """Say whether an argument is of what is declared beside a tensor."""
    return value is None or (isinstance(value, (int, float)) and ("float" in declared or "int" in declared))


def _tensor(key: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        remedy = "give a number, or a list of numbers"
        raise ConfigError(key, value, f"makes no tensor: {error}", remedy) from error
    if not tensor.isfinite().all():
        raise ConfigError(key, value, "is not finite", "give finite numbers")
    return tensor


def first_tensor(outputs: Any) -> Tensor | None:
    """Return the first floating tensor in a model's outputs, if there is one."""
    return next((tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()), None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, in containers too."""
    if isinstance(value, Tensor):
        yield value
    for part in (entries(value) or {}).values():
        yield from tensors_in(part)
