"""Note what a rank is doing: its main thread writes, the watchdog reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PREPARING = "preparing"


class Heartbeat:
    """A rank's progress. Plain attributes and no lock: a step must not cost more for being watched.

    Attributes:
        count: goes up whenever something is done: a step, a batch of evaluation, a collective, any span of a stopwatch.
        phase: what is being done.
        waits: whether it is waiting for other ranks.
    """

    def __init__(self) -> None:
        self.count, self.phase, self.waits = 0, PREPARING, False

    def begin(self, phase: str) -> None:
        """Something is done, and something else begins."""
        self.phase = phase
        self.count += 1

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Around a collective, in which other ranks may be waited for."""
        before, self.phase, self.waits = self.phase, f"collective {name}", True
        self.count += 1
        try:
            yield
        finally:
            self.phase, self.waits = before, False
            self.count += 1
