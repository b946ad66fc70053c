"""Parameters that are not used yet or no more, where gradients are summed over ranks: to optimizers they have none.

A sum over ranks is zero of a parameter that no rank has a gradient of. An optimizer takes that for a gradient: weight
decay and momentum change a head that this training does not use, and a layer that was frozen in its course. Without one
it leaves the parameter alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class UnusedParameters:
    """Those whose sum over ranks has always been zero: by what all ranks have, so that all of them step alike.

    Args:
        params: by name, all that are trained.

    Attributes:
        names: of those that are unused so far; to be set when a run is resumed.
    """

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self._params, self.names = dict(params), list(params)

    @contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Take their gradients away, and those of what has been frozen since, for a step of the optimizer."""
        self._look()
        idle = [self._params[name] for name in self.names]
        frozen = [param for param in self._params.values() if not param.requires_grad]
        taken = [(param, param.grad) for param in dict.fromkeys([*idle, *frozen]) if param.grad is not None]
        for param, _ in taken:
            param.grad = None
        try:
            yield
        finally:
            for param, gradient in taken:
                param.grad = gradient

    def _look(self) -> None:
        """Drop those that have a gradient now; a device is waited for once."""
        looked_at = {name: _values(grad) for name in self.names if (grad := self._params[name].grad) is not None}
        if looked_at:
            are_used = torch.stack([values.any() for values in looked_at.values()]).tolist()
            used = {name for name, is_used in zip(looked_at, are_used, strict=True) if is_used}
            self.names = [name for name in self.names if name not in used]


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
