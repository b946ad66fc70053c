"""How a run stands: a small file in its folder that rank 0 keeps; and files by which others ask something of it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hvd_hetero.errors import ConfigError

STATUS = "status.json"
SAVE = "save"
"""A file of this name in a run's folder asks the run for a checkpoint."""
LOOK = "look"
"""Asks it to record a few rounds once, into :data:`LIVE_TRACE`."""
LIVE_TRACE = "trace_now.json"
PREPARING, TRAINING, EVALUATING = "preparing", "training", "evaluating"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
ENDED = (FINISHED, STOPPED, FAILED)
SILENT_SEC = 120.0
"""After so long without a word a run may have died: segments take seconds, half a minute in partial collectives."""


BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Another one after each start of a machine, the same in all its containers: they share one monotonic clock."""


@dataclass(frozen=True)
class RunStatus:
    """What a run says of itself.

    Attributes:
        content: of ``status.json``, see docs/operations.md.
        silent_sec: for so long at least it has said nothing new. No clock of another machine is asked, so of a run
            there this is the time in which somebody here has looked.
        here: rank 0 is, or was, on this machine.
        lost: it was, and is gone without a word.
    """

    path: Path
    content: Mapping[str, Any]
    silent_sec: float
    here: bool
    lost: bool

    @property
    def phase(self) -> str:
        return FAILED if self.lost else str(self.content["phase"])

    @property
    def over(self) -> bool:
        return self.phase in ENDED

    @property
    def silent(self) -> bool:
        """Whether it has been silent for so long that it may have died."""
        return not self.over and self.silent_sec > SILENT_SEC


def own_mark() -> dict[str, Any]:
    """Return by what others find out whether this process is still there, and when it said so."""
    return {"host": socket.gethostname(), "boot": BOOT.read_text().strip(), "pid": os.getpid(),
            "monotonic_sec": time.monotonic(), "written": time.strftime("%Y-%m-%d %H:%M:%S %z")}  # fmt: skip


class StatusReader:
    """Reads again and again how a run stands, from its folder alone.

    Raises:
        ConfigError: it is no folder of a run, or of one that does not tell.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._last: Any = None
        self._heard = 0.0
        self()

    def __call__(self) -> RunStatus:
        """Read it now.

        Raises:
            ConfigError: as above.
        """
        try:
            content = json.loads((self.path / STATUS).read_text())
            here = content["host"] == socket.gethostname()
            same_clock = content["boot"] == BOOT.read_text().strip()
            lost = content["phase"] not in ENDED and here and not (same_clock and psutil.pid_exists(content["pid"]))
            now = time.monotonic()
            if content != self._last:
                self._last, self._heard = content, content["monotonic_sec"] if same_clock else now
            return RunStatus(self.path, content, max(0.0, now - self._heard), here, lost)
        except FileNotFoundError as error:
            if (self.path / "config.yaml").is_file():
                problem, remedy = f"has no {STATUS}: another version wrote it", "look at it with hvd-hetero report"
            else:
                problem = "is not the folder of a run" if self.path.is_dir() else "does not exist"
                remedy = "give the run.dir of a run that has begun"
            raise ConfigError("RUN", str(self.path), problem, remedy) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"cannot be read: {type(error).__name__}: {error}"
            raise ConfigError("RUN", str(self.path / STATUS), problem, "give the run.dir of a run") from error
