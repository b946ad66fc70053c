"""Parameters that are not used yet or no more, where gradients are summed over ranks: to optimizers they have none.

A sum over ranks is zero of a parameter that no rank has a gradient of. An optimizer takes that for a gradient: weight
decay and momentum change a head that this training does not use, and a layer that was frozen in its course. Without one
it leaves the parameter alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn


class UnusedParameters:
    """Those that no backward pass of this rank has come to, and whose sum over ranks has always been zero.

    Args:
        params: by name, all that are trained.
    """

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self._params, self._left = list(params.values()), dict(params)
        self._hooks = {
            name: param.register_post_accumulate_grad_hook(partial(self._use, name)) for name, param in params.items()
        }

    @property
    def names(self) -> list[str]:
        """Their names; to be set when a run goes on."""
        return list(self._left)

    @names.setter
    def names(self, names: Iterable[str]) -> None:
        for name in set(self._left) - set(names):
            self._use(name)

    @contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Take their gradients away, and those of what has been frozen since, for a step of the optimizer."""
        for name, param in list(self._left.items()):
            if param.grad is not None and param.grad.any():
                self._use(name)
        idle = [*self._left.values(), *(param for param in self._params if not param.requires_grad)]
        taken = [(param, param.grad) for param in dict.fromkeys(idle) if param.grad is not None]
        for param, _ in taken:
            param.grad = None
        try:
            yield
        finally:
            for param, gradient in taken:
                param.grad = gradient

    def _use(self, name: str, param: Tensor | None = None) -> None:
        if self._left.pop(name, None) is not None:
            self._hooks.pop(name).remove()
