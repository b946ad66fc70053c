"""What would go wrong in silence with a loss or a metric: shapes that broadcast, targets that are no class numbers.

These checks belong to the dry run, which has the outputs of a few samples. Their messages tell shapes as a batch of the
run has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, product
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hvd_hetero.config.instantiate import cause
from hvd_hetero.data.batch import entries, with_entries
from hvd_hetero.describe import describe
from hvd_hetero.errors import ConfigError, UserError
from hvd_hetero.worker.factories import ACCURACY, is_accuracy
from hvd_hetero.worker.loss_modules import SampleLosses
from hvd_hetero.worker.losses import OF_CLASSES, Numbers, PerSample, check_weights, per_sample, tensors_in
from hvd_hetero.worker.metrics import Metric, SampleMean, WholeSet

OTHERWISE_SHAPED = (*OF_CLASSES, "multi_margin_loss")
"""Functions of torch.nn.functional whose targets have another shape than the outputs; all others go by elements."""
NEARLY = 0.01
"""Relative: as exact as a mean in bfloat16 is."""
FIT = "make model, data, loss and its arguments fit together"
ONE_SHAPE = "give both one shape, by squeeze() or unsqueeze()"


@dataclass(frozen=True)
class Batched:
    """Some samples that a loss and a metric are tried on.

    Attributes:
        outputs: of the model.
        samples: how many there are.
        batch: how many a batch of the run has; messages tell shapes of that.
    """

    outputs: Any
    targets: Any
    samples: int
    batch: int

    def shape(self, tensor: Tensor) -> list[int]:
        """Return the shape that outputs or targets have in a batch of the run."""
        return [self.batch, *tensor.shape[1:]] if tensor.dim() else []

    @property
    def shapes(self) -> str:
        """Those of outputs and targets, for messages."""
        parts = (self.shape(part) if is_shaped(part) else describe(part) for part in self.both)
        return "outputs {} and targets {}".format(*parts)

    @property
    def both(self) -> tuple[Any, Any]:
        return self.outputs, self.targets


def is_shaped(value: Any) -> TypeGuard[Tensor]:
    """Say whether this is a tensor that has a shape: nested ones have none, if they are strided."""
    return isinstance(value, Tensor) and not (value.is_nested and value.layout == torch.strided)


def try_loss(key: str, value: Any, loss: PerSample, args: Mapping[str, Any], batch: Batched) -> Numbers:
    """Return the losses of some samples.

    Args:
        key: names the loss in messages, with ``value``.
        args: the other arguments of a function of ``torch.nn.functional``.

    Raises:
        ConfigError: they are not one number a sample, or those of another loss than is meant.
    """
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        problem = "has parameters of its own, which would not be trained: the optimizer has the model's"
        raise ConfigError(key, value, problem, "make them part of the model, and return what the loss needs of them")
    named = key == "train.loss" and ":" not in value
    if named:
        _check_named(value, args, batch)
    losses = per_sample(key, value, loss(*batch.both), {batch.samples})
    if losses[1] is not None:
        check_weights(key, value, losses[1])
        if losses[1].requires_grad:
            problem = "returns (values, weights), and its weights are learned; in a mean they are taken as given"
            raise ConfigError(key, value, problem, "give weights.detach(), or their part in the loss with the values")
    if not named:
        _check_pairs(key, value, loss, batch)
    _check_mean(key, value, losses[0], loss, batch)
    return losses


def _check_mean(key: str, value: Any, losses: Tensor, function: PerSample, given: Batched) -> None:
    """Refuse a module whose mean is not that of what it gives each sample: its code divides by something else."""
    if not isinstance(function, SampleLosses) or function.mean is None:
        return
    mean = function.mean(*given.both)
    if isinstance(mean, Tensor) and mean.numel() == 1:
        mean = mean.detach().reshape(()).to(losses)
        if torch.allclose(losses.detach().mean(), mean, rtol=NEARLY, equal_nan=True):
            return
    problem = "returns a mean (reduction='mean'), and its mean is another one than that of what reduction='none' gives"
    raise ConfigError(key, value, problem, "give it reduction='none', and return (values, weights) where not all count")


def try_metric(key: str, value: Any, metric: PerSample, batch: Batched) -> Numbers:
    """Return the metric's values for some samples.

    Raises:
        ConfigError: as :func:`try_loss`, or there is no accuracy of such targets.
    """
    if is_accuracy(metric):
        _check_accuracy(key, batch)
    values = per_sample(key, value, metric(*batch.both), {batch.samples})
    _check_pairs(key, value, metric, batch)
    _check_mean(key, value, values[0], metric, batch)
    return values


def closely(metric: Metric, batch_of: Callable[[Any], Batched]) -> Metric:
    """Return a metric that is looked at closely while it is tried, if it is a function: of samples or of the whole set.

    Args:
        batch_of: tells of the batch that has these targets.
    """
    if not isinstance(metric, (SampleMean, WholeSet)):
        return metric
    origin, function = (metric.key, metric.value), metric.function

    def of_all(outputs: Any, targets: Any) -> Any:
        result = function(outputs, targets)
        _check_pairs(*origin, function, replace(batch_of(targets), outputs=outputs))
        return result

    if isinstance(metric, WholeSet):
        return WholeSet(metric.name, *origin, of_all)

    def tried(outputs: Any, targets: Any) -> Numbers:
        try:
            return try_metric(*origin, function, batch_of(targets))
        except UserError:
            raise
        except Exception as error:
            problem = f"fails on this model's outputs: {cause(error)}"
            raise ConfigError(*origin, problem, "leave it out, or take another") from error

    close = SampleMean(metric.name, *origin, tried)
    close.module = metric.module
    return close


# ---- by name --------------------------------------------------------------------------------------------------------


def _check_named(name: str, args: Mapping[str, Any], batch: Batched) -> None:
    """Refuse what a function of ``torch.nn.functional`` would broadcast."""
    outputs, targets = batch.both
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if name in OTHERWISE_SHAPED:
        if outputs.dim() > 1 and outputs.shape[1] == 1:
            problem = f"is the same whatever the model says: {batch.shapes} are of a single class"
            raise ConfigError("train.loss", name, problem, f"{FIT}, or take binary_cross_entropy_with_logits")
        return
    if outputs.shape != targets.shape:
        problem = f"goes by elements, and {batch.shapes} differ in shape, so that they would be broadcast"
        raise ConfigError("train.loss", name, problem, f"{FIT}: {ONE_SHAPE}")
    for argument, value in args.items():
        if isinstance(value, list) and np.size(value) > 1 and not _fits(np.shape(value), outputs.shape[1:]):
            problem = f"is of shape {list(np.shape(value))}, and a sample's outputs are of {list(outputs.shape[1:])}"
            raise ConfigError(f"train.loss_args.{argument}", value, problem, "give one number for each output")


def _fits(shape: tuple[int, ...], sample: torch.Size) -> bool:
    """Say whether an argument broadcasts to one sample's outputs."""
    try:
        return torch.broadcast_shapes(shape, sample) == sample
    except RuntimeError:
        return False


