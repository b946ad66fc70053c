"""The memory of a GPU: what of it data may take, how much a run took, and what to do when there is not enough."""

from __future__ import annotations

import gc
import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hvd_hetero.data import Source, TensorSource
from hvd_hetero.errors import ConfigError, RankError
from hvd_hetero.log import LOGGER

DATA_SHARE = 0.5
"""Data take as much of a GPU's free memory at most; what a step needs on top is not known beforehand."""
TRIED = (1, 2)
"""Samples of the batches from whose memory that of larger ones is estimated."""


def on_device(source: Source, device: str, split: str) -> Source:
    """Return a source whose batches lie on a device. Its samples are moved there, unless a GPU has no room for them.

    Args:
        split: its name, for the note that samples stay where they are.
    """
    if device == "cpu" or not isinstance(source, TensorSource):
        return source.to(device)
    free = torch.cuda.mem_get_info(torch.device(device))[0]
    if source.nbytes <= DATA_SHARE * free:
        return source.to(device)
    LOGGER.info("%s data: %s stay on the host, %s has %s free; batches go there one by one",
                split, gigabytes(source.nbytes), device, gigabytes(free))  # fmt: skip
    return source.fed_to(device)


def release() -> None:
    """Give back to the GPU what this process has no use for any more; its context stays."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def used_bytes(device: torch.device) -> int:
    """The most bytes that this rank took at once so far: tensors on its GPU, or all that the process had in memory."""
    return peak_bytes(device) or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_bytes(device: torch.device) -> int:
    """The most bytes that tensors took at once on a GPU; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def explain_out_of_memory(name: str, batch_size: int, fitting: Callable[[], int | None]) -> Iterator[None]:
    """Turn a GPU's running out of memory into an error that says what to change.

    Args:
        name: of the rank's device class.
        batch_size: samples of one of its steps.
        fitting: estimates how many would fit; called when nothing of the failed step is in memory any more.

    Raises:
        RankError: there was not enough memory; the other ranks wait elsewhere.
    """
    try:
        yield
        return
    except torch.OutOfMemoryError as missing:
        message = " ".join(str(missing).split(". ")[:2])
        traceback.clear_frames(missing.__traceback__)  # which hold what the step had made so far
    fit = fitting()
    estimate = "" if fit is None else f", by estimate {fit} samples would fit" if fit else ", not even one sample fits"
    problem = f"class {name} is out of GPU memory ({message}){estimate}"
    alone = f"for this class alone train.batch_size={{{name}: {fit or 1}, ...}}"
    remedy = f"set a smaller one, {alone}, train.micro_batches=auto, or train.autocast=auto"
    error = ConfigError("train.batch_size", batch_size, problem, remedy)
    raise RankError(str(error))


def batch_that_fits(step: Callable[[Tensor], None], device: torch.device, most: int) -> int | None:
    """Estimate how many samples a step may have, fewer than ``most``, by the memory that one and two samples take.

    Args:
        step: goes forward and backward over the samples of these numbers ``[B]``.

    Returns:
        None where there is nothing to be learned from it; 0 where not even one sample fits.
    """
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    needed = []
    for count in TRIED:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step(torch.arange(count))
        except torch.OutOfMemoryError:
            return count - 1
        needed.append(torch.cuda.max_memory_allocated(device) - before)
        torch.cuda.empty_cache()
    return largest_batch(free, needed[0], needed[1], most)


def micro_batches_that_fit(step: Callable[[int], None], most: int) -> int:
    """Return how many micro-batches a step has to have: 1, or as often twice as many as there is not enough memory.

    Args:
        step: takes steps of so many.
        most: micro-batches that there can be.

    Raises:
        torch.OutOfMemoryError: not even these fit.
    """
    count = 1
    while True:
        try:
            step(count)
            return count
        except torch.OutOfMemoryError as missing:
            if count == most:
                raise
            traceback.clear_frames(missing.__traceback__)  # which hold what the step had made so far
        release()
        count = min(2 * count, most)


def largest_batch(free: int, one: int, two: int, most: int) -> int | None:
    """How many samples take no more than ``free`` bytes, where one and two take so many; fewer than ``most``."""
    each = two - one
    if each <= 0:
        return None
    return min(int((free - one) // each) + 1, most - 1)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
