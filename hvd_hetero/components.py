"""What is trained: data, model, loss, optimizer; built from the configuration or given by the user's program."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_hetero import data, models
from hvd_hetero.by_name import loss_of_module, metric_by_name, optimizer_maker, per_sample_loss, scheduler_maker
from hvd_hetero.data import Dataset
from hvd_hetero.errors import ConfigError, UserError, nearest
from hvd_hetero.imports import cause
from hvd_hetero.loss_checks import Batched, try_loss, try_metric
from hvd_hetero.losses import IGNORED, PerSample
from hvd_hetero.random_state import seed_all
from hvd_hetero.schema import Config, DataConfig, ModelConfig
from hvd_hetero.worker import forward

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]

MOST_EPOCHS = 1000
"""So many steps of a scheduler are tried out."""


@dataclass(frozen=True)
class Given:
    """What a program passes in place of names in a configuration; None means as configured.

    Attributes:
        model: a module, or a function without arguments that makes one.
        train_data: a map-style dataset, or a tuple (inputs, targets) of tensors; ``test_data`` the same.
        loss: ``loss(outputs, targets) -> [B]``.
        optimizer: ``optimizer(parameters)`` makes a torch optimizer; ``scheduler(optimizer)`` a scheduler.
        metric: ``metric(outputs, targets) -> [B]``.
    """

    model: nn.Module | Callable[[], nn.Module] | None = None
    train_data: Any = None
    test_data: Any = None
    loss: PerSample | None = None
    optimizer: MakeOptimizer | None = None
    scheduler: MakeScheduler | None = None
    metric: PerSample | None = None

    @classmethod
    def of(cls, objects: Mapping[str, Any]) -> Given:
        """What a program passes by these names.

        Raises:
            ConfigError: there is no such argument.
        """
        names = [item.name for item in fields(cls)]
        for name, value in objects.items():
            if name not in names:
                raise ConfigError(name, _short(value), "is no argument", nearest(name, names))
        return cls(**objects)


SUMMED = (torch.float16, torch.float32, torch.float64)
"""Floating types that Horovod has sums for."""


@dataclass(frozen=True)
class Components:
    """Everything a worker is made of."""

    dataset: Dataset
    model: nn.Module
    loss: PerSample
    metric: PerSample | None
    optimizer: MakeOptimizer
    scheduler: MakeScheduler | None


def build(config: Config, given: Given | None = None, try_out: bool = True) -> Components:
    """Loads the data, makes the model and tries both out on two samples, so that mistakes show before a job starts.

    Args:
        try_out: False for a program that has a loss and a step of its own.

    Raises:
        ConfigError: anything of it cannot be made, or the loss is not one number a sample.
    """
    given = given or Given()
    train = config.train
    seed_all(config.run.seed)  # every rank has to read the same data
    dataset = _dataset(config, given)
    seed_all(config.run.seed)  # however much randomness that took
    components = Components(
        dataset=dataset,
        model=_model(config, given),
        loss=loss_of_module(given.loss) if given.loss else per_sample_loss(train.loss, train.loss_args),
        metric=given.metric or metric_by_name(config.eval.metric, train.loss_args.get("ignore_index", IGNORED)),
        optimizer=given.optimizer or optimizer_maker(train.optimizer, train.lr, train.optimizer_args),
        scheduler=given.scheduler or scheduler_maker(train.scheduler, train.scheduler_args),
    )
    _check_types(config, given, components.model)
    if try_out:
        _try_out(components, config, given)
    return components


def _dataset(config: Config, given: Given) -> Dataset:
    spec = config.data
    if given.train_data is None and given.test_data is None:
        return data.load(spec.name, spec.root, spec.target, spec.args, workers=spec.workers, seed=config.run.seed)
    for name, other in (("test_data", "train_data"), ("train_data", "test_data")):
        if getattr(given, name) is None:
            raise ConfigError(name, None, f"{other} was given without {name}", "give both")
    splits, remedy = [], "give a map-style dataset or tensors (inputs, targets)"
    for name in ("train_data", "test_data"):
        split = getattr(given, name)
        with _telling(name, type(split).__name__, "is no split", remedy):
            splits.append(data.as_source(name, split, spec.workers))
    return Dataset(*splits)


def _model(config: Config, given: Given) -> nn.Module:
    if given.model is None:
        return models.build(config.model.name, config.model.target, config.model.args)
    model: Any = given.model
    remedy = "give a torch.nn.Module, or a function without arguments that makes one"
    if not isinstance(model, nn.Module):
        with _telling("model", _short(model), "cannot be made", remedy):
            model = model()
    if not isinstance(model, nn.Module):
        raise ConfigError("model", _short(given.model), f"is no torch.nn.Module but a {type(model).__name__}", remedy)
    return model


def _check_types(config: Config, given: Given, model: nn.Module) -> None:
    """Raises ConfigError if anything that would be averaged is of a type that Horovod cannot sum."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, tensor in [*trained, *((n, b) for n, b in model.named_buffers() if b.is_floating_point())]:
        if tensor.dtype not in SUMMED:
            remedy = "keep it in float32 (train.autocast=bf16 computes in bfloat16 all the same)"
            problem = f"Horovod cannot sum {tensor.dtype}, the type of {name}"
            raise ConfigError(*_either("model", given.model, *_named("model", config.model)), problem, remedy)


def _try_out(components: Components, config: Config, given: Given) -> None:
    """One forward pass in evaluation mode (no state changes), one optimizer and one scheduler, then forgotten."""
    state = torch.get_rng_state()
    components.model.eval()
    try:
        with warnings.catch_warnings(record=True) as heard:
            outputs = _try_model(components, config, given)
            _try_steps(components, config, given)
    finally:
        components.model.train()
    for warning in heard:  # what fails is said once, by the error
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    _check_classes(components.dataset, outputs, config, given)
    torch.set_rng_state(state)