def _check_accuracy(key: str, batch: Batched) -> None:
    """Refuse targets that are no class numbers, and outputs that are no logits of classes."""
    outputs, targets = batch.both
    if not is_shaped(outputs) or not is_shaped(targets):
        problem = f"takes tensors, and there are {batch.shapes}"
    elif targets.is_floating_point() or targets.is_complex():
        kind = str(targets.dtype).removeprefix("torch.")
        problem = f"compares class numbers, and the targets {batch.shape(targets)} are {kind}"
    elif outputs.dim() < 2 or outputs.shape[1] < 2 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        problem = f"takes logits [B, C, ...] of two classes or more and class numbers [B, ...], and has {batch.shapes}"
    else:
        return
    raise ConfigError(key, ACCURACY, problem, "set eval.metrics={}, or take functions of your own")


# ---- functions of the user's own ------------------------------------------------------------------------------------


def _check_pairs(key: str, value: Any, function: Callable[[Any, Any], Any], batch: Batched) -> None:
    """Refuse a function that compares each sample's outputs with the targets of all samples, by broadcasting.

    Outputs ``[B, 1]`` less targets ``[B]`` are ``[B, B]``, whose mean over either dimension looks like one number a
    sample. Where shapes are such that this may happen unnoticed, the function is called once more, on as many samples
    as no other dimension has, and must not combine both to ``[..., B, ..., B, ...]``. Functions that pair samples on
    purpose (contrastive ones) pair outputs with outputs, or get outputs and targets of shapes that fit.
    """
    tensors = product(*(filter(is_shaped, tensors_in(part)) for part in batch.both))
    found = next((pair for pair in tensors if _may_broadcast(*(part.shape for part in pair))), None)
    if found is None:
        return
    sizes = {size for tensor in tensors_in(batch.both) if is_shaped(tensor) for size in tensor.shape}
    samples = next(number for number in count(3) if number not in sizes)
    repeated = [_repeated(part, batch.samples, samples) for part in batch.both]
    with _Pairs(samples, *repeated) as pairs, suppress(Exception):  # it may need another number of samples
        function(*repeated)
    if pairs.found:
        shapes = f"outputs {batch.shape(found[0])} and targets {batch.shape(found[1])}"
        problem = f"broadcasts {shapes} against each other, so that every sample meets the targets of all others"
        raise ConfigError(key, value, problem, ONE_SHAPE)


