"""Metrics of the test set: means over samples, torchmetrics, and functions of the whole set (eval.metrics).

A metric is filled batch by batch on each rank, with that rank's part of the test set, and computed of all of it. One
with a number for each sample adds up. One of torchmetrics gathers its states, as it does by itself under
torch.distributed. A function of the whole set gets all outputs and targets, in the order of the test set, on one rank.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_hetero.config.instantiate import call, cause, import_target
from hvd_hetero.data.batch import entries
from hvd_hetero.describe import describe
from hvd_hetero.errors import ConfigError, UserError, nearest
from hvd_hetero.worker.factories import ACCURACY, accuracy
from hvd_hetero.worker.loss_modules import loss_of_module, module_of
from hvd_hetero.worker.losses import (
    IGNORED,
    Numbers,
    PerSample,
    check_weights,
    mean,
    name_of,
    numbers_of,
    weighted_sums,
    with_arguments,
)

if TYPE_CHECKING:
    from hvd_hetero.comm.communicator import Comm

LOSS, MAX, MIN = "loss", "max", "min"
NAME = re.compile(r"[A-Za-z]\w*")
KEYS, OVER = ("target", "over", "args"), ("samples", "dataset")
ONE_NUMBER = "return one number, or a dict of numbers"
MOST = 2**31 - 1


class Metric:
    """One figure of the test set, or several.

    Args:
        name: of the figure; of several, the first part of their names.
        key: what it comes from, for messages, with ``value``.
    """

    def __init__(self, name: str, key: str, value: Any) -> None:
        self.name, self.key, self.value = name, key, value

    def begin(self, device: torch.device) -> None:
        """Forget what it was filled with."""
        raise NotImplementedError(type(self).__name__)

    def add(self, outputs: Any, targets: Any, inputs: Any) -> None:
        """Take in a batch."""
        raise NotImplementedError(type(self).__name__)

    def figures(self, comm: Comm | None = None, root: int = 0) -> dict[str, float]:
        """Return what it comes to, by name; on all ranks the same.

        Args:
            comm: None: of what this rank was filled with alone.
            root: a rank that was filled with something.

        Raises:
            ConfigError: it fails, or gives no number.
        """
        raise NotImplementedError(type(self).__name__)

    def _named(self, result: Any) -> dict[str, float]:
        """Name numbers; of a mapping's values those that are one number."""
        if isinstance(result, Mapping):
            named = {f"{self.name}_{key}": _number(part) for key, part in result.items()}
            found = {name: number for name, number in named.items() if number is not None}
        else:
            number = _number(result)
            found = {} if number is None else {self.name: number}
        if not found:
            raise ConfigError(self.key, self.value, f"gives {describe(result)}, which is no number", ONE_NUMBER)
        return found

    def _tried(self, compute: Callable[[], Any]) -> Any:
        try:
            return compute()
        except UserError:
            raise
        except Exception as error:
            raise ConfigError(self.key, self.value, f"fails: {cause(error)}", "correct it, or leave it out") from error


class SampleMean(Metric):
    """The mean of a number for each sample, over what counts; the loss is one.

    Attributes:
        module: what is moved to the device of the outputs: the function, where it is a module.
        sums: of values and of their weights, on this rank.
    """

    def __init__(self, name: str, key: str, value: Any, function: PerSample) -> None:
        super().__init__(name, key, value)
        self.function = function
        self.module = function if isinstance(function, nn.Module) else None
        self.sums = torch.zeros(2, dtype=torch.float64)

    def begin(self, device: torch.device) -> None:
        if self.module is not None:
            self.module.to(device)
        self.sums = torch.zeros(2, dtype=torch.float64)

    def add(self, outputs: Any, targets: Any, inputs: Any) -> None:
        self.enter(numbers_of(self.key, self.function, self.function(outputs, targets), inputs, targets))

    def enter(self, numbers: Numbers) -> None:
        """Take in the numbers of a batch."""
        if numbers[1] is not None:
            check_weights(self.key, self.value, numbers[1])
        self.sums += weighted_sums(*numbers)

    def figures(self, comm: Comm | None = None, root: int = 0) -> dict[str, float]:
        total = self.sums.tolist()
        return {self.name: mean(*(total if comm is None else comm.sum(total, f"metric.{self.name}")))}


