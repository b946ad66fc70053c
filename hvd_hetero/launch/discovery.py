"""Looking for further hosts while a job runs, and asking the job to save and to stop when there are any."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from hvd_hetero.cluster.hosts import Host, listed
from hvd_hetero.errors import UserError


class Lookout:
    """Looks again and again, while its block runs, until it has found hosts and asked the job to stop.

    Args:
        newcomers: returns the hosts that a job started now would have beside those of the running one.
        every_sec: None: it never looks.
        stop: the file that asks the job to save and to stop, in a folder that the job makes.

    Attributes:
        found: the hosts that have come.
        has_asked: whether the job was asked to stop for them.
    """

    def __init__(self, newcomers: Callable[[], list[Host]], every_sec: float | None, stop: Path) -> None:
        self._newcomers, self._every_sec, self._stop = newcomers, every_sec, stop
        self.found: list[Host] = []
        self.has_asked = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hvd_hetero.discovery", daemon=True)

    def __enter__(self) -> Lookout:
        if self._every_sec is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        if self._every_sec is not None:
            self._thread.join()

    def withdraw(self) -> None:
        """Remove the request, where the job has ended otherwise."""
        if self.has_asked:
            self._stop.unlink(missing_ok=True)

    def _run(self) -> None:
        last_problem = ""
        while not self.has_asked and not self._ended.wait(self._every_sec):
            try:
                self.found = self._newcomers()
            except UserError as error:
                if str(error) != last_problem:
                    last_problem = str(error)
                    _say(f"cannot add hosts: {last_problem}")
                continue
            if self.found and not self._ended.is_set():
                with suppress(OSError):  # the folder is not there yet, or the user has asked already
                    self._stop.touch(exist_ok=False)
                    self.has_asked = True
                    _say(f"saves, and restarts with new hosts: {listed(self.found)}")


def _say(text: str) -> None:
    print(f"hvd-hetero: {text}", file=sys.stderr, flush=True)
