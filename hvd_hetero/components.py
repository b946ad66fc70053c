"""What is trained: data, model, loss, optimizer; built from the configuration or given by the user's program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_hetero import data, models
from hvd_hetero.data import Dataset
from hvd_hetero.errors import ConfigError
from hvd_hetero.schema import Config, DataConfig, ModelConfig
from hvd_hetero.worker import PerSample, forward, metric_by_name, optimizer_maker, per_sample_loss, scheduler_maker

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]


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
    torch.manual_seed(config.run.seed)
    components = Components(
        dataset=_dataset(config, given),
        model=_model(config, given),
        loss=given.loss or per_sample_loss(train.loss, train.loss_args),
        metric=given.metric or metric_by_name(config.eval.metric),
        optimizer=given.optimizer or optimizer_maker(train.optimizer, train.lr, train.optimizer_args),
        scheduler=given.scheduler or scheduler_maker(train.scheduler, train.scheduler_args),
    )
    if try_out:
        _try_out(components, config, given)
    return components


def _dataset(config: Config, given: Given) -> Dataset:
    spec = config.data
    if given.train_data is None:
        return data.load(spec.name, spec.root, spec.target, spec.args, workers=spec.workers, seed=config.run.seed)
    if given.test_data is None:
        raise ConfigError("test_data", None, "train_data was given without test_data", "give both")
    return Dataset(data.as_source("train_data", given.train_data, spec.workers),
                   data.as_source("test_data", given.test_data, spec.workers))


def _model(config: Config, given: Given) -> nn.Module:
    if given.model is None:
        return models.build(config.model.name, config.model.target, config.model.args)
    model = given.model if isinstance(given.model, nn.Module) else given.model()
    if not isinstance(model, nn.Module):
        raise ConfigError("model", type(model).__name__, "is no torch.nn.Module", "give one, or a function making it")
    return model


def _try_out(components: Components, config: Config, given: Given) -> None:
    """One forward pass in evaluation mode (no state changes), one optimizer and one scheduler, then forgotten."""
    model, source = components.model, components.dataset.train
    count = min(2, len(source))
    if len(components.dataset.test) == 0 or count == 0:
        raise ConfigError(*_named("data", config.data), "has an empty split", "give it at least one sample")
    state = torch.get_rng_state()
    inputs, targets = next(iter(source.batches(np.arange(count)[None], torch.Generator())))
    model.eval()
    try:
        with torch.no_grad():
            outputs = forward(model, inputs)
            losses = components.loss(outputs, targets)
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's model may raise
        shapes = f"inputs {_shape(inputs)}, targets {_shape(targets)}"
        problem = f"the model or the loss fails on a batch of {count} ({shapes}): {' '.join(str(error).split())}"
        raise ConfigError(*_named("model", config.model), problem, "make model, data and loss fit together") from error
    finally:
        model.train()
    per_sample("train.loss" if given.loss is None else "loss", config.train.loss, losses, count)
    if components.metric is not None:
        try:
            per_sample("eval.metric", config.eval.metric, components.metric(outputs, targets), count)
        except (RuntimeError, TypeError, IndexError, AttributeError) as error:
            problem = f"fails on this model's outputs: {' '.join(str(error).split())}"
            raise ConfigError("eval.metric", config.eval.metric, problem, "set eval.metric=none or another") from error
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ConfigError(*_named("model", config.model), "has no trainable parameters", "leave some to train")
    optimizer = components.optimizer(params)
    if components.scheduler is not None:
        components.scheduler(optimizer)
    torch.set_rng_state(state)


def _named(section: str, spec: DataConfig | ModelConfig) -> tuple[str, str | None]:
    """The key that decided, and its value."""
    return (f"{section}.target", spec.target) if spec.target else (f"{section}.name", spec.name)


def per_sample(key: str, value: Any, losses: Any, batch: int) -> None:
    """Checks that a loss or metric is one number a sample: the loss table and the sampling need it.

    Raises:
        ConfigError: it is not.
    """
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if shape != (batch,):
        problem = f"is not per sample: a batch of {batch} gives {shape if isinstance(shape, str) else list(shape)}"
        raise ConfigError(key, value, problem, f"return a tensor [{batch}], for example with reduction='none'")


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return list(value.shape)
    parts: Mapping[Any, Any] = value if isinstance(value, Mapping) else dict(enumerate(value))
    return {name: _shape(part) for name, part in parts.items()}
