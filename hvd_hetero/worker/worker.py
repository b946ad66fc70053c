"""One rank's model, optimizer and device: local steps, and forward passes by its base. It never communicates."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hvd_hetero.comm.flat_params import FlatState
from hvd_hetero.data import Batch
from hvd_hetero.errors import ConfigError
from hvd_hetero.random_state import RandomState
from hvd_hetero.telemetry.emulation import SlowdownEmulator
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.worker.extra_state import extra_state, load_extra_state, load_state_beside, state_beside
from hvd_hetero.worker.forward import ForwardPasses
from hvd_hetero.worker.loss_scaler import LossScaler
from hvd_hetero.worker.losses import Numbers, PerSample, check_weights, concat, mean_gradient, name_of
from hvd_hetero.worker.metrics import LOSS, Metric, SampleMean
from hvd_hetero.worker.micro_batches import accumulate
from hvd_hetero.worker.modes import set_mode
from hvd_hetero.worker.optimizer_state import lay_out, load_state, save_state
from hvd_hetero.worker.snapshot import snapshot
from hvd_hetero.worker.unused_parameters import UnusedParameters


class Worker(ForwardPasses):
    """Trains one replica.

    Args:
        model: moved to the device, and its parameters into flat vectors.
        loss: ``loss(outputs, targets)``, one number a sample, see :mod:`hvd_hetero.worker.losses`.
        make_optimizer: makes the optimizer from the parameters.
        make_scheduler: makes a learning-rate scheduler from the optimizer, or None.
        slowdown: emulate a device this many times slower: each local step is stretched by sleeping.
        watch: books the rank's time.
        metrics: what an evaluation fills beside the loss.
        clip_norm: gradients whose joint norm is above this are scaled down to it, before the optimizer's step.
        autocast: compute in this type, bfloat16 or float16, where PyTorch deems it safe; None: in that of the model.
            Parameters and gradients stay as they are.
        compile_mode: of ``torch.compile``, which training steps then go through; None: they do not.
        channels_last: keep images and the weights of convolutions with their channels last in memory.
        state_policies: ``aggregation.state``, what becomes of frozen parameters and buffers that change.
        micro_batches: parts that a batch is cut into, whose gradients are accumulated, and ``min_batch``, samples that
            the model needs in each of them.

    Attributes:
        state: what an aggregation averages.
        measures: the mean loss as a metric, then the argument's.
        scaler: of the losses, where it computes in float16.
        generator: on the device; the only source of the augmentation's randomness.
    """

    _losses_key = "train.loss"

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
        metrics: Sequence[Metric] = (),
        seed: int = 0,
        clip_norm: float | None = None,
        autocast: torch.dtype | None = None,
        compile_mode: str | None = None,
        channels_last: bool = False,
        state_policies: Mapping[str, str] | None = None,
        micro_batches: int = 1,
        min_batch: int = 1,
    ) -> None:
        self.micro_batches, self.min_batch = micro_batches, min_batch
        self.device = torch.device(device)
        self.model = model.to(self.device)
        if not model.training:  # as it comes from where it was loaded; who chooses modes chooses those of its parts
            model.train()
        self._channels_last, self._compiled_once = channels_last, False
        self._compiled = None if compile_mode is None else torch.compile(self.model, mode=compile_mode, dynamic=False)
        self.state = FlatState(self.model, channels_last, state_policies)
        self._params = [p for p in self.model.parameters() if p.requires_grad]
        self._learning = {name for name, p in self._named() if p.requires_grad}
        self._gradients: list[Tensor] = []
        self._unused: UnusedParameters | None = None
        self.scaler = LossScaler(self._params) if autocast is torch.float16 else None
        self._make_optimizer, self._make_scheduler = make_optimizer, make_scheduler
        self.make_optimizer()
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.watch = watch or Stopwatch()
        self.emulator = SlowdownEmulator(self.watch, slowdown, self._synchronize)
        self._loss, unwrapped = loss, inspect.unwrap(loss)
        self._loss_module = unwrapped.to(self.device) if isinstance(unwrapped, nn.Module) else None
        self._mean_loss = SampleMean(LOSS, "train.loss", name_of(loss), loss)
        self.measures: list[Metric] = [self._mean_loss, *metrics]
        self._clip_norm, self._autocast = clip_norm, autocast
        self._losses: list[Numbers] = []

    def make_optimizer(self, wrap: Callable[[torch.optim.Optimizer], torch.optim.Optimizer] | None = None) -> None:
        """Makes optimizer and scheduler anew, for methods that put something around the optimizer before training."""
        optimizer = self._make_optimizer(self._params)
        self.optimizer = optimizer if wrap is None else wrap(optimizer)
        if wrap is not None:
            self._sum_gradients()
        self._sends = self.optimizer is not optimizer  # gradients leave while the backward pass still goes on
        self._steps = False
        self.scheduler = None if self._make_scheduler is None else self._make_scheduler(self.optimizer)
        self._scheduled = [group["lr"] for group in self.optimizer.param_groups]

    def optimizer_of(self, copies: Mapping[Tensor, nn.Parameter]) -> torch.optim.Optimizer:
        """Make an optimizer of the same kind and groups for copies on the host of the trainable parameters."""
        optimizer = self._make_optimizer(self._params)  # it may know them by their names, or by what they are
        for group in optimizer.param_groups:
            group["params"] = [copies[param] for param in group["params"]]
        for param in list(optimizer.state):
            optimizer.state[copies[param]] = {key: value.cpu() if isinstance(value, Tensor) else value
                                         for key, value in optimizer.state.pop(param).items()}  # fmt: skip
        return optimizer

    def clip(self, params: Iterable[Tensor]) -> None:
        """Clip gradients by the norm that is set."""
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(params, self._clip_norm)

    @property
    def compiles(self) -> bool:
        """Whether training steps go through ``torch.compile``."""
        return self._compiled is not None

    def flat_gradients(self) -> list[Tensor]:
        """From now on gradients are views into these vectors: ``[P]``, one for each of ``state.parameters()``."""
        self._gradients = self.state.flat_gradients()
        self._sum_gradients()
        return self._gradients

    def _sum_gradients(self) -> None:
        """Gradients become sums over ranks, which are there for parameters too that nothing has used."""
        self._unused = UnusedParameters({name: p for name, p in self.model.named_parameters() if p.requires_grad})

    # ---- training ---------------------------------------------------------------------------------------------------

    @property
    def pace(self) -> SlowdownEmulator:
        """The emulator by its former name, which docs/methods.md gave; for one release."""
        warnings.warn("Worker.pace is now Worker.emulator: the former one is kept for one release", FutureWarning, 2)
        return self.emulator
    def set_eval_mode(self) -> None:
        """Lets the parameters be what is evaluated, averaged and saved, until the next gradient or step.

        They are something else only while an optimizer steps that has modes, see :mod:`hvd_hetero.worker.modes`.
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
        for inputs, targets in self.emulator.steps(batches, count):
            self.gradient(inputs, targets)
            self.apply()
            done += 1
            if stop is not None and stop():
                self.emulator.pause()
                break
        return done

    def gradient(
        self, inputs: Any, targets: Any, weight: float = 1.0, stop: Callable[[], bool] | None = None
    ) -> Tensor:
        """Leaves the gradient of the batch's mean loss, times weight, in the parameters.

        Args:
            stop: asked between micro-batches whether those that are left are to be left out. Their gradient then is
                taken to be zero.

        Returns:
            The per-sample losses ``[B]``, on the device; they are also kept for :meth:`pop_losses`. Samples that were
            left out have none, and do not count.
        """
        self._end_rest()
        numbers = self._tried(inputs, targets, weight, stop)
        while self.scaler is not None and not self._sends and self.scaler.again(self.gradients(), numbers):
            numbers = self._tried(inputs, targets, weight, stop)
        if self.scaler is not None:
            self.scaler.end_step()
        self._losses.append(numbers)
        return numbers[0]

    def _tried(self, inputs: Any, targets: Any, weight: float, stop: Callable[[], bool] | None) -> Numbers:
        """Go forward and backward, and without the compiler from then on if it fails at first."""
        try:
            model = self.model if self._compiled is None else self._compiled  # a module may be false
            numbers = self._backward(model, inputs, targets, weight, stop)
        except Exception as error:
            if self._compiled is None or self._compiled_once:
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(f"train.compile: goes on without it, it fails here: {reason[0]}", stacklevel=2)
            self._compiled = None
            numbers = self._backward(self.model, inputs, targets, weight, stop)
        self._compiled_once = True
        return numbers

    def _backward(
        self, model: Callable[..., Any], inputs: Any, targets: Any, weight: float, stop: Callable[[], bool] | None
    ) -> Numbers:
        for gradient in self._gradients:
            gradient.zero_()
        if not self._gradients:
            for param in self._params:
                param.grad = None

        def add(losses: Tensor, grad_output: Tensor) -> None:
            losses.backward(self._scaled(grad_output))

        return accumulate((inputs, targets), self.micro_batches, self.min_batch, weight,
                          partial(self._dependent_losses, model), add, self._scale_gradients, stop)  # fmt: skip

    def _scale_gradients(self, factor: Tensor) -> None:
        for gradient in self.gradients():
            gradient.mul_(factor)

    def _dependent_losses(self, model: Callable[..., Any], inputs: Any, targets: Any) -> Numbers:
        (losses, weights), _ = self._losses_of(inputs, targets, model)
        if not losses.requires_grad:
            problem = "does not depend on the model's parameters in this batch"
            raise ConfigError("train.loss", name_of(self._loss), problem, "compute it from the outputs, always")
        if self._compiled is not None:  # a loss may be the model's own output, which a CUDA graph writes to again
            losses, weights = losses.clone(), None if weights is None else weights.clone()
        return losses, weights

    def _scaled(self, grad_output: Tensor) -> Tensor:
        return grad_output if self.scaler is None else grad_output * self.scaler.scale

    def gradients(self) -> list[Tensor]:
        """The gradients at hand, of those parameters that the optimizer steps along and that have one."""
        return [p.grad for p in self._stepped() if p.grad is not None]

    def _stepped(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def gradient_again(self, inputs: Any, targets: Any, weight: float) -> list[Tensor]:
        """The gradient once more, as :meth:`gradients` gives it, beside it; no hook is called that would send it."""
        params = [p for p in self._stepped() if p.grad is not None]
        total = [torch.zeros_like(p) for p in params]

        def add(losses: Tensor, grad_output: Tensor) -> None:
            grad_output = self._scaled(grad_output)
            found = torch.autograd.grad(losses, params, grad_output, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(total, found)

        def rescale(factor: Tensor) -> None:
            for gradient in total:
                gradient.mul_(factor)

        while True:
            numbers = accumulate((inputs, targets), self.micro_batches, self.min_batch, weight,
                                 lambda *part: self._losses_of(*part)[0], add, rescale)  # fmt: skip
            if self.scaler is None or not self.scaler.again(total, numbers):
                return total
            torch._foreach_zero_(total)

    def try_gradient(self, inputs: Any, targets: Tensor) -> None:
        """Goes forward and backward over a batch and keeps nothing: no gradient, no losses; no hook is called."""
        (losses, weights), _ = self._losses_of(inputs, targets)
        torch.autograd.grad(losses, self._params, self._scaled(mean_gradient(losses, weights, 1.0)), allow_unused=True)

    def apply(self) -> None:
        """One optimizer step along the gradient at hand."""
        self._end_rest()
        with nullcontext() if self._unused is None else self._unused.without_gradients():
            self.clip(self._params)
            self.optimizer.step()

    def pop_losses(self) -> tuple[Tensor, Tensor]:
        """Return losses and weights ``[K]`` of all samples since the last call, in the order of training.

        They are on the host, in float32. A sample that does not count has the loss -inf, and weight 0.

        Raises:
            ConfigError: the loss has given weights that make no mean; to look at each batch, a GPU would have to stop.
        """
        (losses, weights), self._losses = concat(self._losses), []
        check_weights(self._losses_key, name_of(self._loss), weights)
        return losses, weights

    def check_learning(self) -> None:
        """Refuse parameters that have come to learn while training: the optimizer was made without them.

        Raises:
            ConfigError: one that was frozen, or was not there, has a gradient.
        """
        own = set(self._params)
        for name, param in self._named():
            if param.grad is not None and param.requires_grad and name not in self._learning and param not in own:
                problem = "has a gradient, but the optimizer was made without it: it was frozen then, or not there"
                remedy = "let it learn from the start, or begin another run with it from this one's model"
                raise ConfigError("model", name, problem, remedy)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters(remove_duplicate=False)

    @property
    def rate(self) -> float:
        """The scheduled learning rate, of the first group of parameters."""
        return float(self._scheduled[0])

    def scale_rate(self, factor: float) -> None:
        """Scale the scheduled learning rate, by a factor in [0, 1], until the next call."""
        for group, rate in zip(self.optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = rate * factor

    def step_scheduler(self) -> None:
        """Step the scheduler, from the scheduled rate and not from a scaled one."""
        self.scale_rate(1.0)
        if self.scheduler is not None:
            self.scheduler.step()
        self._scheduled = [group["lr"] for group in self.optimizer.param_groups]

    # ---- saving and putting back ------------------------------------------------------------------------------------

    def snapshot(self) -> Callable[[], None]:
        """Remembers everything that training changes; calling the result puts it back."""
        before, steps = RandomState.capture(self.device), self._steps
        restore_objects = snapshot(self.model, self.state, self.optimizer, self.scheduler, self._loss, self.measures,
                                   self.generator, self.scaler)  # fmt: skip

        def restore() -> None:
            restore_objects()
            before.restore()
            self._losses, self._steps = [], steps

        return restore

    def state_dict(self) -> dict[str, Any]:
        """Everything of this rank that decides its further steps, between two rounds."""
        self.set_eval_mode()  # which mode an optimizer is in is not always in its own state
        return {
            "model": self.state.state_dict(),
            "extra": extra_state(self.model),
            "loss": None if self._loss_module is None else state_beside(self._loss_module, self.model),
            "optimizer": save_state(self.optimizer),
            "scheduler": None if self.scheduler is None else save_state(self.scheduler),
            "rates": self._scheduled,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "random": RandomState.capture(self.device).state_dict(),
            "losses": concat(self._losses),
            "micro_batches": self.micro_batches,
            "unused": None if self._unused is None else self._unused.names,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave on the same kind of device."""
        self._load_model(state)
        if self._loss_module is not None and state.get("loss") is not None:
            load_state_beside(self._loss_module, self.model, state["loss"], self.device)
        load_state(self.optimizer, state["optimizer"], "optimizer")
        lay_out(self.optimizer, self._params)
        if self.scheduler is not None:
            load_state(self.scheduler, state["scheduler"], "scheduler")
        self._scheduled = list(state["rates"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        RandomState.from_state_dict(state["random"], self.device).restore()
        losses, weights = state["losses"]
        self._losses = [(losses.to(self.device), weights.to(self.device))]

    @torch.no_grad()
    def carry_over(self, state: Mapping[str, Any]) -> None:
        """Takes the model alone from what another rank's :meth:`state_dict` gave."""
        self._load_model(state)
        self.state.untrained.remember()

    def _load_model(self, state: Mapping[str, Any]) -> None:
        self.state.load_state_dict(state["model"])
        load_extra_state(self.model, state["extra"])
        if self._unused is not None and state.get("unused") is not None:
            self._unused.names = state["unused"]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # not what averages and gradients travel on
