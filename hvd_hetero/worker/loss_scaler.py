"""Loss scaling: gradients of steps in float16 that would vanish there, and those that overflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hvd_hetero.comm.nonfinite import all_finite
from hvd_hetero.worker.losses import Numbers

START, FACTOR, GROWTH_STEPS = 2.0**16, 2.0, 2000
"""As in PyTorch's scaler."""


class LossScaler:
    """Dynamic loss scaling of one rank (Micikevicius et al., "Mixed Precision Training", 2018).

    Losses are multiplied by the scale before the backward pass, and each gradient is divided by it where it comes to
    its parameter: what is looked at, clipped, sent and stepped along is never scaled, so that ranks with other scales,
    or none, go together. A gradient that overflows is computed once more with half the scale, and in float32 if no
    scale helps or the loss itself has overflowed. So no step is skipped: every rank takes the steps of its plan, and
    the weights of averages are those of the plan. (PyTorch's own scaler divides after the backward pass, when
    synchronous methods have sent the gradients, and skips steps.) Scales are powers of two, and round nothing.

    Args:
        params: all that are trained.

    Attributes:
        scale: that losses are to be multiplied with.
        in_float32: whether the gradient is to be computed without float16 now.
        overflows: gradients that were computed once more.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.scale, self.in_float32, self.overflows, self._steps = START, False, 0, 0
        self._first: float | None = None
        for param in params:
            param.register_hook(self._unscaled)

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient * (1 / self.scale)

    def again(self, gradients: Iterable[Tensor], numbers: Numbers) -> bool:
        """Take note of a gradient; return whether to compute it once more, since it overflows."""
        losses, weights = numbers
        counting = losses.detach() if weights is None else losses.detach()[weights > 0]
        first, tried = self._first or self.scale, self.in_float32
        self._first, self.in_float32 = None, False
        if tried or all_finite([g.coalesce().values() if g.is_sparse else g for g in gradients]):
            return False
        self.overflows += 1
        if self.scale <= 1 or not all_finite([counting]):
            self.scale, self.in_float32 = first, True  # it is not the scale
        else:
            self.scale, self._first, self._steps = self.scale / FACTOR, first, 0
        return True

    def end_step(self) -> None:
        """Take note of a step, of which many without an overflow double the scale."""
        self._steps += 1
        if self._steps == GROWTH_STEPS:
            self.scale, self._steps = self.scale * FACTOR, 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "steps": self._steps, "overflows": self.overflows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale, self._steps, self.overflows = float(state["scale"]), int(state["steps"]), int(state["overflows"])
