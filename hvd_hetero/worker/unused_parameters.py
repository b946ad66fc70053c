"""Parameters that have not been used yet, where gradients are summed over ranks: to optimizers they have no gradient.

A sum over ranks is zero of a parameter that no rank has a gradient of. An optimizer takes that for a gradient: weight
decay and momentum change a head that this training does not use. Without one it leaves the parameter alone.
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
        self._left = dict(params)
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
        """Take their gradients away, for a step of the optimizer."""
        taken: list[tuple[nn.Parameter, Tensor]] = []
        for name, param in list(self._left.items()):
            if param.grad is not None and param.grad.any():
                self._use(name)
            elif param.grad is not None:
                taken.append((param, param.grad))
                param.grad = None
        try:
            yield
        finally:
            for param, gradient in taken:
                param.grad = gradient

    def _use(self, name: str, param: Tensor | None = None) -> None:
        if self._left.pop(name, None) is not None:
            self._hooks.pop(name).remove()
