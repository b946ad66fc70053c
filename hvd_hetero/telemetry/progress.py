"""Show how far a run is: a bar, or a line an epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO


class Progress:
    """Shows rank 0's progress: a bar where the launcher says that there is a terminal, else a line now and then.

    Args:
        columns: width of the terminal, or None.
        done: epochs that a run which goes on had done before.
    """

    LINE_SEC = 5.0

    def __init__(
        self, epochs: int | None, columns: int | None, done: int = 0, stream: TextIO = sys.stderr
    ) -> None:
        self._epochs, self._stream = epochs, stream  # epochs: None where only the clock ends the run
        self._last_line = 0.0
        self._bar = None
        if columns:
            from tqdm import tqdm

            # The figures are what one looks at; the bar takes what is left of a narrow terminal.
            form = "epoch {n_fmt}/{total_fmt} |{bar:8}| {desc}{postfix}"
            self._bar = tqdm(
                total=epochs, initial=done, bar_format=form, ncols=columns, file=stream, leave=True, mininterval=0
            )

    def update(self, row: Mapping[str, Any], fastest: str) -> None:
        """Shows a metrics row; the last one is always shown."""
        done = row["epoch"]
        figures = {
            "round": str(row["round"]),
            "train loss": _short(row["train_loss"]),
            **{"acc" if name == "eval_accuracy" else name.removeprefix("eval_"):
               _percent(value) if name == "eval_accuracy" else _short(value)
               for name, value in row.items() if name.startswith("eval_") and name != "eval_loss"},
            "samples/s": _short(row["samples_per_sec"]),
            f"{fastest} blocked": _percent(row["blocked_fraction"][fastest]),
            "GB": " ".join(f"{name} {size / 1e9:.3g}" for name, size in row["memory_bytes"].items()),
        }
        left = "" if row["left_sec"] is None else f"{span(row['left_sec'])} left"
        if self._bar is not None:
            self._bar.set_description_str(left, refresh=False)
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(1)
        elif done == self._epochs or time.monotonic() - self._last_line >= self.LINE_SEC:
            self._last_line = time.monotonic()
            text = "  ".join(filter(None, [left, *(f"{name} {value}" for name, value in figures.items())]))
            total = "" if self._epochs is None else f"/{self._epochs}"
            print(f"epoch {done}{total}  {text}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def span(seconds: float) -> str:
    """Return a time as a person says it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"