def _try_model(components: Components, config: Config, given: Given) -> Any:
    """Returns the outputs for the first samples, once loss and metric have been tried on them."""
    model, source = components.model, components.dataset.train
    of_data = _either("train_data", given.train_data, *_named("data", config.data))
    of_model = _either("model", given.model, *_named("model", config.model))
    of_loss = _either("loss", given.loss, "train.loss", config.train.loss)
    of_metric = _either("metric", given.metric, "eval.metric", config.eval.metric)
    with _telling(*of_data, "its first samples cannot be read", "correct the dataset"):
        count = min(2, len(source))
        if len(components.dataset.test) == 0 or count == 0:
            raise ConfigError(*of_data, "has an empty split", "give it at least one sample")
        inputs, targets = next(data.read(source, np.arange(count)[None], torch.Generator()))
    shapes = f"a batch of {count} (inputs {_shape(inputs)}, targets {_shape(targets)})"
    with _telling(*of_model, f"the model fails on {shapes}", "make model and data fit together"):
        outputs = forward(model, inputs)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(*of_model, "has no trainable parameters", "leave some to train")
    what = f"the loss fails on the model's outputs {_shape(outputs)} for {shapes}"
    sizes = config.train.batch_size
    batch = Batched(outputs, targets, count, max(sizes.values()) if isinstance(sizes, Mapping) else sizes)
    with _telling(*of_loss, what, "make model, data, loss and its arguments fit together"):
        losses, _ = try_loss(*of_loss, components.loss, config.train.loss_args, batch)
    if losses.isnan().any():
        raise ConfigError(*of_loss, "is not a number on the first samples", "look at the data and the model's weights")
    if not losses.requires_grad:
        problem = "does not depend on the model's parameters, so there is nothing to learn from it"
        raise ConfigError(*of_loss, problem, "compute it from the outputs, with functions of torch")
    if components.metric is not None:
        with _telling(*of_metric, "fails on this model's outputs", "set eval.metric=none or another"), torch.no_grad():
            try_metric(*of_metric, components.metric, batch)
    return outputs


def _try_steps(components: Components, config: Config, given: Given) -> None:
    """Makes the optimizer and the scheduler, and lets the scheduler go through the run's first passes."""
    params = [p for p in components.model.parameters() if p.requires_grad]
    train, own = config.train, {id(p) for p in params}
    key = _either("optimizer", given.optimizer, "train.optimizer", train.optimizer)
    with _telling(*key, "cannot be made", "give a function of the parameters that makes a torch optimizer"):
        optimizer = components.optimizer(params)
    if not isinstance(optimizer, torch.optim.Optimizer):
        problem = f"makes a {type(optimizer).__name__}, no torch optimizer"
        raise ConfigError(*key, problem, "make a torch.optim.Optimizer")
    if {id(p) for group in optimizer.param_groups for p in group["params"]} - own:
        problem = "has parameters that are not the model's"
        raise ConfigError(*key, problem, "make it from the parameters that it is called with")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(*key, "asks for the loss several times a step", "choose one that steps along a gradient")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ConfigError(*key, "takes sparse gradients only, and they are summed as dense ones", "choose Adam")
    if components.scheduler is None:
        return
    key = _either("scheduler", given.scheduler, "train.scheduler", train.scheduler)
    telling = _telling(*key, "does not last through the passes", "correct its arguments (train.scheduler_args)")
    with telling, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer takes no steps meanwhile
        scheduler = components.scheduler(optimizer)
        for _ in range(min(train.passes or 2, MOST_EPOCHS) if scheduler is not None else 0):
            scheduler.step()


def _check_classes(dataset: Dataset, outputs: Any, config: Config, given: Given) -> None:
    """Refuses class numbers that the model has no output for, where they are at hand: a run would meet them later."""
    if given.loss is not None or config.train.loss not in ("cross_entropy", "nll_loss"):
        return
    for split, source in (("training", dataset.train), ("test", dataset.test)):
        holder = source if isinstance(source, data.TensorSource) else getattr(source, "dataset", None)
        targets = holder.targets if isinstance(holder, (data.TensorSource, data.Files)) else None
        if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
            continue
        used = targets[targets != config.train.loss_args.get("ignore_index", -100)]
        if len(used) and not 0 <= int(used.min()) <= int(used.max()) < outputs.shape[1]:
            where = _either("model", given.model, *_named("model", config.model))
            found = f"the {split} targets are {used.min()} to {used.max()}"
            problem = f"has outputs for {outputs.shape[1]} classes, {found}"
            raise ConfigError(*where, problem, "make its number of classes fit the data")


@contextmanager
def _telling(key: str, value: Any, what: str, remedy: str) -> Iterator[None]:
    """Whatever a user's own code may raise, as an error that names what it is about."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(key, value, f"{what}: {cause(error)}", remedy) from error


def _either(name: str, given: Any, key: str, value: Any) -> tuple[str, Any]:
    """What decided: an argument, and the object that was given for it, or a key and its value."""
    return (name, _short(given)) if given is not None else (key, value)


def _short(value: Any) -> str:
    """An object that a program has given, in a message."""
    return str(getattr(value, "__qualname__", type(value).__name__))


def _named(section: str, spec: DataConfig | ModelConfig) -> tuple[str, str | None]:
    """The key that decided, and its value."""
    return (f"{section}.target", spec.target) if spec.target else (f"{section}.name", spec.name)


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return list(value.shape)
    parts: Mapping[Any, Any] = value if isinstance(value, Mapping) else dict(enumerate(value))
    return {name: _shape(part) for name, part in parts.items()}
