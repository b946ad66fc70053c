"""A file of rows in JSON that grows while a run goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hvd_hetero.log import LOGGER


class RowFile:
    """Appends rows, each as a line.

    What the disk does not take costs the training nothing: a row is tried again with the next one.

    Args:
        keep_bytes: of what is there already; the rest are rows of what will be done again.
    """

    def __init__(self, path: Path, keep_bytes: int) -> None:
        self._path, self._unwritten = path, b""
        self._file = path.open("ab", buffering=0)
        there = os.fstat(self._file.fileno()).st_size
        if there < keep_bytes:
            LOGGER.warning("%s: rows are missing that the checkpoint knew of", path)
        self._file.truncate(min(keep_bytes, there))

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self._unwritten += to_json(row).encode()
        self._write()

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            LOGGER.warning("%s cannot be written now: %s", self._path.name, error.strerror)

    @property
    def size(self) -> int:
        """Bytes so far, which are on the disk when this returns: a checkpoint counts on it."""
        self._write()
        with suppress(OSError):
            os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file; nothing happens the second time."""
        if not self._file.closed:
            self._write()
            self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; one that was cut off is none."""
    rows = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def to_json(content: Any, indent: int | None = None) -> str:
    """A text in JSON, ended by a newline. JSON knows no NaN and no Inf: they become null."""
    return json.dumps(_or_null(content), indent=indent, allow_nan=False) + "\n"


def _or_null(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _or_null(value) for key, value in content.items()}
    return [_or_null(value) for value in content] if isinstance(content, (list, tuple)) else content
