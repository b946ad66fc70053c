"""The rounds of a partial collective: what comes of one, what a rank had part in, and waiting for one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import horovod.torch as hvd
from torch import Tensor

from hvd_hetero.comm.async_ops import POLL_SEC, guarded

PATIENT_POLL_SEC = 1e-3
"""Between looks at a round that takes long: polling as often as at first would cost the ranks that compute."""


@dataclass
class Round:
    """What came of one round.

    Attributes:
        number: counted from 0 over the whole run.
        total: ``[P]`` sum over ranks, on the host; valid until :meth:`PartialAllreduce.done`.
        weight: sum over ranks of the weights of what they sent.
        own: ``[P]`` what this rank had contributed, unweighted, if it is kept; else None.
        contributions: how many of this rank's were in it.
        started: when this rank learned that the round started, by ``time.perf_counter``.
        final: whether it is the last one of the epoch.
        fresh: whether the last of this rank's was made for it.
    """

    number: int
    total: Tensor
    weight: float
    own: Tensor | None
    contributions: int
    started: float
    final: bool
    fresh: bool = False
    buffers: list[Tensor] = field(repr=False, default_factory=list)


def done_unless(is_cancelled: Callable[[], bool], handle: int) -> bool:
    """Waits for a collective, and takes its result; False if it was given up meanwhile."""
    begin = time.perf_counter()
    while not guarded(lambda: hvd.poll(handle)):
        if is_cancelled():
            return False
        time.sleep(POLL_SEC if time.perf_counter() - begin < 0.01 else PATIENT_POLL_SEC)
    guarded(lambda: hvd.synchronize(handle))
    return True
