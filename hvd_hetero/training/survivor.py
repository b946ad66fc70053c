"""Saving what the surviving ranks hold in memory when one is lost.

Each rank keeps copies of its newest states in its own memory. When another rank is lost, those that are left write
them, each for itself, since they cannot meet any more; the launcher then makes a checkpoint of what it finds. Two
states are kept: of two ranks one may have come a meeting further than the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hvd_hetero.checkpoint import CheckpointError, Store
from hvd_hetero.checkpoint.background_write import copied
from hvd_hetero.config.schema import Config
from hvd_hetero.log import LOGGER
from hvd_hetero.training.fingerprint import made_with

KEPT = 2


class Survivor:
    """The newest states of one rank in its memory.

    Args:
        every_sec: between two copies; None: none is kept.
    """

    def __init__(self, store: Store, rank: int, every_sec: float | None) -> None:
        self._store, self._rank, self._every_sec = store, rank, every_sec
        self._states: list[tuple[int, Any]] = []
        self._kept_at, self._lock, self._is_written = -float("inf"), threading.Lock(), False

    @property
    def is_due(self) -> bool:
        """Whether it is time for a copy; rank 0 asks, since all ranks have to copy the same rounds."""
        return self._every_sec is not None and time.monotonic() - self._kept_at >= self._every_sec

    def keep(self, number: int, state: Callable[[], Any]) -> None:
        """Copy a state after so many rounds; of several meetings at the same one, the first."""
        if self._states and self._states[-1][0] == number:
            return
        self._kept_at = time.monotonic()
        try:
            self._states = [*self._states[1 - KEPT :], (number, copied(state()))]
        except CheckpointError as error:  # the next checkpoint says it as well
            LOGGER.warning("no copy of round %s in memory: %s", number, error)

    def write(self) -> None:
        """Write the states, once; the newest first, since this process may be ended meanwhile."""
        with self._lock:
            states, self._states = ([] if self._is_written else self._states), []
            self._is_written = True
            for number, state in reversed(states):
                try:
                    self._store.write_shard(number, self._rank, state)
                except CheckpointError as error:
                    LOGGER.warning("round %s is not saved: %s", number, error)

    def write_soon(self) -> None:
        """Write them in a thread: a signal may interrupt whatever is going on."""
        if self._every_sec is not None:
            threading.Thread(target=self.write, name="hvd_hetero.survivor", daemon=True).start()


def adopt(run_dir: Path, config: Config, size: int) -> None:
    """Make a checkpoint of what the ranks of a job that is over have left, if it is newer than the newest.

    It is that of the round of which most ranks have left something, the newest of these. Without rank 0, what it alone
    kept has to be in an older checkpoint: then none is removed, and where there is none nothing is made.

    Args:
        size: ranks that train.
    """
    store = Store(run_dir, config.checkpoint.keep)
    with suppress(CheckpointError):
        found = store.unfinished(size)
        number = max(found, key=lambda number: (len(found[number]), number), default=None)
        if number is None or not found[number]:
            return
        lost = sorted(set(range(size)).difference(info.rank for info in found[number]))
        if 0 in lost:
            older = store.candidates()
            if not any(c.checkpoint is not None and 0 in c.checkpoint.meta.ranks for c in older):
                return
            store = Store(run_dir, keep=len(older) + 1)
        epochs = store.part(number, found[number][0])["accounts"]["epochs"]
        store.commit(number, found[number], epochs=epochs, made_with=made_with(config), lost=lost)
        store.rewind(number)
