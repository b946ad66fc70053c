"""Emulate slower devices, by sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from hvd_hetero.telemetry.stopwatch import Stopwatch

T = TypeVar("T")
SLOWED, DELAYED = "slow devices emulated", "delays injected"
LEAST_SLEEP_SEC = 0.1
"""Of the emulation: caches are cold after each sleep, which would slow short steps down by more than was asked for."""


def thread_cpu_clock(device: str, threads: int) -> Callable[[], float] | None:
    """The clock by which an emulated step's own time is measured.

    Where one thread computes, it is that thread's CPU time: a moment in which the core does something else is not a
    part of the step, and a slower device would not multiply it. Else it is the wall clock (None).
    """
    return time.thread_time if device == "cpu" and threads == 1 else None


def emulation_reasons(slowed: bool = False, delayed: bool = False, before: Iterable[str] = ()) -> tuple[str, ...]:
    """Why times are not those of real devices, each reason once; those from ``before`` too."""
    found = {SLOWED: slowed, DELAYED: delayed, **dict.fromkeys(before, True)}
    return tuple(reason for reason, there in found.items() if there)


class SlowdownEmulator:
    """Hands out batches, books what happens between them, and emulates a slower device if asked to.

    Args:
        slowdown: each step is stretched to this many times its own measured time, by sleeping.
        synchronize: waits until the device has done what it was given.

    Attributes:
        delays: where it is set, seconds to sleep in each step that follows; they count as its compute.
    """

    def __init__(self, watch: Stopwatch, slowdown: float = 1.0, synchronize: Callable[[], None] = lambda: None) -> None:
        self._watch, self._slowdown, self._synchronize = watch, slowdown, synchronize
        self._owed_sec = 0.0
        self._fresh_sec = 0.0
        self.delays: Iterator[float] | None = None

    @property
    def emulates(self) -> bool:
        """Whether steps are stretched."""
        return self._slowdown > 1

    @contextmanager
    def at_full_speed(self) -> Iterator[None]:
        """Stretch nothing meanwhile: what a device does once, and nobody measures, need not take so much longer."""
        slowdown, self._slowdown = self._slowdown, 1.0
        try:
            yield
        finally:
            self._slowdown = slowdown

    def steps(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """Yields the next ``count`` batches; the time until the following one is asked for is the step's compute."""
        self._watch.heartbeat.phase = "reading data"
        for batch in islice(batches, count):
            self._fresh_sec += self._watch.span("data")
            self._watch.heartbeat.phase = "local step"
            if self.delays is not None:
                time.sleep(next(self.delays))
                self._watch.span("compute")  # as it is: a slower device is not slower at being delayed
            yield batch
            if self.emulates:  # else steps may queue up on the device
                self.pause(LEAST_SLEEP_SEC)
            self._watch.span("compute")
            self._watch.heartbeat.phase = "reading data"
        self.pause()

    def pause(self, least_sleep_sec: float = 0.0) -> None:
        """Finishes and books what was begun, stretched: for a step that is about to wait for other ranks.

        Args:
            least_sleep_sec: shorter sleeps are put off.
        """
        self._synchronize()
        spent = self._fresh_sec + self._watch.span("compute")
        self._fresh_sec = 0.0
        if self.emulates:
            self._owed_sec += (self._slowdown - 1) * spent
            self._sleep(least_sleep_sec)
            self._watch.span("compute")

    def _sleep(self, least_sec: float) -> None:
        # What a sleep overshoots is taken off the next one.
        if self._owed_sec > least_sec:
            start = time.perf_counter()
            time.sleep(self._owed_sec)
            self._owed_sec -= time.perf_counter() - start
