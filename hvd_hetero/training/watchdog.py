"""A thread on each rank that ends the job when a rank is stuck, and the rank when the job is gone.

Horovod's own stall check is silent under Gloo. So every rank says in the job's key-value store, every few seconds, what
it is doing and for how long it has made no progress. Whoever makes none, and waits for nobody, is stuck and ends the
job itself. Of a rank that says nothing any more, because it is stopped or cut off, the lowest rank that does tells.
Slow is not dead: a slow rank says so as often as a fast one. Every figure is an interval by one's own clock, and time
in which the watching thread itself did not run does not count.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, NoReturn

from hvd_hetero.comm.kv_store import BEAT_TIMEOUT_SEC, JobEnv, get_beat, put_beat
from hvd_hetero.errors import EXIT_LOST, EXIT_STUCK
from hvd_hetero.telemetry.heartbeat import PREPARING, Heartbeat

BEAT_SEC = 5.0
LOST_LATER_SEC = 5.0
"""A rank that is cut off has left when the others give it up."""
BEATS_PER_SEC, SILENT_BEATS = 100.0, 4
"""Of all ranks together: with more than 500 they speak less often, for the store's sake. A rank is not given up before
it has missed so many."""
AWAY_SEC = 10.0
"""What a look may take; if one takes longer, this process was not running."""
PREPARING_SEC = 60.0
"""What a rank may take without a sign of progress before its first step, at least: there is more in one piece."""
STACKS_AT = 0.75
"""Of the time after which a silent rank is given up; a thread that can run has put this off by then."""


@dataclass
class PeerStatus:
    """Another rank as this one sees it: what it said last, and how long it has said nothing new."""

    beat: dict[str, Any] | None = None
    silent_sec: float = 0.0

    def update(self, beat: dict[str, Any] | None, elapsed_sec: float) -> bool:
        """Takes in what it says now; whether it is new."""
        new = beat is not None and (self.beat is None or beat["number"] != self.beat["number"])
        self.silent_sec = 0.0 if new else self.silent_sec + elapsed_sec
        self.beat = beat or self.beat
        return new

    def __str__(self) -> str:
        silence = f"has said nothing for {self.silent_sec:.0f} s"
        return silence if self.beat is None else f"on {self.beat['host']} {silence}, last in {self.beat['phase']}"


class Watchdog:
    """Watches this rank, and the others for it. A process without a launcher is watched by whoever started it.

    Attributes:
        heartbeat: of this rank's main thread.
        last_act: called before the rank is ended, for some seconds at most.
    """

    def __init__(self, env: JobEnv) -> None:
        self.heartbeat = Heartbeat()
        self.last_act: Callable[[], None] = lambda: None
        self._env, self._limit_sec = env, math.inf
        self._armed = False
        self._stopped, self._wake = threading.Event(), threading.Event()
        self._number, self._count = 0, -1
        self._still_sec = self._unreached_sec = 0.0
        self._ticked = time.monotonic()
        self._peers = {rank: PeerStatus() for rank in range(env.size) if rank != env.rank}
        self._thread = threading.Thread(target=self._run, name="hvd_hetero.watchdog", daemon=True)
        if env.store is not None:
            self._thread.start()

    def arm(self, limit_sec: float | None) -> None:
        """From now on ranks are looked at: all of them have reported.

        Args:
            limit_sec: how long a rank may make no progress; None: as long as it likes.
        """
        self._limit_sec = math.inf if limit_sec is None else limit_sec
        self._still_sec, self._armed = 0.0, True
        self._wake.set()  # else it would say nothing for what may be longer than the others wait for it

    def stop(self) -> None:
        """Ends the watching; the thread has ended when this returns, unless the store does not answer it."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_TIMEOUT_SEC)
        faulthandler.cancel_dump_traceback_later()

    @property
    def _rhythm(self) -> tuple[float, float]:
        return rhythm(self._env.size, self._limit_sec, self._env.orphan_sec)

    def _run(self) -> None:
        while not self._stopped.is_set():
            # code that lets no other thread run, this one neither, is ended by the other ranks: say where it is
            every_sec, silent_sec = self._rhythm
            faulthandler.dump_traceback_later(STACKS_AT * silent_sec, file=_stderr())
            self._tick(every_sec + AWAY_SEC)
            self._wake.wait(every_sec)
            self._wake.clear()

    def _tick(self, most_sec: float) -> None:
        now = time.monotonic()
        elapsed, self._ticked = min(now - self._ticked, most_sec), now
        count, waits, phase = self.heartbeat.count, self.heartbeat.waits, self.heartbeat.phase
        self._still_sec = self._still_sec + elapsed if count == self._count else 0.0
        self._count = count
        self._number += 1
        beat = {"number": self._number, "host": self._env.host, "phase": phase, "waits": waits,
                "still_sec": self._still_sec}
        limit_sec = max(self._limit_sec, PREPARING_SEC) if phase == PREPARING else self._limit_sec
        if self._armed and not waits and self._still_sec >= limit_sec and count == self.heartbeat.count:
            still = f"{self._still_sec:.0f} s in {phase}"
            self._end(EXIT_STUCK, f"{self._me} has made no progress for {still}", stacks=True)
        try:
            put_beat(self._env, beat)
            self._unreached_sec = 0.0
            if self._armed:
                self._check_peers(beat, elapsed)
        except (OSError, HTTPException, ValueError, KeyError):  # whatever a stranger may have put there
            self._unreached_sec += elapsed
            if self._unreached_sec >= self._env.orphan_sec and not self._stopped.is_set():
                self._end(EXIT_LOST, f"{self._me} leaves: its launcher has not been reached for "
                                     f"{self._unreached_sec:.0f} s")

    @property
    def _me(self) -> str:
        return f"rank {self._env.rank} on {self._env.host}"

    def _check_peers(self, mine: dict[str, Any], elapsed_sec: float) -> None:
        """Ends the job if a rank is silent for too long, or if all wait for each other.

        That is for the lowest rank that is not silent itself, so that one message tells it, and one rank reads all.
        """
        _, patience_sec = self._rhythm
        for rank, peer in self._peers.items():
            if peer.update(get_beat(self._env, rank), elapsed_sec) and rank < self._env.rank:
                return
        if any(peer.silent_sec < patience_sec for rank, peer in self._peers.items() if rank < self._env.rank):
            return
        silent = {rank: peer for rank, peer in self._peers.items() if peer.silent_sec >= patience_sec}
        if silent and not self._stopped.is_set():
            status = EXIT_STUCK if self._limit_sec <= self._env.orphan_sec + LOST_LATER_SEC else EXIT_LOST
            self._end(status, "; ".join(f"rank {rank} {peer}" for rank, peer in silent.items()))
        beats = {self._env.rank: mine, **{rank: peer.beat for rank, peer in self._peers.items()}}
        if all(beat is not None and beat["waits"] and beat["still_sec"] >= self._limit_sec for beat in beats.values()):
            where = "; ".join(f"rank {rank} in {beat['phase']}" for rank, beat in sorted(beats.items()) if beat)
            self._end(EXIT_STUCK, f"all ranks wait for each other for {self._limit_sec:g} s: {where}", stacks=True)

    def _end(self, status: int, message: str, stacks: bool = False) -> NoReturn:
        """Leaves at once, whatever the other threads are doing."""
        anyway = threading.Timer(AWAY_SEC, os._exit, [status])  # where nobody reads, a full pipe would hold it
        anyway.daemon = True
        anyway.start()
        with suppress(OSError):
            os.write(_stderr(), f"hvd-hetero: error: {message}\n".encode(errors="replace"))
            if stacks:
                faulthandler.dump_traceback(_stderr())
        with suppress(Exception):
            self.last_act()
        os._exit(status)


def rhythm(size: int, limit_sec: float, orphan_sec: float) -> tuple[float, float]:
    """Return the seconds between two heartbeats of a rank, and those of silence after which it is given up.

    Args:
        size: number of ranks.
        limit_sec: how long a rank may make no progress, and ``orphan_sec``, how long it goes on without its launcher.
    """
    least_sec = size / BEATS_PER_SEC
    every_sec = max(least_sec, min(limit_sec / 4, BEAT_SEC))
    return every_sec, max(SILENT_BEATS * least_sec, min(limit_sec, orphan_sec + LOST_LATER_SEC))


def _stderr() -> int:
    return sys.__stderr__.fileno() if sys.__stderr__ else 2
