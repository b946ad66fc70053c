"""Writing a report: pictures as PNG, traces as JSON, one page with everything."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from hvd_hetero.analysis.report.figures import Figures, figures
from hvd_hetero.analysis.report.page import Page
from hvd_hetero.analysis.report.runs import Series, differing, emulation, flat, group, own_metrics, read_run, shown
from hvd_hetero.analysis.report.style import check_matplotlib
from hvd_hetero.config.schema import Config
from hvd_hetero.errors import ConfigError
from hvd_hetero.files import check_writable, write_text
from hvd_hetero.telemetry.emulation import DELAYED, SLOWED
from hvd_hetero.telemetry.tables import or_dash

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
STAMPS = {
    SLOWED: "EMULATED: slow devices are fast ones that sleep",
    DELAYED: "DELAYS INJECTED: ranks sleep in their steps",
}
Table = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chapter:
    """Series that are compared with one another.

    Attributes:
        name: empty where there is only one chapter.
        table: the final one, the first row a heading.
        notes: sentences that explain it.
    """

    name: str
    series: Sequence[Series]
    table: Table
    notes: Sequence[str] = ()


def report(paths: Sequence[str | Path], out: str | Path) -> Path:
    """``hvd-hetero report``: writes the report of run folders; returns the page's path.

    Raises:
        ConfigError: matplotlib is missing, a folder is not that of a run, or ``out`` cannot be written.
    """
    check_matplotlib()
    check_writable("--out", Path(out))
    unique = list(dict.fromkeys(Path(path).resolve() for path in paths))
    runs = [read_run(path) for path in unique]
    try:
        series = group(runs)
        title = series[0].label if len(series) == 1 else f"{len(series)} ways to train, compared"
        return write(Path(out), title, [Chapter("", series, final_table(series))])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        problem = f"was written by another version or changed since: {type(error).__name__}: {error}"
        raise ConfigError("RUN", ", ".join(map(str, unique)), problem, "leave it out, or run it anew") from error


def write(out: Path, title: str, chapters: Sequence[Chapter]) -> Path:
    """Writes page, pictures and traces into a folder; returns the page's path.

    Raises:
        ConfigError: the folder cannot be written.
    """
    page = Page(title)
    for reason in emulation([s for c in chapters for s in c.series]):
        page.stamp(STAMPS[reason])
    try:
        out.mkdir(parents=True, exist_ok=True)
        for chapter in chapters:
            _chapter(out, page, chapter)
        write_text(out / PAGE, page.html())
    except OSError as error:
        raise ConfigError("--out", str(out), f"cannot be written: {error.strerror}", "choose another folder") from error
    return out / PAGE


def _chapter(out: Path, page: Page, chapter: Chapter) -> None:
    from hvd_hetero.analysis.report import pictures

    series, before = chapter.series, f"{slug(chapter.name)}-" if chapter.name else ""
    if chapter.name:
        page.title(chapter.name)
    page.heading("Result")
    page.table(chapter.table)
    for text in chapter.notes:
        page.note(text)
    if not series:
        return
    drawings: list[tuple[str, str, str, Figure | None]] = [
        ("accuracy", "Accuracy", "test accuracy over training time and over samples",
         pictures.curves(series, "eval_accuracy", "test accuracy [%]", 100.0)),
        *((f"metric-{slug(name)}", f"Metric: {name}", f"{name} of the test set over training time and over samples",
           pictures.curves(series, f"eval_{name}", name)) for name in own_metrics(series)),
        ("loss", "Loss", "test loss over training time and over samples",
         pictures.curves(series, "eval_loss", "test loss")),
        ("train-loss", "Training loss", "loss of the samples trained on, over training time and over samples",
         pictures.curves(series, "train_loss", "training loss")),
        ("breakdown", "Where the time went", "time of each class for one step of the fastest, by kind",
         pictures.breakdown(series)),
        ("partial", "What came late", "by rank, shares of rounds with fresh, late and no contributions; their ages",
         pictures.contributions(series)),
    ]
    drawings += [
        (f"timeline-{slug(s.label)}", f"Who waited for whom: {s.label}", f"timeline of some rounds of {s.label}",
         pictures.timeline(s.runs[0], s.label))
        for s in series
    ]
    for name, heading, text, figure in drawings:
        if figure is None:
            continue
        png = pictures.png(figure)
        (out / f"{before}{name}.png").write_bytes(png)
        page.heading(heading)
        page.picture(png, text)
    traced = [s for s in series if s.runs[0].trace is not None]
    for s in traced:
        write_text(out / f"{before}trace-{slug(s.label)}.json", json.dumps(s.runs[0].trace))
    if traced:
        page.note("The trace-*.json files beside this page hold the same rounds, for Perfetto (ui.perfetto.dev).")
    if len(series) > 1:
        page.heading("Settings that differ")
        page.table(_settings(series, differing([s.runs[0] for s in series])))
        return
    page.heading("Settings")
    changed, built_in = _by_default(series[0])
    page.table(_settings(series, changed))
    if built_in:
        page.folded_table(f"{len(built_in)} settings with their built-in values", _settings(series, built_in))


def final_table(series: Sequence[Series]) -> Table:
    """A row a series: what was done, how long it took, what came out."""
    found = [figures(s) for s in series]
    classes = list(dict.fromkeys(name for f in found if f for name in f.blocked))
    head = ["", "seeds", "epochs", "averages per epoch", "samples", "training s", "wall s", "accuracy %", "test loss"]
    rows = [[*head, *(f"blocked, {name}" for name in classes), "emulated"]]
    for s, f in zip(series, found, strict=True):
        if f is None:
            rows.append([s.label, "unfinished", *["-"] * (len(rows[0]) - 2)])
            continue
        shares = [f"{f.blocked[name]:.1%}" if name in f.blocked else "-" for name in classes]
        rows.append([s.label, ", ".join(map(str, f.seeds)), f"{f.epochs:.4g}", f"{f.rounds_per_epoch:.4g}",
                     f"{f.samples:.0f}", f"{f.train_sec:.1f}", f"{f.wall_sec:.1f}", percent(f),
                     or_dash(f.loss, ".4f"), *shares, stamped(f)])
    return rows


def percent(figures: Figures) -> str:
    """Accuracy in percent, with its deviation over seeds where there are several."""
    if figures.accuracy is None:
        return "-"
    spread = "" if figures.accuracy_std is None else f" ± {100 * figures.accuracy_std:.2f}"
    return f"{100 * figures.accuracy:.2f}{spread}"


def stamped(figures: Figures) -> str:
    """Whether times are not those of real devices, and why."""
    return ", ".join(figures.emulation) or "no"


def slug(text: str) -> str:
    """A text as a file name; long ones that differ only at their ends stay apart."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "run"
    return name if len(name) <= 80 else f"{name[:71]}-{sha256(name.encode()).hexdigest()[:8]}"


def _by_default(series: Series) -> tuple[list[str], list[str]]:
    """Split a run's settings, those of the section ``run`` aside, into changed ones and built-in ones."""
    defaults = flat(asdict(Config()))
    settings = {key: value for key, value in series.runs[0].settings.items() if not key.startswith("run.")}
    built_in = [key for key, value in settings.items() if key in defaults and defaults[key] == value]
    return [key for key in settings if key not in built_in], built_in


def _settings(series: Sequence[Series], keys: Sequence[str]) -> Table:
    first = [s.runs[0] for s in series]
    rows = [["key", *(s.label for s in series)]]
    return rows + [[key, *(shown(run.settings.get(key, "-")) for run in first)] for key in keys]
