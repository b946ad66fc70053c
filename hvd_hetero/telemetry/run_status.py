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


@dataclass(frozen=True)
class RunStatus:
    """What a run says of itself.

    Attributes:
        content: of ``status.json``, see docs/operations.md.
        silent_sec: since it was written, by this machine's clock.
        lost: rank 0 ran on this machine, and is gone without a word.
    """

    path: Path
    content: Mapping[str, Any]
    silent_sec: float
    lost: bool

    @property
    def phase(self) -> str:
        return FAILED if self.lost else str(self.content["phase"])

    @property
    def over(self) -> bool:
        return self.phase in ENDED


def own_mark() -> dict[str, Any]:
    """Return by what others find out whether this process is still there, and when it said so."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "written": time.time()}


def read_status(path: str | Path) -> RunStatus:
    """Read how a run stands, from its folder alone.

    Raises:
        ConfigError: it is no folder of a run, or of one that does not tell.
    """
    folder = Path(path)
    try:
        content = json.loads((folder / STATUS).read_text())
        silent_sec = max(0.0, time.time() - content["written"])
        lost = content["phase"] not in ENDED and content["host"] == socket.gethostname() and not _lives(content)
    except FileNotFoundError as error:
        if (folder / "config.yaml").is_file():
            problem, remedy = f"has no {STATUS}: another version wrote it", "look at it with hvd-hetero report"
        else:
            problem = "is not the folder of a run" if folder.is_dir() else "does not exist"
            remedy = "give the run.dir of a run that has begun"
        raise ConfigError("RUN", str(path), problem, remedy) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"cannot be read: {type(error).__name__}: {error}"
        raise ConfigError("RUN", str(folder / STATUS), problem, "give the run.dir of a run") from error
    return RunStatus(folder, content, silent_sec, lost)


def _lives(content: Mapping[str, Any]) -> bool:
    """Whether the process that wrote it is there; another one may have its number by now."""
    try:
        return bool(psutil.Process(content["pid"]).create_time() <= content["written"])
    except psutil.NoSuchProcess:
        return False
