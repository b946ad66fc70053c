"""The live page: runs side by side, their curves, and who waits for whom in the newest rounds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from hvd_hetero.analysis.live.status import classes, results, saved
from hvd_hetero.analysis.report import pictures
from hvd_hetero.analysis.report.page import STYLE, document, picture_html, table_html
from hvd_hetero.analysis.report.runs import Run, Series, emulation, own_metrics, read_run
from hvd_hetero.errors import ConfigError
from hvd_hetero.telemetry.progress import span
from hvd_hetero.telemetry.run_folder import METRICS
from hvd_hetero.telemetry.run_status import LIVE_TRACE, LOOK, TRAINING, RunStatus, StatusReader
from hvd_hetero.telemetry.trace import TRACE

POLL_MS = 2000
LOOK_SEC = 10.0
"""So often a run is asked for the timeline of its newest rounds, while somebody looks at the page."""
DRAWING_SHARE, MOST_WAIT_SEC = 10, 30.0
"""Pictures take one part in so many of a core's time at most, since a run may share the machine."""
DPI = 100
CURVES = (("eval_accuracy", "test accuracy [%]", 100.0), ("eval_loss", "test loss", 1.0),
          ("train_loss", "training loss", 1.0))  # fmt: skip
LIVE_STYLE = STYLE + """
body { max-width: 92rem; } div.runs { display: flex; flex-wrap: wrap; gap: 1rem; }
section { border: 1px solid #ccc; padding: .2rem 1rem 1rem; flex: 1 1 28rem; overflow-x: auto; }
section h2 { margin-top: .6rem; overflow-wrap: anywhere; } progress { width: 100%; } section p { margin: .4rem 0; }
div.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(38rem, 100%), 1fr)); gap: 0 1rem; }
div.pictures p.stamp { grid-column: 1 / -1; justify-self: start; } #gone { color: #a00; font-weight: bold; }
"""
SCRIPT = """
let version = 0;
async function refresh() {
  try {
    const answer = await fetch("parts" + location.search + "&since=" + version);
    if (!answer.ok) throw new Error(answer.statusText);
    const news = await answer.json();
    version = news.version;
    for (const [id, html] of Object.entries(news.parts)) document.getElementById(id).innerHTML = html;
    document.getElementById("gone").hidden = true;
  } catch (error) {
    document.getElementById("gone").hidden = false;
  }
  setTimeout(refresh, %d);
}
refresh();
""" % POLL_MS  # noqa: UP031 (the script has braces)


class LivePage:
    """The parts of the page, each with the version in which it last changed; threads may share it.

    Raises:
        ConfigError: a folder is not that of a run.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._readers = [StatusReader(path) for path in dict.fromkeys(map(str, paths))]
        self._paths = [reader.path for reader in self._readers]
        self._lock = threading.Lock()
        self._version = 0
        self._parts: dict[str, tuple[int, str]] = {}
        self._drawn_of: object = None
        self._draw_at = 0.0
        self._looked = dict.fromkeys(self._paths, 0.0)

    def html(self, nonce: str) -> str:
        """Return the page, whose parts a script fetches; ``nonce`` is the mark by which a browser lets it run."""
        names = [path.name or str(path) for path in self._paths]
        body = '<p id="gone" hidden>The server does not answer: this is what it told last.</p>\n'
        body += '<div class="runs" id="runs"></div>\n<div class="pictures" id="pictures"></div>\n'
        script = f'<script nonce="{nonce}">{SCRIPT}</script>'
        return document(" · ".join(names), body + script, LIVE_STYLE)

    def statuses(self) -> list[RunStatus]:
        """Return how all runs stand.

        Raises:
            ConfigError: of one that is gone meanwhile.
        """
        return [read() for read in self._readers]

    def news(self, since: int) -> str:
        """Return as JSON what has changed since a version, and the version that it is now."""
        with self._lock:
            found = self.statuses()
            self._set("runs", "\n".join(map(_card, found)))
            self._ask(found)
            self._draw()
            parts = {name: html for name, (version, html) in self._parts.items() if version > since}
            return json.dumps({"version": self._version, "parts": parts})

    def _set(self, name: str, html: str) -> None:
        if self._parts.get(name, (0, None))[1] != html:
            self._version += 1
            self._parts[name] = (self._version, html)

    def _ask(self, found: Sequence[RunStatus]) -> None:
        """Ask runs in training for their newest rounds; one that may not be asked shows what it recorded itself."""
        for status in found:
            if status.phase == TRAINING and time.monotonic() - self._looked[status.path] >= LOOK_SEC:
                self._looked[status.path] = time.monotonic()
                with suppress(OSError):
                    (status.path / LOOK).touch()

    def _draw(self) -> None:
        names = (METRICS, LIVE_TRACE, TRACE)
        seen = [_stamp(path / name) for path in self._paths for name in names]
        now = time.monotonic()
        if seen == self._drawn_of or now < self._draw_at:
            return
        self._drawn_of, before = seen, time.thread_time()
        self._set("pictures", "\n".join(self._pictures()))
        self._draw_at = now + min(DRAWING_SHARE * (time.thread_time() - before), MOST_WAIT_SEC)

    def _pictures(self) -> Iterator[str]:
        runs = [run for path in self._paths if (run := _read(path)) is not None]
        series = [Series(run.path.name, (run,)) for run in runs]
        for reason in emulation(series):
            yield f'<p class="stamp">{escape(reason.upper())}</p>'
        of_metrics = [(f"eval_{name}", name, 1.0) for name in own_metrics(series)]
        for key, name, scale in (*CURVES, *of_metrics) if series else ():
            yield _drawn(partial(pictures.curves, series, key, name, scale), f"{name} over time and over samples")
        for run in runs:
            title = f"{run.path.name}: the newest rounds that were recorded"
            yield _drawn(partial(pictures.timeline, run, title), title)


def _drawn(draw: Callable[[], Figure | None], text: str) -> str:
    try:
        figure = draw()
        return "" if figure is None else picture_html(pictures.png(figure, DPI), text)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:  # of another version, or cut off
        return f'<p class="note">{escape(text)}: cannot be drawn: {type(error).__name__}: {escape(str(error))}</p>'


def _read(path: Path) -> Run | None:
    """Return a run with its newest trace; None as long as it has not finished an epoch."""
    with suppress(ConfigError):
        run = read_run(path)
        with suppress(OSError, ValueError):
            run = replace(run, trace=json.loads((path / LIVE_TRACE).read_text()))
        return run
    return None


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes with a file: its size where it grows, its inode where another one is put in its place."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size


def _card(status: RunStatus) -> str:
    content = status.content
    parts = [f"<h2>{escape(str(status.path))}</h2>",
             f"<p><b>{escape(status.phase)}</b> on {escape(content['host'])}</p>"]  # fmt: skip
    if status.lost or status.silent:
        parts.append(f'<p class="stamp">has said nothing for {span(status.silent_sec)}</p>')
    if "round" in content:
        total = "" if content["epochs"] is None else f" of {content['epochs']}"
        left = "" if status.over or content["left_sec"] is None else f", {span(content['left_sec'])} left"
        parts.append(f'<progress value="{content["share_done"]:.4f}"></progress>')
        lines = [f"epoch {content['epoch']}{total}, round {content['round']}{left}"]
        if "train_loss" in content:  # names of metrics may be anything
            lines.append(", ".join(f"{name} {value}" for name, value in results(content).items()))
        if content["checkpoint"] is not None:
            lines.append(saved(status))
        parts += [f"<p>{escape(line)}</p>" for line in lines]
        parts.append(table_html(classes(content)))
    return f"<section>{''.join(parts)}</section>"