class WholeSet(Metric):
    """A function of the outputs and targets of the whole test set: F1, AUC, perplexity.

    It gets them on the CPU. Tensors are joined along their first dimension, in tuples, dicts and dataclasses (as dicts)
    too; lists, which have one entry a sample, are joined as lists.
    """

    def __init__(self, name: str, key: str, value: Any, function: Callable[[Any, Any], Any]) -> None:
        super().__init__(name, key, value)
        self.function = function
        self._batches: list[tuple[Any, Any]] = []

    def begin(self, device: torch.device) -> None:
        self._batches = []

    def add(self, outputs: Any, targets: Any, inputs: Any) -> None:
        self._batches.append(_plain((outputs, targets)))

    def figures(self, comm: Comm | None = None, root: int = 0) -> dict[str, float]:
        batches, self._batches = self._batches, []
        if comm is None:  # on trial: whatever is to be sent later
            batches = self._tried(lambda: _from_bytes(_to_bytes(batches)))
        if comm is None or comm.size == 1:
            return self._computed(batches)
        content = _to_bytes(batches)
        if len(content) > MOST:
            problem = f"outputs and targets of a rank take {len(content)} bytes, more than can be sent at once"
            raise ConfigError(self.key, self.value, problem, "take over: samples, or torchmetrics")
        parts = comm.gather_bytes(content, f"metric.{self.name}.parts", root)
        found = self._computed([batch for part in parts for batch in _from_bytes(part)]) if parts else {}
        values: dict[str, float] = json.loads(comm.broadcast_text(json.dumps(found), f"metric.{self.name}", root))
        return values

    def _computed(self, batches: Sequence[tuple[Any, Any]]) -> dict[str, float]:
        return self._named(self._tried(lambda: self.function(*_joined(batches))))


class Streaming(Metric):
    """A metric of torchmetrics, which adds up batches in states of its own.

    Args:
        metric: a ``torchmetrics.Metric``.
    """

    def __init__(self, name: str, key: str, value: Any, metric: Any) -> None:
        super().__init__(name, key, value)
        self.metric = metric

    def begin(self, device: torch.device) -> None:
        self.metric.to(device)
        self.metric.reset()

    def add(self, outputs: Any, targets: Any, inputs: Any) -> None:
        self._tried(lambda: self.metric.update(outputs, targets))

    def figures(self, comm: Comm | None = None, root: int = 0) -> dict[str, float]:
        if comm is None or comm.size == 1:
            return self._named(self._tried(self.metric.compute))
        name, hooks = f"metric.{self.name}", (self.metric.distributed_available_fn, self.metric.dist_sync_fn)
        self.metric.distributed_available_fn = lambda: True
        self.metric.dist_sync_fn = lambda state, group=None: _without_gaps(comm.gather_tensors(state, f"{name}.state"))
        found = self._named(self._tried(self.metric.compute))
        self.metric.distributed_available_fn, self.metric.dist_sync_fn = hooks  # it may be a program's, for more runs
        # devices round differently, and all ranks decide by the figures
        values: dict[str, float] = json.loads(comm.broadcast_text(json.dumps(found), name, root))
        return values


# ---- from settings and programs ------------------------------------------------------------------------------------


def read_metrics(key: str, metrics: Any, ignored: int = IGNORED) -> list[Metric]:
    """Make the metrics of ``eval.metrics``, or those that a program gives in its place.

    Args:
        key: what they come from.
        metrics: by name: ``accuracy``, a function or a torchmetrics metric (by import path, or itself), or a mapping
            with it as ``target``, ``over: samples`` or ``dataset``, and its other arguments ``args``. Modules that
            return a mean, such as ``nn.MSELoss()``, are taken as losses are.
        ignored: the class number that does not count in an accuracy.

    Raises:
        ConfigError: an entry is none of these.
    """
    if not isinstance(metrics, Mapping):
        raise ConfigError(key, metrics, "is no mapping of names to metrics", "write {accuracy: accuracy}")
    return [_read(f"{key}.{name}", str(name), entry, ignored) for name, entry in metrics.items()]


