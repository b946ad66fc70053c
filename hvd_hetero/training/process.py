"""What a job changes in the whole process that it runs in, and puts back for the program that called it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

TASKS = Path("/proc/self/task")


@contextmanager
def process_restored() -> Iterator[None]:
    """Put back after a block: cores, threads, umask, warning filters, PyTorch's precision and its current GPU."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    umask = os.umask(0o077)
    os.umask(umask)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.umask(umask)
        _unbind(cores)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32
        if gpu is not None:
            torch.cuda.set_device(gpu)


def _unbind(cores: Collection[int]) -> None:
    """Give the cores back to this thread, and to those that were begun by it and have the same ones as it has now."""
    bound = os.sched_getaffinity(0)
    if bound == cores:
        return
    for task in TASKS.iterdir():
        with suppress(OSError):  # it has ended meanwhile
            if os.sched_getaffinity(int(task.name)) == bound:
                os.sched_setaffinity(int(task.name), cores)
