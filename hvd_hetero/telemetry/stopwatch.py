"""A stopwatch that leaves no second unaccounted for: every span books the time since the last one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvd_hetero.telemetry.heartbeat import Heartbeat

KINDS = ("compute", "data", "blocked", "comm")
COLLECTIVE = "collective"


class Stopwatch:
    """Books a rank's time as compute, data, waiting and transfer, or one of a sequence of collectives.

    What part of a collective was waiting can only be said once the durations of all ranks are known:
    see :func:`split_waiting`. So collectives are kept one by one, in the order in which all ranks meet in them.

    Args:
        thread_cpu_clock: what a span returns goes by this clock, see :func:`thread_cpu_clock`; what it books, by
        ``clock``. heartbeat: told of every span.

    Attributes:
        seconds: booked by kind; ``blocked`` and ``comm`` only by :meth:`waited`.
        spans: where a list is put here, every span is added to it as (kind, start, end), by this rank's clock.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, thread_cpu_clock: Callable[[], float] | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.heartbeat = heartbeat or Heartbeat()
        self._clock, self._own_clock = clock, thread_cpu_clock
        self._mark = clock()
        self._own_mark = thread_cpu_clock() if thread_cpu_clock is not None else 0.0
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.collectives: list[float] = []
        self._met = 0.0
        self.spans: list[tuple[str, float, float]] | None = None

    def skip(self) -> None:
        """Starts the next span now; the time since the last one is not booked."""
        self._lap("")

    def span(self, kind: str) -> float:
        """Books the time since the last span as one of :data:`KINDS`; returns it in seconds of the own clock."""
        own_mark = self._own_mark
        spent = self._lap(kind)
        self.seconds[kind] += spent
        return spent if self._own_clock is None else self._own_mark - own_mark

    def waited(self, started: float) -> None:
        """Books the time since the last span as waiting for something to start, and then for it to end.

        Args:
            started: when it did, by the clock; ``math.inf``: it did not.
        """
        now = self._clock()
        for kind, until in (("blocked", min(max(started, self._mark), now)), ("comm", now)):
            self.seconds[kind] += until - self._mark
            if self.spans is not None and until > self._mark:
                self.spans.append((kind, self._mark, until))
            self._mark = until
        if self._own_clock is not None:
            self._own_mark = self._own_clock()

    def collective(self) -> float:
        """Books the time since the last span as one collective; ranks that are not in it call :meth:`absent`."""
        spent = self._lap(COLLECTIVE)
        self.collectives.append(spent)
        self._met += spent
        return spent

    def skip_collective(self) -> None:
        """Enters a collective that this rank takes no part in, so that all ranks' lists stay in step.

        No time is booked: what passes until the rank's next collective is that one's, and so it is waiting.
        """
        self.collectives.append(math.nan)

    @property
    def spent(self) -> float:
        """Seconds of all that is booked, collectives included."""
        return sum(self.seconds.values()) + self._met

    def _lap(self, kind: str) -> float:
        now = self._clock()
        start, self._mark = self._mark, now
        self.heartbeat.count += 1
        if self._own_clock is not None:
            self._own_mark = self._own_clock()
        if self.spans is not None and kind:
            self.spans.append((kind, start, now))
        return now - start

    def state_dict(self) -> dict[str, Any]:
        """What is booked and was not taken yet."""
        return {"seconds": self.seconds, "collectives": self.collectives}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seconds, self.collectives = dict(state["seconds"]), list(state["collectives"])
        self._met = sum(spent for spent in self.collectives if spent == spent)

    def drain(self) -> tuple[dict[str, float], list[float]]:
        """Returns the seconds by kind and the list of collectives since the last call, and clears them."""
        taken = dict(self.seconds), self.collectives
        self.seconds, self.collectives, self._met = dict.fromkeys(self.seconds, 0.0), [], 0.0
        return taken


def transfer_sec(durations: Sequence[Sequence[float]]) -> float:
    """Return what one collective takes when nobody is late, as the median over those of an epoch; NaN without any.

    Args:
        durations: as for :func:`split_waiting`.
    """
    columns = [[d for d in column if d == d] for column in zip(*durations, strict=True)]
    return statistics.median(min(column) for column in columns) if columns else math.nan


def split_waiting(durations: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Splits the time in collectives into waiting and transfer.

    The last rank to arrive in a collective waits for nobody, so the shortest duration is the transfer and what a rank
    spent beyond it is waiting.

    Args:
        durations: seconds, ``[ranks][collectives]``; NaN where a rank takes no part.

    Returns:
        Blocked seconds and transfer seconds, each by rank.
    """
    transfers = [min(d for d in column if d == d) for column in zip(*durations, strict=True)]
    comm = [sum(t for d, t in zip(row, transfers, strict=True) if d == d) for row in durations]
    return [sum(d for d in row if d == d) - spent for row, spent in zip(durations, comm, strict=True)], comm
