"""Calling the hooks of callbacks and trackers: whose, on which rank, and what becomes of their mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from hvd_hetero.config.instantiate import call, cause, choose, import_target
from hvd_hetero.config.schema import RunConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.log import LOGGER
from hvd_hetero.telemetry.callbacks import TRACKERS, Callback

KEY, TRACKERS_KEY = "run.callbacks", "run.trackers"


class Callbacks:
    """All callbacks of a run.

    A mistake in a callback of the user's ends the job; one in a tracker ends only the tracking, with a warning.

    Args:
        callbacks: objects that a program has given beside ``run.callbacks``.

    Raises:
        ConfigError: one is not known, cannot be made, or its package is not installed.
    """

    def __init__(self, spec: RunConfig, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = [(type(item).__qualname__, item) for item in callbacks]
        for path in spec.callbacks:
            self._callbacks.append((path, call(KEY, import_target(KEY, path), {})))
        for name, item in self._callbacks:
            if not isinstance(item, Callback):
                problem, remedy = f"makes a {type(item).__name__}", "derive it from hvd_hetero.Callback"
                raise ConfigError(KEY, name, problem, remedy)
        self._trackers: list[tuple[str, Callback]] = []
        for name in spec.trackers:
            tracker = choose(TRACKERS_KEY, name, TRACKERS)
            if find_spec(tracker.needs) is None:
                problem = f"needs the package {tracker.needs}, which is not installed"
                raise ConfigError(TRACKERS_KEY, name, problem, f"pip install 'hvd-hetero[{name}]'")
            self._trackers.append((name, tracker()))

    def call(self, rank: int, hook: str, *args: Any) -> None:
        """Call a hook of all of them; every rank does.

        Raises:
            ConfigError: a callback of the user's fails here.
        """
        for name, item in self._callbacks:
            if rank == 0 or item.on_all_ranks:
                try:
                    getattr(item, hook)(*args)
                except Exception as error:
                    problem = f"{hook} fails on rank {rank}: {cause(error)}"
                    raise ConfigError(KEY, name, problem, "correct it") from error
        for name, item in list(self._trackers) if rank == 0 else ():
            try:
                getattr(item, hook)(*args)
            except Exception as error:  # of a library or of the disk: no reason to end a training
                self._trackers.remove((name, item))
                LOGGER.warning("%s=%s: it is off from here on: %s", TRACKERS_KEY, name, cause(error))
