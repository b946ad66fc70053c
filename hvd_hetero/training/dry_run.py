"""The dry run on two samples: what a run does at its start, an evaluation and a training step, and then forgotten.

What only running can show is found before a job starts: a worker is made as a run makes it, evaluates, takes a step,
goes through the scheduler's epochs and says what a checkpoint would hold. Whatever that has changed is put back: the
model, loss and metric, and the random generators.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from hvd_hetero import algorithms
from hvd_hetero.checkpoint import CheckpointError, join, split
from hvd_hetero.cluster.hardware import autocast_type, local_facts
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.config.instantiate import cause
from hvd_hetero.config.load import device_classes
from hvd_hetero.config.schema import AUTO, AggregationConfig, Config
from hvd_hetero.data import Batch
from hvd_hetero.data.batch import split_batch, to_device
from hvd_hetero.describe import describe
from hvd_hetero.errors import ConfigError, UserError
from hvd_hetero.planning.local_steps import SHRINK, WAIT_AVOIDING
from hvd_hetero.random_state import RandomState
from hvd_hetero.training.step_checks import (
    check_classes,
    check_gradients,
    check_rates,
    check_unwritten,
    trained_digests,
)
from hvd_hetero.worker import components
from hvd_hetero.worker.components import Components, Origins, UserObjects, as_user_error, first_samples
from hvd_hetero.worker.extra_state import load_extra_state
from hvd_hetero.worker.loss_checks import Batched, closely, try_loss
from hvd_hetero.worker.losses import Numbers
from hvd_hetero.worker.metrics import SampleMean
from hvd_hetero.worker.modes import has_modes, warn_of_evaluation_mode
from hvd_hetero.worker.own_attributes import held, warn_of_changes
from hvd_hetero.worker.snapshot import snapshot
from hvd_hetero.worker.watched_backward import counted, forward_places
from hvd_hetero.worker.worker import Worker

T = TypeVar("T")
SAMPLES, SPREAD = 2, 64
CUT = 7
"""Samples of a batch that is cut on trial: fewer may be as many as a batch has parts."""
MOST_EPOCHS = 1000
"""So many steps of a scheduler are tried out."""
SMALL = 10_000_000
"""Parameters. Models that have no more take a second step: what a module has kept of the first may be in its way."""


def build(config: Config, objects: UserObjects | None = None) -> Components:
    """Build what is trained, and try it out, so that mistakes show before a job starts.

    On the ranks of a launched job only what they have to know is found out once more: launch has tried it out, unless
    only they have the GPU that it takes.

    Raises:
        ConfigError: anything of it cannot be made, or fails, or the loss is not one number a sample.
    """
    parts, env = components.build(config, objects), job_env()
    device = _device(config, env.local_rank)
    tried, one = env.launched and device == "cpu", _may_take_one(config)
    if tried and not one:
        return parts
    run = _DryRun(parts, config, objects, device or "cpu")
    if device is None:
        return parts
    if not tried:
        _try(run)
        components.log_adaptations(parts, config, objects)
    return replace(parts, min_batch=run.rolled_back(run.min_batch)) if one else parts


def _try(run: _DryRun) -> None:
    """Try a few samples, and as many as a step really has before it is refused: a queue takes batches of one size."""
    try:
        run.rolled_back(run.attempt)
    except ConfigError as error:
        if not run.read_whole_batch():
            raise
        try:
            run.rolled_back(run.attempt)
        except ConfigError:
            raise error from error.__cause__


def _device(config: Config, local_rank: int) -> str | None:
    """Return where to try things out: on a GPU if all classes are on GPUs (None: there is none here), else a CPU."""
    classes = config.cluster.classes
    if classes == AUTO or any(c.device != "cuda" for c in device_classes(classes).values()):
        return "cpu"
    gpus = local_facts(0, "localhost", local_rank).gpus
    return f"cuda:{local_rank % len(gpus)}" if gpus else None


def _may_take_one(config: Config) -> bool:
    """Say whether a step may come to have one sample: as configured, by the method, or by halves in a profile."""
    counts = _listed(config.train.micro_batches)
    smallest = min(_listed(config.train.batch_size)) // max(SAMPLES if count == AUTO else count for count in counts)
    varies = AUTO in counts or algorithms.get(config.algorithm.name).batch_varies or config.cluster.too_slow == SHRINK
    return varies or smallest < 2 * SAMPLES


def _listed(setting: Any) -> list[Any]:
    """Return the values of a setting that is one for all classes, or one for each."""
    return list(setting.values()) if isinstance(setting, Mapping) else [setting]


class _DryRun:
    """One dry run; what fails is told by the part that it is about, in the order of what a run does."""

    def __init__(self, parts: Components, config: Config, objects: UserObjects | None, device: str) -> None:
        self._components, self._config, self._objects, self._device = parts, config, objects, device
        self._origins = Origins.of(config, objects)
        self._method = algorithms.get(config.algorithm.name)
        self._samples = SAMPLES
        self._read()
        self._outputs: Any = None

    def rolled_back(self, call: Callable[[], T]) -> T:
        """Call something, and put back whatever it has changed."""
        parts, before = self._components, RandomState.capture(self._device)
        restore = snapshot(parts.model, parts.loss, parts.metrics, parts.optimizer, parts.scheduler)
        try:
            with warnings.catch_warnings(record=True) as heard:
                result = call()
        finally:
            restore()
            before.restore()
        for warning in heard:  # what fails is said once, by the error
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result

    # ---- what is done -----------------------------------------------------------------------------------------------

    def attempt(self) -> None:
        """Evaluate, train, go through the epochs, save."""
        warn_of_evaluation_mode(self._components.model)
        if self._config.train.micro_batches != 1:
            split_batch(first_samples(self._components.dataset.train, CUT, self._origins), 2)
        worker = self._worker()
        self._read("test")  # training samples are never evaluated
        try:
            self._evaluate(worker)
        finally:  # where it finds something, it says more than the loss does that fails on it
            check_classes(self._components.dataset, self._outputs, self._config, self._objects, self._origins)
        self._metrics(worker)
        self._read()
        parts = worker.model, self._components.loss, worker.optimizer
        before = held(*parts)
        for _ in range(2 if sum(p.numel() for p in worker.model.parameters()) <= SMALL else 1):
            self._step(worker)
        worker.check_learning()
        warn_of_changes(before, held(*parts))
        self._epochs(worker)
        self._save(worker)

    def min_batch(self) -> int:
        """Find out whether the model can be trained on one sample; if not, it is given two.

        Raises:
            ConfigError: it cannot, and a class is to do so.
        """
        worker, sizes = self._worker(), self._config.train.batch_size
        self._read(count=1)
        try:
            self._gradient(worker)
        except ConfigError as error:
            if 1 in _listed(sizes):
                problem = f"a step of one sample fails: {error.problem}"
                raise ConfigError("train.batch_size", sizes, problem, "set 2 or more") from error
            return SAMPLES
        return 1

    # ---- its parts --------------------------------------------------------------------------------------------------

    def _read(self, split: str = "training", count: int | None = None) -> None:
        dataset, count = self._components.dataset, count or self._samples
        source = dataset.train if split == "training" else dataset.test
        inputs, targets = first_samples(source, count, self._origins, split)
        self._batch: Batch = (to_device(inputs, self._device), to_device(targets, self._device))
        self._count, self._stepped = min(count, len(source)), False

    def read_whole_batch(self) -> bool:
        """Take as many samples as the smallest step has; False if these are no more than there were."""
        sizes, before = self._config.train.batch_size, self._count
        self._samples = max(min(_listed(sizes)), SAMPLES)
        self._read()
        return self._count > before

    def _worker(self) -> Worker:
        parts, train = self._components, self._config.train
        if not any(p.requires_grad for p in parts.model.parameters()):
            raise ConfigError(*self._origins.model, "has no trainable parameters", "leave some to train")
        what, remedy = "the model cannot be made ready for training", "give one whose tensors can be moved and copied"
        with as_user_error(*self._origins.model, what, remedy):
            worker = Worker(
                parts.model, self._loss, self._make_optimizer, self._make_scheduler if parts.scheduler else None,
                device=self._device, seed=self._config.run.seed, clip_norm=train.clip_norm,
                autocast=autocast_type(train.autocast, self._device), channels_last=train.channels_last,
                metrics=[closely(metric, self._batched) for metric in parts.metrics],
            )  # fmt: skip
        if self._method.flat_gradients:
            worker.flat_gradients()
        return worker

    def _make_optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        key, of_model = self._origins.optimizer, {id(p) for p in params}
        with as_user_error(*key, "cannot be made", "give a function of the parameters that makes a torch optimizer"):
            optimizer = self._components.optimizer(params)
        if not isinstance(optimizer, torch.optim.Optimizer):
            problem = f"makes a {type(optimizer).__name__}, no torch optimizer"
            raise ConfigError(*key, problem, "make a torch.optim.Optimizer")
        if {id(p) for group in optimizer.param_groups for p in group["params"]} - of_model:
            problem = "has parameters that are not the model's"
            raise ConfigError(*key, problem, "make it from the parameters that it is called with")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ConfigError(*key, "asks for the loss several times a step", "choose one that steps along a gradient")
        if self._config.aggregation.optimizer_state == "average_seed" and not optimizer.defaults.get("amsgrad"):
            problem = "keeps no largest second moment, from which aggregation.optimizer_state=average_seed begins anew"
            raise ConfigError(*key, problem, "take Adam with train.optimizer_args={amsgrad: true}")
        self._check_modes(optimizer)
        return optimizer

    def _check_modes(self, optimizer: torch.optim.Optimizer) -> None:
        defaults, spec = AggregationConfig(), self._config.aggregation
        values = {key: getattr(spec, key) for key in ("mode", "delayed", "outer_lr", "outer_momentum")}
        others = [f"aggregation.{key}={value}" for key, value in values.items() if value != getattr(defaults, key)]
        others += ["cluster.too_slow=wait_avoiding"] if self._config.cluster.too_slow == WAIT_AVOIDING else []
        if others and has_modes(optimizer):
            problem = f"has modes, train() and eval(), which do not go with {others[0]}"
            raise ConfigError(*self._origins.optimizer, problem, "leave that at its default, or choose another one")

    def _make_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        assert self._components.scheduler is not None
        with as_user_error(*self._origins.scheduler, "cannot be made", "correct its arguments (train.scheduler_args)"):
            rates = [group["lr"] for group in optimizer.param_groups]
            scheduler = self._components.scheduler(optimizer)
        for method in () if scheduler is None else ("step", "state_dict", "load_state_dict"):
            if not callable(getattr(scheduler, method, None)):
                problem = f"makes a {type(scheduler).__name__}, which has no {method}()"
                raise ConfigError(*self._origins.scheduler, problem, "derive it from torch's LRScheduler, or add that")
        check_rates(rates, optimizer, self._config, self._origins)
        return scheduler

    def _evaluate(self, worker: Worker) -> None:
        what = f"the model fails on {self._input_text(training=False)}"
        with as_user_error(*self._origins.model, what, "make model and data fit together"):
            worker.evaluate(_OneBatch(self._batch), np.arange(self._count), self._count)

    def _metrics(self, worker: Worker) -> None:
        """Compute the metrics of the whole test set, of samples from all over it: it may be sorted by classes."""
        loss, *others = worker.measures
        worker.measures = [loss, *(metric for metric in others if not isinstance(metric, SampleMean))]
        if len(worker.measures) == 1:
            return
        source = self._components.dataset.test.to(self._device)
        self._count = len(rows := np.unique(np.linspace(0, len(source) - 1, SPREAD).astype(int)))
        with as_user_error(*self._origins.model, f"fails on {self._count} test samples", "make it fit the data"):
            worker.evaluate(source, rows, self._count)
        for metric in worker.measures[1:]:
            metric.figures()

    def _step(self, worker: Worker) -> None:
        before = trained_digests(worker.model) if self._method.pushes_gradients else {}
        with counted(worker.model) as times:
            self._gradient(worker)
        check_gradients(worker.model, times, self._config, self._method, self._origins)
        check_unwritten(worker.model, before, self._config, self._origins)
        with as_user_error(*self._origins.optimizer, "fails in a step", "choose one that steps along a gradient"):
            worker.apply()
        self._stepped = True

    def _gradient(self, worker: Worker) -> None:
        try:
            worker.gradient(*self._batch)
        except UserError:
            raise
        except Exception as error:
            places = forward_places(lambda: worker.gradient(*self._batch))
            problem = f"the model fails on {self._input_text(training=True)}: {cause(error, places)}"
            raise ConfigError(*self._origins.model, problem, "make model and data fit together") from error

    def _epochs(self, worker: Worker) -> None:
        what = "does not last through the epochs"
        telling_it = as_user_error(*self._origins.scheduler, what, "correct its arguments (train.scheduler_args)")
        with telling_it, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer takes no steps meanwhile
            for _ in range(min(self._config.train.epochs or 2, MOST_EPOCHS)):
                worker.step_scheduler()

    def _save(self, worker: Worker) -> None:
        keys = [key for key in ("every_sec", "every_rounds") if getattr(self._config.checkpoint, key) is not None]
        if not keys:
            return
        try:
            state = worker.state_dict()
            saved = join(*split(state["extra"]))
            split(state)
        except CheckpointError as error:
            of_part = {"optimizer": self._origins.optimizer, "scheduler": self._origins.scheduler}
            path = str(error.file).removeprefix("the state's ")
            key = of_part.get(path.partition(".")[0], self._origins.model)
            remedy = f"{error.remedy}, or set {' '.join(f'checkpoint.{key}=null' for key in keys)}"
            raise ConfigError(*key, f"no checkpoint can hold {path}, {error.problem}", remedy) from error
        what, remedy = "what get_extra_state returns cannot be restored", "correct its set_extra_state"
        with as_user_error(*self._origins.model, what, remedy):
            load_extra_state(worker.model, saved)

    # ---- what a user's functions give -------------------------------------------------------------------------------

    def _input_text(self, training: bool) -> str:
        inputs, targets = self._batch
        mode = "training" if training else "evaluation"
        return f"a batch of {self._count} in {mode} (inputs {describe(inputs)}, targets {describe(targets)})"

    def _loss(self, outputs: Any, targets: Any) -> Numbers:
        self._outputs, key, training = outputs, self._origins.loss, torch.is_grad_enabled()
        what = f"the loss fails on the model's outputs {describe(outputs)} for {self._input_text(training)}"
        with as_user_error(*key, what, "make model, data, loss and its arguments fit together"):
            args = self._config.train.loss_args
            losses, weights = try_loss(*key, self._components.loss, args, self._batched(targets))
        counting = losses if weights is None else losses[weights > 0]
        # a first step may be too long, and statistics may make sense only then: both are another matter
        if training and not self._stepped and counting.isnan().any():
            problem = "is not a number on the first samples"
            raise ConfigError(*key, problem, "look at the data and the model's weights")
        if training and not losses.requires_grad:
            problem = "does not depend on the model's parameters, so there is nothing to learn from it"
            raise ConfigError(*key, problem, "compute it from the outputs, with functions of torch")
        return losses, weights

    def _batched(self, targets: Any) -> Batched:
        sizes = self._config.train.batch_size
        batch = max(_listed(sizes))
        return Batched(self._outputs, targets, self._count, batch)


class _OneBatch:
    """A source that has one batch, whatever is asked for."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return len(self._batch[1])

    def to(self, device: torch.device | str) -> _OneBatch:
        return self

    def batches(self, indices: Any, generator: torch.Generator, start: int = 0) -> Iterator[Batch]:
        yield self._batch
