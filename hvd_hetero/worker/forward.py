"""What a worker computes without training: the losses of batches, and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_hetero.data import Batch, Source, read
from hvd_hetero.data.batch import Weighted
from hvd_hetero.random_state import RandomState
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.worker.loss_scaler import LossScaler
from hvd_hetero.worker.losses import Numbers, PerSample, concat, numbers_of
from hvd_hetero.worker.metrics import Metric, SampleMean
from hvd_hetero.worker.modes import evaluating

Through = Callable[[Iterator[Batch]], Iterable[Batch]]


class ForwardPasses:
    """The part of :class:`hvd_hetero.worker.worker.Worker` that goes forward only."""

    model: nn.Module
    device: torch.device
    generator: torch.Generator
    watch: Stopwatch
    measures: list[Metric]
    scaler: LossScaler | None
    _channels_last: bool
    _autocast: torch.dtype | None
    _loss: PerSample
    _mean_loss: SampleMean

    def set_eval_mode(self) -> None:
        raise NotImplementedError(type(self).__name__)

    def _losses_of(
        self, inputs: Any, targets: Any, model: Callable[..., Any] | None = None
    ) -> tuple[Numbers, Any]:
        """Return the losses of a batch, and the model's outputs."""
        if isinstance(targets, Weighted):
            targets = targets.targets
        if self._channels_last and isinstance(inputs, Tensor) and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        kind = None if self.scaler is not None and self.scaler.in_float32 else self._autocast
        # entering a context that is switched off takes a tenth of a tiny model's step
        with nullcontext() if kind is None else torch.autocast(self.device.type, kind):
            outputs = forward(self.model if model is None else model, inputs)
            returned = self._loss(outputs, targets)
        return numbers_of("train.loss", self._loss, returned, inputs, targets), outputs

    @torch.no_grad()
    def score(self, batches: Iterable[Batch]) -> Tensor:
        """Return the losses ``[K]`` that training steps on these batches would note, on the host; no step is taken.

        Modes are those of training, so that these losses and those of steps can be compared: dropout drops, and
        statistics are of the batch. A sample that does not count has the loss -inf.
        """
        return concat([self._losses_of(inputs, targets)[0] for inputs, targets in batches])[0]

    @torch.no_grad()  # and not inference_mode: what a module keeps of an evaluation, it may use in training
    def evaluate(
        self, source: Source, indices: np.ndarray[Any, Any], batch_size: int, through: Through = iter
    ) -> None:
        """Fill :attr:`measures` with some samples of a source; modes and random numbers are left as they were.

        Args:
            through: what batches pass through on their way.
        """
        random, generator = RandomState.capture(self.device), self.generator.get_state()
        for metric in self.measures:
            metric.begin(self.device)
        in_full_batches = len(indices) // batch_size * batch_size
        self.set_eval_mode()
        with evaluating(self.model):
            for rows in (indices[:in_full_batches].reshape(-1, batch_size), indices[in_full_batches:].reshape(1, -1)):
                batches = through(read(source, rows, self.generator, split="test")) if rows.size else ()
                for inputs, targets in batches:
                    self.watch.heartbeat.begin("evaluation")
                    losses, outputs = self._losses_of(inputs, targets)
                    self._mean_loss.enter(losses)
                    for metric in self.measures[1:]:
                        metric.add(outputs, targets, inputs)
        random.restore()
        self.generator.set_state(generator)


def forward(model: Callable[..., Any], inputs: Any) -> Any:
    """Calls the model: a tuple of inputs as positional arguments, a mapping as keyword arguments, all else as one.

    A named tuple, such as a packed sequence, is one argument; so is a list.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if type(inputs) is tuple else model(inputs)
