"""What a run leaves behind: its folder, and a row an epoch."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hvd_hetero.errors import ConfigError
from hvd_hetero.files import check_no_links, write_text
from hvd_hetero.log import LOGGER
from hvd_hetero.telemetry.run_status import LIVE_TRACE, LOOK, SAVE, STATUS
from hvd_hetero.telemetry.trace import TRACE

SUMMARY = "summary.json"
METRICS = "metrics.jsonl"


class RunFolder:
    """The folder of one run; rank 0 writes it.

    Args:
        keep_bytes: of ``metrics.jsonl``, where a run goes on; None: it starts.

    Raises:
        ConfigError: it already holds a run and ``overwrite`` is not set, or it cannot be written.
    """

    def __init__(self, path: str | Path, overwrite: bool, keep_bytes: int | None = None) -> None:
        self.path = Path(path)
        check_run_dir(self.path, overwrite or keep_bytes is not None)
        try:
            self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            old = [self.path / name for name in (SAVE, LOOK, LIVE_TRACE)]
            if keep_bytes is None:
                old += [self.path / name for name in (SUMMARY, METRICS, TRACE, STATUS)]
            for path in old:
                path.unlink(missing_ok=True)
            self._rows = (self.path / METRICS).open("ab", buffering=0)
            self._keep(keep_bytes or 0)
        except OSError as error:
            raise ConfigError("run.dir", str(path), f"cannot be written: {error.strerror}", "choose another") from error
        self._unwritten = b""

    def write(self, name: str, content: Mapping[str, Any] | str) -> None:
        """Writes a text or a JSON file whole: a reader sees the old one or the new one.

        What the disk does not take is told, and costs neither the training nor the files that are still to be written.
        """
        text = content if isinstance(content, str) else to_json(content, indent=2)
        try:
            write_text(self.path / name, text)
        except OSError as error:
            say_missing(self.path / name, error)

    def row(self, row: Mapping[str, Any]) -> None:
        """Appends a row to ``metrics.jsonl``.

        What the disk does not take costs the training nothing: a row is tried again with the next one.
        """
        self._unwritten += to_json(row).encode()
        self._write_rows()

    def _write_rows(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._rows.write(self._unwritten) :]
        except OSError as error:
            LOGGER.warning("%s cannot be written now: %s", METRICS, error.strerror)

    def _keep(self, size: int) -> None:
        """Drops rows of epochs that will be done again."""
        there = os.fstat(self._rows.fileno()).st_size
        if there < size:
            LOGGER.warning("%s: rows are missing that the checkpoint knew of", self.path / METRICS)
        self._rows.truncate(min(size, there))

    @property
    def rows_bytes(self) -> int:
        """Size of ``metrics.jsonl`` so far, which is on the disk when this returns: a checkpoint counts on it."""
        self._write_rows()
        with suppress(OSError):
            os.fsync(self._rows.fileno())
        return os.fstat(self._rows.fileno()).st_size

    def close(self) -> None:
        """Closes its files; nothing happens the second time."""
        if not self._rows.closed:
            self._write_rows()
            self._rows.close()


def say_missing(path: Path, error: Exception) -> None:
    """Tells that a file of the result could not be written; the run continues with the other files."""
    reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
    print(f"hvd-hetero: error: {path} is missing or old: {reason}", file=sys.stderr, flush=True)


def to_json(content: Any, indent: int | None = None) -> str:
    """A text in JSON, ended by a newline. JSON knows no NaN and no Inf: they become null."""
    return json.dumps(_or_null(content), indent=indent, allow_nan=False) + "\n"


def _or_null(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _or_null(value) for key, value in content.items()}
    return [_or_null(value) for value in content] if isinstance(content, (list, tuple)) else content


def check_run_dir(path: str | Path, overwrite: bool) -> None:
    """Refuses a folder that already holds a run, or links that would lead out of it.

    Raises:
        ConfigError: it does, and ``overwrite`` is not set.
    """
    check_no_links("run.dir", Path(path), (METRICS, "tensorboard", "mlflow", "wandb", "checkpoint", "checkpoints"))
    if not overwrite and any((Path(path) / name).exists() for name in (SUMMARY, "config.yaml")):
        raise ConfigError("run.dir", str(path), "already holds a run", "choose another, or set run.overwrite=true")