def _read(key: str, name: str, entry: Any, ignored: int) -> Metric:
    if NAME.fullmatch(name) is None or name == LOSS:
        problem = "is the name of the loss" if name == LOSS else "cannot be a name here"
        raise ConfigError(key, name, problem, "choose another, of letters, digits and _")
    fields = dict(entry) if isinstance(entry, Mapping) else {"target": entry}
    for part in fields:
        if part not in KEYS:
            raise ConfigError(f"{key}.{part}", fields[part], "is not a known key", nearest(part, KEYS))
    target, over, args = fields.get("target"), fields.get("over", OVER[0]), fields.get("args", {})
    if over not in OVER:
        raise ConfigError(f"{key}.over", over, "is neither", f"give {' or '.join(OVER)}")
    if not isinstance(args, Mapping):
        raise ConfigError(f"{key}.args", args, "is no mapping", "give {name: value}")
    value = target if isinstance(target, str) or target is None else name_of(target)
    if isinstance(target, str):  # a metric of torchmetrics says that it equals everything
        if target == ACCURACY:
            return SampleMean(name, key, value, partial(accuracy, ignored=ignored))
        if ":" not in target:
            raise ConfigError(key, target, "is not known", f"give {ACCURACY} or package.module:function")
        target = import_target(key, target)
    if _is_streaming(target):
        metric = call(f"{key}.args", target, args) if isinstance(target, type) else target
        return Streaming(name, key, value, metric)
    if not callable(target):
        raise ConfigError(key, target, "is no metric", "give a function of outputs and targets, or leave it out")
    target, args = module_of(target, args, f"{key}.args")
    if over == OVER[0]:
        return SampleMean(name, key, value, loss_of_module(target, args=args, key=f"{key}.args"))
    return WholeSet(name, key, value, with_arguments(target, args, f"{key}.args") if args else target)


def read_best(spec: Any, metrics: Sequence[Metric]) -> tuple[str, str]:
    """Return the metric by which evaluations are compared, and max or min, which of its values is the best.

    Args:
        spec: ``eval.best``; None: the highest accuracy, or the lowest loss where there is none.

    Raises:
        ConfigError: it names no metric, or nothing else than one.
    """
    names = [LOSS, *(metric.name for metric in metrics)]
    if spec is None:
        return (ACCURACY, MAX) if ACCURACY in names else (LOSS, MIN)
    if not isinstance(spec, Mapping) or set(spec) != {"metric", "mode"}:
        problem = "does not say which metric is to be what"
        raise ConfigError("eval.best", spec, problem, "write {metric: loss, mode: min}")
    name, mode = str(spec["metric"]), spec["mode"]
    if mode not in (MAX, MIN):
        raise ConfigError("eval.best.mode", mode, "is neither", f"give {MAX} or {MIN}")
    several = [metric.name for metric in metrics if not isinstance(metric, SampleMean)]
    if name not in names and not any(name.startswith(f"{other}_") for other in several):
        raise ConfigError("eval.best.metric", name, "is no metric of the evaluation", nearest(name, names))
    return name, mode


def _is_streaming(target: Any) -> bool:
    torchmetrics = sys.modules.get("torchmetrics")
    kind = target if isinstance(target, type) else type(target)
    return torchmetrics is not None and issubclass(kind, torchmetrics.Metric)


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() != 1:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


# ---- batches of the whole set ---------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return outputs or targets of dicts, lists, tuples and tensors on the host, in memory of their own."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    parts = entries(value)
    if parts is None:
        return value
    plain = {name: _plain(part) for name, part in parts.items()}
    return type(value)(plain.values()) if type(value) in (list, tuple) else plain


def _to_bytes(batches: Any) -> bytes:
    file = io.BytesIO()
    torch.save(batches, file)
    return file.getvalue()


def _from_bytes(content: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(content), weights_only=True)
    except UnpicklingError as error:
        kinds = "tensors, numbers, texts, and tuples, lists and dicts of them"
        raise TypeError(f"outputs and targets go to one rank, and may only hold {kinds}") from error


def _joined(batches: Sequence[Any]) -> Any:
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches)) if first.dim() else torch.stack(list(batches))
    if isinstance(first, list):
        return [sample for batch in batches for sample in batch]
    if isinstance(first, tuple):
        return tuple(_joined(parts) for parts in zip(*batches, strict=True))
    if isinstance(first, dict):
        return {name: _joined([batch[name] for batch in batches]) for name in first}
    return first


def _without_gaps(parts: Sequence[Tensor]) -> list[Tensor]:
    """Give states without entries, of ranks that had no batch, the type and shape of the others."""
    like = next((part for part in parts if part.numel()), None)
    return [part if part.numel() or like is None or not like.dim() else like[:0] for part in parts]
