"""Hearing that the job is to stop, so that it can save first."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

STOP = "stop"
"""A file of this name in a run's folder asks the run to save and to end."""
LOOK_SEC = 0.25
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this rank was asked to stop, by SIGTERM, SIGINT, SIGUSR1, or the file ``stop`` in the run's folder.

    The first signal is noted while the ``with`` block runs; the second one does what it did before.

    Args:
        run_dir: None: there is none, nothing would be saved, and nobody is heard.

    Attributes:
        on_signal: called at the first signal, which horovodrun sends as well when another rank is lost.
        was_ended: whether this process has heard SIGTERM.
    """

    was_ended = False

    def __init__(self, run_dir: Path | None) -> None:
        self._file = None if run_dir is None else run_dir / STOP
        self._asked = False
        self._looked = 0.0
        self._before: dict[int, Any] = {}
        self.on_signal: Callable[[], None] = lambda: None

    def __call__(self) -> bool:
        """Whether to stop; cheap enough to be asked at every step."""
        if not self._asked and self._file is not None and time.monotonic() - self._looked >= LOOK_SEC:
            self._looked = time.monotonic()
            self._asked = os.path.exists(self._file)  # unlike Path's, never raises
        return self._asked

    def forget(self) -> None:
        """Removes the file, which has been heard; rank 0 calls it, once all ranks have agreed to stop."""
        with suppress(OSError):
            if self._file is not None:
                self._file.unlink()

    def __enter__(self) -> StopRequest:
        is_main = threading.current_thread() is threading.main_thread()  # Python allows it nowhere else
        if is_main and self._file is not None:
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            self._restore()
            os.kill(os.getpid(), number)
        self._asked = True
        StopRequest.was_ended = StopRequest.was_ended or number == signal.SIGTERM
        self.on_signal()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
