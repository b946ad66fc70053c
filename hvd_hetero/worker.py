"""One rank's model, optimizer and device: local steps and evaluation. It never communicates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_hetero.by_name import PerSample
from hvd_hetero.comm.flat import FlatState
from hvd_hetero.data import Batch, Source
from hvd_hetero.modes import evaluating, set_mode
from hvd_hetero.random_state import RandomState
from hvd_hetero.snapshot import snapshot
from hvd_hetero.timing import Pace, Stopwatch


class Worker:
    """Trains one replica.

    Args:
        model: moved to the device, and its parameters into flat vectors.
        loss: ``loss(outputs, targets) -> [B]``, see :func:`per_sample_loss`.
        make_optimizer: makes the optimizer from the parameters.
        make_scheduler: makes a learning-rate scheduler from the optimizer, or None.
        slowdown: emulate a device this many times slower: each local step is stretched by sleeping.
        watch: books the rank's time.
        metric: ``metric(outputs, targets) -> [B]``, the figure that evaluation averages beside the loss.
        clip_norm: gradients whose joint norm is above this are scaled down to it, before the optimizer's step.
        autocast: compute in bfloat16 where PyTorch deems it safe; parameters and gradients stay as they are.
        compile_mode: of ``torch.compile``, which training steps then go through; None: they do not.
        channels_last: keep images and the weights of convolutions with their channels last in memory.

    Attributes:
        state: what an aggregation averages.
        generator: on the device; the only source of the augmentation's randomness.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerSample,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        make_scheduler: Callable[[torch.optim.Optimizer], Any] | None,
        *,
        device: str = "cpu",
        slowdown: float = 1.0,
        watch: Stopwatch | None = None,
        metric: PerSample | None = None,
        seed: int = 0,
        clip_norm: float | None = None,
        autocast: bool = False,
        compile_mode: str | None = None,
        channels_last: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device)
        if not model.training:  # as it comes from where it was loaded; who chooses modes chooses those of its parts
            model.train()
        self._channels_last = channels_last
        self._compiled_once = False
        self._compiled = None if compile_mode is None else torch.compile(self.model, mode=compile_mode, dynamic=False)
        self.state = FlatState(self.model, channels_last)
        self._params = [p for p in self.model.parameters() if p.requires_grad]
        self._gradients: list[Tensor] = []
        self._make_optimizer, self._make_scheduler = make_optimizer, make_scheduler
        self.make_optimizer()
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.watch = watch or Stopwatch()
        self.pace = Pace(self.watch, slowdown, self._synchronize)
        self._loss, self._metric, self.has_metric = loss, metric, metric is not None
        self._clip_norm, self._autocast = clip_norm, autocast
        self._losses: list[Tensor] = []

    def make_optimizer(self, wrap: Callable[[torch.optim.Optimizer], torch.optim.Optimizer] | None = None) -> None:
        """Makes optimizer and scheduler anew, for methods that put something around the optimizer before training."""
        made = self._make_optimizer(self._params)
        self.optimizer = made if wrap is None else wrap(made)
        self._steps = False
        self.scheduler = None if self._make_scheduler is None else self._make_scheduler(self.optimizer)
        self._scheduled = [group["lr"] for group in self.optimizer.param_groups]

    def flat_gradients(self) -> list[Tensor]:
        """From now on gradients are views into these vectors: ``[P]``, one for each of ``state.parameters()``."""
        self._gradients = self.state.flat_gradients()
        return self._gradients

    # ---- training ---------------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Lets the parameters be what is evaluated, averaged and saved, until the next gradient or step.

        They are something else only while an optimizer steps that has modes, see :mod:`hvd_hetero.modes`.
        """
        if self._steps:
            self._steps = False
            set_mode(self.optimizer, training=False)

    def _end_rest(self) -> None:
        if not self._steps:
            self._steps = True
            set_mode(self.optimizer, training=True)

    def local_steps(self, batches: Iterator[Batch], count: int, stop: Callable[[], bool] | None = None) -> int:
        """``count`` local steps on the next batches, fewer if ``stop`` says so after one; returns how many."""
        done = 0
        for inputs, targets in self.pace.steps(batches, count):
            self.gradient(inputs, targets)
            self.apply()
            done += 1
            if stop is not None and stop():
                self.pace.pause()
                break
        return done

    def gradient(self, inputs: Any, targets: Tensor, weight: float = 1.0) -> Tensor:
        """Leaves the gradient of the batch's mean loss, times weight, in the parameters.

        Returns:
            The per-sample losses ``[B]``, on the device; they are also kept for :meth:`take_losses`.
        """
        self._end_rest()
        try:
            losses = self._backward(self._compiled or self.model, inputs, targets, weight)
        except Exception as error:
            if self._compiled is None or self._compiled_once:
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(f"train.compile: goes on without it, it fails here: {reason[0]}", stacklevel=2)
            self._compiled = None
            losses = self._backward(self.model, inputs, targets, weight)
        self._compiled_once = True
        self._losses.append(losses)
        return losses

    def _backward(self, model: Callable[..., Any], inputs: Any, targets: Tensor, weight: float) -> Tensor:
        for gradient in self._gradients:
            gradient.zero_()
        if not self._gradients:
            for param in self._params:
                param.grad = None
        losses = self._losses_of(inputs, targets, model)[0]
        losses.backward(torch.full_like(losses, weight / len(losses)))  # their mean's gradient, without the mean
        return losses.detach()

    def gradients(self) -> list[Tensor]:
        """The gradients at hand, of those parameters that have one."""
        return [p.grad for p in self._params if p.grad is not None]

    def gradient_again(self, inputs: Any, targets: Tensor, weight: float) -> list[Tensor]:
        """The gradient once more, of those parameters that have one at hand, beside it; no hook is called."""
        losses = self._losses_of(inputs, targets)[0]
        params = [p for p in self._params if p.grad is not None]
        return list(torch.autograd.grad(losses.mean() * weight, params, allow_unused=True, materialize_grads=True))

    def apply(self) -> None:
        """One optimizer step along the gradient at hand."""
        self._end_rest()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._params, self._clip_norm)
        self.optimizer.step()

    def _losses_of(
        self, inputs: Any, targets: Tensor, model: Callable[..., Any] | None = None
    ) -> tuple[Tensor, Any]:
        if self._channels_last and isinstance(inputs, Tensor) and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        # entering a context that is switched off takes a tenth of a tiny model's step
        with torch.autocast(self.device.type, torch.bfloat16) if self._autocast else nullcontext():
            outputs = forward(model or self.model, inputs)
            return self._loss(outputs, targets), outputs

    def take_losses(self) -> Tensor:
        """The losses ``[K]`` of all samples since the last call, in the order of training, on the host."""
        taken = torch.cat(self._losses).cpu() if self._losses else torch.empty(0)
        self._losses = []
        return taken.float()

    def warm_up(self, factor: float) -> None:
        """Scales the scheduled learning rate, in (0, 1], until the next call."""
        for group, rate in zip(self.optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = rate * factor

    def end_epoch(self) -> None:
        """Steps the scheduler, from the scheduled rate and not from a warm-up's."""
        self.warm_up(1.0)
        if self.scheduler is not None:
            self.scheduler.step()
        self._scheduled = [group["lr"] for group in self.optimizer.param_groups]

    # ---- evaluation -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def evaluate(self, source: Source, indices: np.ndarray[Any, Any], batch_size: int) -> tuple[float, float]:
        """Sums of loss and metric over the given samples of a source; all modes are left as they were."""
        total = torch.zeros(2, dtype=torch.float64)
        whole = len(indices) // batch_size * batch_size
        self.rest()
        with evaluating(self.model):
            for rows in (indices[:whole].reshape(-1, batch_size), indices[whole:].reshape(1, -1)):
                for inputs, targets in source.batches(rows, self.generator) if rows.size else ():
                    self.watch.pulse.begin("evaluation")
                    losses, outputs = self._losses_of(inputs, targets)
                    total[0] += losses.sum().cpu()
                    if self._metric is not None:
                        total[1] += self._metric(outputs, targets).sum().cpu()
        return float(total[0]), float(total[1])

    # ---- saving and putting back ------------------------------------------------------------------------------------

    def snapshot(self) -> Callable[[], None]:
        """Remembers everything that training changes; calling the result puts it back."""
        before, steps = RandomState.capture(self.device), self._steps
        put_back = snapshot(
            self.model, self.optimizer, self.scheduler, self._loss, self._metric, self.generator
        )

        def restore() -> None:
            put_back()
            before.restore()
            self._losses, self._steps = [], steps

        return restore

    def state_dict(self) -> dict[str, Any]:
        """Everything of this rank that decides its further steps, between two rounds."""
        self.rest()  # which mode an optimizer is in is not always in its own state
        return {
            "tensors": [t.detach() for t in self.state.everything()],
            "layout": [str((name, list(p.shape), p.stride())) for name, p in self.model.named_parameters()],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "rates": self._scheduled,
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "losses": torch.cat(self._losses).cpu() if self._losses else torch.empty(0),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave on the same kind of device."""
        for own, saved in zip(self.state.everything(), state["tensors"], strict=True):
            own.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self._lay_out_optimizer()
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self._scheduled = list(state["rates"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        self._losses = [state["losses"].to(self.device)]

    def _lay_out_optimizer(self) -> None:
        """Lays out its tensors as their parameters are: files keep no strides, and fused optimizers ask for none."""
        for param in self._params:
            state = self.optimizer.state.get(param, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == param.shape and value.stride() != param.stride():
                    state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)

    @torch.no_grad()
    def carry_over(self, state: Mapping[str, Any]) -> None:
        """Takes the model alone from what another rank's :meth:`state_dict` gave."""
        for own, saved in zip(self.state.everything(), state["tensors"], strict=True):
            own.copy_(saved)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # not what averages and gradients travel on


def forward(model: Callable[..., Any], inputs: Any) -> Any:
    """Calls the model: a tuple of inputs as positional arguments, a dict as keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