def _may_broadcast(one: torch.Size, other: torch.Size) -> bool:
    """Say whether the first dimension of the shape with fewer ones would meet one of size 1 of the other shape."""
    few, many = sorted((one, other), key=len)
    more = len(many) - len(few)
    return bool(few) and more > 0 and many[0] == few[0] and many[more] == 1


def _repeated(value: Any, before: int, samples: int) -> Any:
    """Repeat the samples of tensors, in containers too, until there are so many."""
    if isinstance(value, Tensor):
        return value[torch.arange(samples) % before] if value.dim() and len(value) == before else value
    parts = entries(value)
    if parts is None:
        return value
    return with_entries(value, {name: _repeated(part, before, samples) for name, part in parts.items()})


class _Pairs(TorchDispatchMode):
    """Watches for operations that pair all samples' outputs with all samples' targets.

    Args:
        samples: a size that only the dimension of samples has.

    Attributes:
        made: whether there was one.
    """

    def __init__(self, samples: int, outputs: Any, targets: Any) -> None:
        super().__init__()
        self._samples, self.found = samples, False
        self._kept: list[Tensor] = []  # else other tensors would come to lie in their memory
        self._comes_from: dict[int, frozenset[str]] = {}
        for name, value in (("outputs", outputs), ("targets", targets)):
            for tensor in tensors_in(value):
                self._note(tensor, frozenset([name]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands, results = list(tensors_in((args, kwargs))), list(tensors_in(result))
        self.found = self.found or any(self._pairs(one, other, results) for one in operands for other in operands)
        origins = frozenset[str]().union(*(self._origins(tensor) for tensor in operands))
        for tensor in results:
            self._note(tensor, origins)
        return result

    def _pairs(self, one: Tensor, other: Tensor, results: list[Tensor]) -> bool:
        if "outputs" not in self._origins(one) or "targets" not in self._origins(other):
            return False
        if self._origins(one) == self._origins(other):  # differences of all pairs of one and the same quantity
            return False
        mine, theirs = self._dimensions(one), self._dimensions(other)
        if not mine or not theirs or mine & theirs:
            return False
        return any(self._dimensions(tensor) >= mine | theirs for tensor in results)

    def _dimensions(self, tensor: Tensor) -> set[int]:
        """Return the dimensions of samples, counted from the last; not those that were expanded."""
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        return {tensor.dim() - i for i, (size, stride) in enumerate(sizes) if size == self._samples and stride}

    def _note(self, tensor: Tensor, origins: frozenset[str]) -> None:
        self._kept.append(tensor)
        place = tensor.untyped_storage().data_ptr()
        self._comes_from[place] = self._comes_from.get(place, frozenset()) | origins

    def _origins(self, tensor: Tensor) -> frozenset[str]:
        return self._comes_from.get(tensor.untyped_storage().data_ptr(), frozenset())

