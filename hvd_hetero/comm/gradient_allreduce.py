"""Summing gradients while the backward pass still runs: Horovod's DistributedOptimizer among some ranks of the job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compressor
from torch import Tensor, nn

from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.comm.async_ops import guarded, wait_until
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.horovod_build import build_info, sums_on_gpus
from hvd_hetero.comm.nonfinite import summable
from hvd_hetero.comm.tensor_slots import real_view


class Summable(Compressor):
    """Lets gradients travel in a type that Horovod sums: complex ones as pairs of real numbers, bfloat16 as float32."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Any]:
        return summable(real_view(tensor)), tensor

    @staticmethod
    def decompress(tensor: Tensor, ctx: Any) -> Tensor:
        return (torch.view_as_complex(tensor) if ctx.is_complex() else tensor).to(ctx)


class OnHost(Compressor):
    """Lets gradients of CUDA ranks travel as CPU tensors.

    Horovod refuses a collective that mixes the two, and without NCCL cannot sum the former.
    """

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Any]:
        travels, ctx = Summable.compress(tensor)
        return travels.cpu(), ctx

    @staticmethod
    def decompress(tensor: Tensor, ctx: Any) -> Tensor:
        return Summable.decompress(tensor, ctx)


def _handed_over(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer under a class that hvd.DistributedOptimizer can make anew, as it does, from parameter groups alone.

    What it makes takes over everything that the optimizer holds: its state and what its ``__init__`` was given.
    """
    kind, held = type(optimizer), vars(optimizer)

    def set_up(self: Any, params: Any) -> None:
        vars(self).update(held)

    def step(self: Any, closure: None = None) -> Any:
        return kind.step(self)

    again = type(kind.__name__, (kind,), {"__init__": set_up, "step": step})
    fresh: torch.optim.Optimizer = again(optimizer.param_groups)
    return fresh


def _send_left_out(optimizer: Any) -> None:
    """Send the gradients that this rank's backward passes have not sent; ``synchronize`` would, but too late.

    A rank may leave out other layers than another one: each would wait for what the other sends after waiting.
    """
    for param in optimizer._requires_update:
        if optimizer._handles.get(param, (None, None))[0] is None:
            optimizer._handles[param] = optimizer._allreduce_grad_async(param)


class GradientSum:
    """Replaces each gradient, on every rank of the group, by its sum over the group.

    Args:
        ranks: the group: all ranks or one class. Alone, a rank keeps its gradients.
    """

    def __init__(self, comm: Comm, ranks: tuple[int, ...], cluster: Cluster) -> None:
        self._comm, self._ranks = comm, ranks
        on_cpus = all(cluster.class_of(rank).device == "cpu" for rank in ranks)
        as_they_are = on_cpus or (sums_on_gpus(cluster, ranks) and build_info()["nccl"])
        self._travel = Summable if as_they_are else OnHost

    def wrap(self, optimizer: torch.optim.Optimizer, model: nn.Module, passes: int = 1) -> torch.optim.Optimizer:
        """The optimizer, made to send each gradient as soon as the last of a step's backward passes has computed it."""
        if len(self._ranks) == 1:
            return optimizer
        self._bytes = sum(summable(real_view(p)).nbytes for p in model.parameters() if p.requires_grad)
        named = [(f"gradient.{name}", p) for name, p in model.named_parameters() if p.requires_grad]
        group = self._comm.group(self._ranks)
        wrapped: torch.optim.Optimizer = hvd.DistributedOptimizer(
            _handed_over(optimizer), named, backward_passes_per_step=passes, compression=self._travel, op=hvd.Sum,
            process_set=group,
        )
        return wrapped

    def sent(self, backward: Callable[[], Any]) -> None:
        """Runs a backward pass, from which gradients leave."""
        guarded(backward)

    @contextmanager
    def finished(self, optimizer: Any) -> Iterator[None]:
        """Waits for the sums; inside, the optimizer may step along them.

        The gradients on their way are polled for before ``synchronize`` is called, which would wait by spinning.
        """
        if len(self._ranks) == 1:
            yield
            return
        self._comm.traffic.sent += self._bytes
        with self._comm.heartbeat.waiting("gradients"):
            guarded(partial(_send_left_out, optimizer))
            for handle, _ in list(optimizer._handles.values()):
                if handle is not None:
                    wait_until(handle)
            guarded(optimizer.synchronize)
        with optimizer.skip_synchronize():
            yield
