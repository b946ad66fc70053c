"""Gradients on their way from a device to the host, copied while the backward pass still goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from hvd_hetero.comm.flat_params import concat
from hvd_hetero.comm.tensor_slots import real_view


class HostGradients:
    """A copy of flat gradients in host memory, which follows each backward pass parameter by parameter.

    Args:
        params: whose gradients are views of the vectors.
        gradients: ``[P]`` each, see :meth:`hvd_hetero.comm.flat_params.FlatState.flat_gradients`.
    """

    def __init__(self, params: Iterable[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        on_gpu = gradients[0].device.type == "cuda"
        self._stream = torch.cuda.Stream(gradients[0].device) if on_gpu else None
        self._host = [torch.zeros(g.shape, dtype=g.dtype, pin_memory=on_gpu) for g in gradients]
        places = {g.untyped_storage().data_ptr(): host for g, host in zip(gradients, self._host, strict=True)}
        self._parts: dict[nn.Parameter, Tensor] = {}
        for param in params:
            if param.grad is None:
                continue
            host = places[param.grad.untyped_storage().data_ptr()]
            grad = real_view(param.grad)
            part = host.as_strided(grad.shape, grad.stride(), grad.storage_offset())
            self._parts[param] = part
            param.register_post_accumulate_grad_hook(partial(self._copy, part))
        self._left = set(self._parts)

    def _copy(self, part: Tensor, param: nn.Parameter) -> None:
        assert param.grad is not None
        self._left.discard(param)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(param.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            part.copy_(real_view(param.grad), non_blocking=True)

    @torch.no_grad()
    def synchronize(self) -> Tensor:
        """The gradients of the backward pass that has ended, ``[P]``; valid until the next one begins."""
        for param in list(self._left):  # it had no part in the loss, and its gradient is zero
            self._copy(self._parts[param], param)
        self._left = set(self._parts)
        if self._stream is not None:
            self._stream.synchronize()
        return concat(self._host)
