"""The outer optimizer, which may follow an average of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hvd_hetero.comm.flat_params import FlatState


class OuterOptimizer:
    """Take an average of local models as a proposal, and make SGD on it the step::

        d = x - average                       # the outer gradient; x is the model that the round began with
        v = momentum * v + d
        x = x - lr * (d + momentum * v if nesterov else v)

    One local optimizer with lr < 1 is Lookahead (Zhang et al. 2019), momentum is SlowMo (Wang et al. 2020), Nesterov
    momentum DiLoCo (Douillard et al. 2023). With lr 1 and no momentum it is plain averaging and does nothing at all.
    Buffers (running statistics) are averaged, never extrapolated. All ranks do the same, so their models stay equal.

    Args:
        state: the model; its vectors hold x when a round begins, and the average when :meth:`step` is called.
    """

    def __init__(self, state: FlatState, lr: float, momentum: float, nesterov: bool) -> None:
        self.active = lr != 1 or momentum != 0
        self._params = state.parameters() if self.active else []
        self._lr, self._momentum, self._nesterov = lr, momentum, nesterov
        self._moved = [torch.empty_like(x) for x in self._params]
        self._velocity = [torch.zeros_like(x) for x in self._params] if momentum else []

    @torch.no_grad()
    def snapshot(self) -> None:
        """Copy x, at the beginning of a round."""
        for before, x in zip(self._moved, self._params, strict=True):
            before.copy_(x)

    @torch.no_grad()
    def step(self) -> None:
        """Turn the average into the outer step from the copied x."""
        lr, momentum = self._lr, self._momentum
        for i, (average, d) in enumerate(zip(self._params, self._moved, strict=True)):
            d.sub_(average)
            # x = average + d, and a part of lr * d is taken back: exact where lr is 1
            # and each operation rounds once: a factor given to add_ may be rounded or not, as the device likes
            if not momentum:
                average.add_(d.mul_(1 - lr))
                continue
            v = self._velocity[i].mul_(momentum).add_(d)
            average.add_(d.mul_(1 - lr) if self._nesterov else d)
            average.sub_(torch.mul(v, lr * momentum if self._nesterov else lr, out=d))

    def state_dict(self) -> dict[str, Any]:
        return {"velocity": self._velocity} if self._velocity else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the velocity, if both this optimizer and the saved one have any."""
        if self._velocity and "velocity" in state:
            for velocity, saved in zip(self._velocity, state["velocity"], strict=True):
                velocity.copy_(saved)
