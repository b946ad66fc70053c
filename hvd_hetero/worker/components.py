"""What is trained: data, model, loss, optimizer; built from the configuration or given by the user's program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parameter import is_lazy

from hvd_hetero import compiler_help, data, models
from hvd_hetero.comm.flat_params import check_state
from hvd_hetero.config.instantiate import cause
from hvd_hetero.config.schema import AUTO, Config, DataConfig, ModelConfig
from hvd_hetero.data import Batch, Dataset, Source
from hvd_hetero.data.weights import sample_weights
from hvd_hetero.describe import describe
from hvd_hetero.errors import ConfigError, UserError
from hvd_hetero.log import LOGGER
from hvd_hetero.random_state import seed_all
from hvd_hetero.telemetry.callbacks import Callback
from hvd_hetero.worker.callbacks import Callbacks
from hvd_hetero.worker.factories import optimizer_maker, per_sample_loss, scheduler_maker
from hvd_hetero.worker.forward import forward
from hvd_hetero.worker.loss_modules import SampleLosses, loss_of_module
from hvd_hetero.worker.losses import IGNORED, PerSample
from hvd_hetero.worker.metrics import Metric, SampleMean, read_best, read_metrics
from hvd_hetero.worker.modes import evaluating
from hvd_hetero.worker.parameter_groups import MakeOptimizer, freeze, grouped, options_of

MakeScheduler = Callable[[torch.optim.Optimizer], Any]


@dataclass(frozen=True)
class UserObjects:
    """What a program passes in place of names in a configuration; None means as configured.

    Attributes:
        model: a module, or a function without arguments that makes one.
        train_data: a map-style dataset, or a tuple (inputs, targets) of tensors; ``test_data`` the same.
        loss: ``loss(outputs, targets) -> [B]``, or that and weights ``[B]``, see :mod:`hvd_hetero.worker.losses`.
        optimizer: ``optimizer(parameters)`` makes a torch optimizer, or ``optimizer(named_parameters)`` of pairs (name,
            parameter); ``scheduler(optimizer)`` a scheduler.
        metrics: by name, see :func:`hvd_hetero.worker.metrics.read_metrics`.
        callbacks: objects of classes derived from :class:`hvd_hetero.Callback`.
    """

    model: nn.Module | Callable[[], nn.Module] | None = None
    train_data: Any = None
    test_data: Any = None
    loss: PerSample | None = None
    optimizer: MakeOptimizer | None = None
    scheduler: MakeScheduler | None = None
    metrics: Mapping[str, Any] | None = None
    callbacks: Sequence[Callback] = ()


@dataclass(frozen=True)
class Components:
    """Everything a worker is made of.

    Attributes:
        weights: ``[n]`` of the training samples, those of ``sampling.sample_weights``; None: all weigh the same.
        min_batch: samples that the model needs in a step, as far as the dry run has found out.
    """

    dataset: Dataset
    model: nn.Module
    loss: PerSample
    metrics: Sequence[Metric]
    optimizer: MakeOptimizer
    scheduler: MakeScheduler | None
    callbacks: Callbacks
    weights: NDArray[np.float32] | None = None
    min_batch: int = 1


@dataclass(frozen=True)
class Origins:
    """What decided on each part: the key and its value, or the argument of a program and its object. For messages."""

    data: tuple[str, Any]
    model: tuple[str, Any]
    loss: tuple[str, Any]
    optimizer: tuple[str, Any]
    scheduler: tuple[str, Any]

    @classmethod
    def of(cls, config: Config, objects: UserObjects | None) -> Origins:
        """Return those of a configuration and of what a program has given beside it."""
        objects = objects or UserObjects()
        train = config.train
        return cls(
            _either("train_data", objects.train_data, *_named("data", config.data)),
            _either("model", objects.model, *_named("model", config.model)),
            _either("loss", objects.loss, "train.loss", train.loss),
            _either("optimizer", objects.optimizer, "train.optimizer", train.optimizer),
            _either("scheduler", objects.scheduler, "train.scheduler", train.scheduler),
        )


def build(config: Config, objects: UserObjects | None = None) -> Components:
    """Loads the data and makes the model; :func:`hvd_hetero.training.dry_run.build` tries both out.

    Raises:
        ConfigError: anything of it cannot be made.
    """
    objects = objects or UserObjects()
    train, origins = config.train, Origins.of(config, objects)
    compiler_help.install()
    seed_all(config.run.seed)  # every rank has to read the same data
    dataset, weighs = _dataset(config, objects), config.sampling.sample_weights
    weights = None if weighs is None else sample_weights(weighs, dataset.train)
    seed_all(config.run.seed)  # however much randomness that took
    at_hand = [data.targets_of(split) for split in (dataset.train, dataset.test)]
    model = _model(config, objects)
    loss = (per_sample_loss(train.loss, train.loss_args, at_hand) if objects.loss is None
            else loss_of_module(objects.loss, at_hand))  # fmt: skip
    module = loss.module if isinstance(loss, SampleLosses) else objects.loss
    ignored = getattr(module, "ignore_index", train.loss_args.get("ignore_index", IGNORED))
    components = Components(
        dataset=dataset,
        model=model,
        loss=loss,
        metrics=read_metrics("eval.metrics", config.eval.metrics, ignored) if objects.metrics is None else (
            read_metrics("metrics", objects.metrics, ignored)),
        optimizer=objects.optimizer or optimizer_maker(train.optimizer, train.lr, train.optimizer_args),
        scheduler=objects.scheduler or scheduler_maker(train.scheduler, train.scheduler_args),
        callbacks=Callbacks(config.run, objects.callbacks),
        weights=weights,
    )
    read_best(config.eval.best, components.metrics)
    _check_left_behind(origins)
    _give_shapes(components, origins)
    _check_autocast(components.model, train.autocast)
    components = replace(components, optimizer=_with_groups(components, train.groups))
    check_state(components.model, config.aggregation.state)
    return components


def log_adaptations(components: Components, config: Config, objects: UserObjects | None = None) -> None:
    """Log what is taken in another way than it is given, one line each."""
    functions = [(*Origins.of(config, objects).loss, components.loss), *(
        (metric.key, metric.value, metric.function) for metric in components.metrics if isinstance(metric, SampleMean))]
    for key, value, function in functions:
        if isinstance(function, SampleLosses):
            LOGGER.info("%s=%r: reduction='none' is used in place of 'mean', as each sample's own number is needed; "
                        "that of a batch is still their mean", key, value)  # fmt: skip


def _check_left_behind(origins: Origins) -> None:
    """Refuse a default device other than the CPU, where whatever travels between ranks is made, and no gradients."""
    if not torch.is_grad_enabled():
        problem, remedy = "is made, or trained, where gradients are switched off", "use torch.no_grad() as a context"
        raise ConfigError(*origins.model, problem, f"{remedy}, or torch.set_grad_enabled(True) afterwards")
    device = torch.get_default_device() if hasattr(torch, "get_default_device") else torch.device("cpu")
    if device.type != "cpu":
        problem = f"has left torch.set_default_device({str(device)!r}) behind, where nothing can be sent from"
        remedy = "set it back to 'cpu' once the model is made; a rank moves its model and batches to its device itself"
        raise ConfigError(*origins.model, problem, remedy)


def _check_autocast(model: nn.Module, autocast: str | None) -> None:
    """Refuse parameters whose gradients would vanish when they are scaled back, see worker/loss_scaler.py."""
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half and autocast in ("fp16", AUTO):
        problem = f"the parameter {half[0]} is float16 itself, which leaves no room for its gradient"
        raise ConfigError("train.autocast", autocast, problem, "keep parameters in float32, or leave it null")


def _with_groups(components: Components, groups: list[Any]) -> MakeOptimizer:
    """Freeze what is to be frozen, and let the optimizer have its groups."""
    model, trains = components.model, [p for p in components.model.parameters() if p.requires_grad]
    options = options_of(model, groups)
    freeze(options)
    if trains and not any(p.requires_grad for p in trains):
        raise ConfigError("train.groups", groups, "freezes all that is trained", "leave some parameters to train")
    return grouped(components.optimizer, model, options, groups)


def first_samples(source: Source, count: int, origins: Origins, split: str = "training") -> Batch:
    """Read the first samples of a split as one batch, fewer than ``count`` where there are not so many.

    Raises:
        ConfigError: they cannot be read, or there are none.
    """
    with as_user_error(*origins.data, f"its first {split} samples cannot be read", "correct the dataset"):
        count = min(count, len(source))
        if count == 0:
            raise ConfigError(*origins.data, "has an empty split", "give it at least one sample")
        return next(data.read(source, np.arange(count)[None], torch.Generator(), split=split))


def _dataset(config: Config, objects: UserObjects) -> Dataset:
    spec = config.data
    if objects.train_data is None and objects.test_data is None:
        return data.load(spec.name, spec.root, spec.target, spec.args, workers=spec.workers, seed=config.run.seed,
                         download=spec.download)
    for name, other in (("test_data", "train_data"), ("train_data", "test_data")):
        if getattr(objects, name) is None:
            raise ConfigError(name, None, f"{other} was given without {name}", "give both")
    splits, remedy = [], "give a map-style dataset or tensors (inputs, targets)"
    for name in ("train_data", "test_data"):
        split = getattr(objects, name)
        with as_user_error(name, type(split).__name__, "is no split", remedy):
            splits.append(data.as_source(name, split, spec.workers))
    return Dataset(*splits)


def _model(config: Config, objects: UserObjects) -> nn.Module:
    if objects.model is None:
        return models.build(config.model.name, config.model.target, config.model.args)
    model: Any = objects.model
    remedy = "give a torch.nn.Module, or a function without arguments that makes one"
    if not isinstance(model, nn.Module):
        with as_user_error("model", _short(model), "cannot be made", remedy):
            model = model()
    if not isinstance(model, nn.Module):
        raise ConfigError("model", _short(objects.model), f"is no torch.nn.Module but a {type(model).__name__}", remedy)
    return model


def _give_shapes(components: Components, origins: Origins) -> None:
    """Let lazy modules (``nn.LazyLinear``) make their parameters, by a forward pass, before anything looks at them."""
    model = components.model
    if not _lazy(model):
        return
    inputs, _ = first_samples(components.dataset.train, 2, origins)
    what = f"it has lazy modules, and fails on a batch of samples (inputs {describe(inputs)})"
    with as_user_error(*origins.model, what, "make model and data fit together"), evaluating(model), torch.no_grad():
        forward(model, inputs)
    for name in _lazy(model):
        problem = f"{name} is lazy, and its forward pass does not use it"
        raise ConfigError(*origins.model, problem, "give the layer its sizes, or leave it out")


def _lazy(model: nn.Module) -> list[str]:
    """Return the names of what has no shape yet."""
    return [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if is_lazy(tensor)]


@contextmanager
def as_user_error(key: str, value: Any, what: str, remedy: str) -> Iterator[None]:
    """Whatever a user's own code may raise, as an error that names what it is about."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(key, value, f"{what}: {cause(error)}", remedy) from error


def _either(name: str, objects: Any, key: str, value: Any) -> tuple[str, Any]:
    """What decided: an argument, and the object that was given for it, or a key and its value."""
    return (name, _short(objects)) if objects is not None else (key, value)


def _short(value: Any) -> str:
    """An object that a program has given, in a message."""
    return str(getattr(value, "__qualname__", type(value).__name__))


def _named(section: str, spec: DataConfig | ModelConfig) -> tuple[str, str | None]:
    """The key that decided, and its value."""
    return (f"{section}.target", spec.target) if spec.target else (f"{section}.name", spec.name)
