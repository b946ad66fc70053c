"""What a run leaves behind: its folder, a row an epoch, and a row for each evaluation by a helper."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvd_hetero.errors import ConfigError
from hvd_hetero.files import check_no_links, write_text
from hvd_hetero.telemetry.row_file import RowFile, to_json
from hvd_hetero.telemetry.run_status import LIVE_TRACE, LOOK, SAVE, STATUS
from hvd_hetero.telemetry.trace import TRACE

SUMMARY = "summary.json"
METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"


class RunFolder:
    """The folder of one run; rank 0 writes it.

    Args:
        keep_bytes: of ``metrics.jsonl`` and ``evaluations.jsonl``, where a run goes on; None: it starts.

    Raises:
        ConfigError: it already holds a run and ``overwrite`` is not set, or it cannot be written.
    """

    def __init__(self, path: str | Path, overwrite: bool, keep_bytes: Sequence[int] | None = None) -> None:
        self.path = Path(path)
        check_run_dir(self.path, overwrite or keep_bytes is not None)
        try:
            self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            old = [self.path / name for name in (SAVE, LOOK, LIVE_TRACE)]
            if keep_bytes is None:
                old += [self.path / name for name in (SUMMARY, METRICS, EVALUATIONS, TRACE, STATUS)]
            for path in old:
                path.unlink(missing_ok=True)
            rows, evaluations = keep_bytes or (0, 0)
            self._rows = RowFile(self.path / METRICS, rows)
            is_there = (self.path / EVALUATIONS).exists()
            self._evaluations = RowFile(self.path / EVALUATIONS, evaluations) if is_there else None
        except OSError as error:
            raise ConfigError("run.dir", str(path), f"cannot be written: {error.strerror}", "choose another") from error

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
        """Appends a row to ``metrics.jsonl``."""
        self._rows.add(row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Appends a row to ``evaluations.jsonl``, which is there once there is one."""
        if self._evaluations is None:
            self._evaluations = RowFile(self.path / EVALUATIONS, 0)
        self._evaluations.add(row)

    @property
    def rows_bytes(self) -> list[int]:
        """Sizes of ``metrics.jsonl`` and ``evaluations.jsonl`` so far, which are on the disk when this returns."""
        return [0 if rows is None else rows.size for rows in (self._rows, self._evaluations)]

    def close(self) -> None:
        """Closes its files; nothing happens the second time."""
        for rows in (self._rows, self._evaluations):
            if rows is not None:
                rows.close()


def say_missing(path: Path, error: Exception) -> None:
    """Tells that a file of the result could not be written; the run continues with the other files."""
    reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
    print(f"hvd-hetero: error: {path} is missing or old: {reason}", file=sys.stderr, flush=True)


def check_run_dir(path: str | Path, overwrite: bool) -> None:
    """Refuses a folder that already holds a run, or links that would lead out of it.

    Raises:
        ConfigError: it does, and ``overwrite`` is not set.
    """
    names = (METRICS, EVALUATIONS, "tensorboard", "mlflow", "wandb", "checkpoint", "checkpoints")
    check_no_links("run.dir", Path(path), names)
    if not overwrite and any((Path(path) / name).exists() for name in (SUMMARY, "config.yaml")):
        raise ConfigError("run.dir", str(path), "already holds a run", "choose another, or set run.overwrite=true")
