"""The pictures: learning curves, where the time went, who waited for whom. Imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from hvd_hetero.report.figures import fast_steps
from hvd_hetero.report.runs import Run, Series
from hvd_hetero.report.style import KINDS, SETTINGS, bar, line
from hvd_hetero.trace import Lap, from_chrome

SPAN_FOR_LOG = 4.0
"""A time axis is logarithmic where the slowest series takes this many times as long as the quickest."""

OWN_WORK = ("compute", "data")


def curves(series: Sequence[Series], key: str, name: str, scale: float = 1.0) -> Figure | None:
    """A figure of the metrics rows over training time and over samples; a band spans the seeds.

    Args:
        key: of ``metrics.jsonl``.
        name: of the vertical axis, with its unit.
        scale: the values are multiplied by it.

    Returns:
        None where no run has this figure.
    """
    with rc_context(SETTINGS):
        figure = Figure(figsize=(9.5, 3.6 + 0.22 * math.ceil(len(series) / 2)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        drawn = [_curve(left, s, "train_sec", key, scale, i) for i, s in enumerate(series)]
        if not any(drawn):
            return None
        _stamp(figure, series)
        for i, s in enumerate(series):
            _curve(right, s, "samples_seen", key, scale, i)
        ends = [run.rows[-1]["train_sec"] for s in series for run in s.runs]
        log = max(ends) > SPAN_FOR_LOG * min(ends)
        if log:
            left.set_xscale("log")
            left.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            left.xaxis.set_minor_formatter(NullFormatter())
        left.set_xlabel(f"training time [s{', log scale' if log else ''}]")
        left.set_ylabel(name)
        right.set_xlabel("samples seen, all ranks [thousand]")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, handlelength=4)
    return figure


def _stamp(figure: Figure, series: Sequence[Series]) -> None:
    if any(summary["emulated"] for s in series for summary in s.finished):
        figure.suptitle("EMULATED slow devices", x=0.995, ha="right", fontsize=8)


def _curve(axes: Axes, series: Series, x_key: str, key: str, scale: float, index: int) -> bool:
    points = [_points(run, x_key, key) for run in series.runs]
    points = [(x, y) for x, y in points if len(x)]
    if not points:
        return False
    start, end = max(x[0] for x, _ in points), min(x[-1] for x, _ in points)
    every = np.unique(np.concatenate([x for x, _ in points]))
    grid = every[(every >= start) & (every <= end)]
    if len(points) == 1 or not len(grid):
        grid = points[0][0]
        points = points[:1]
    values = scale * np.stack([np.interp(grid, x, y) for x, y in points])
    x_axis = grid / 1000 if x_key == "samples_seen" else grid
    style = line(index)
    several = f" ({len(points)} seeds: mean, lowest to highest)" if len(points) > 1 else ""
    axes.plot(x_axis, values.mean(0), label=series.label + several, markevery=max(1, len(grid) // 8), **style)
    if len(points) > 1:
        axes.fill_between(x_axis, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)
    return True


def _points(run: Run, x_key: str, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    pairs = [(row[x_key], row[key]) for row in run.rows if row.get(key) is not None]
    x, y = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(x, dtype=float), np.array(y, dtype=float)


def breakdown(series: Sequence[Series]) -> Figure | None:
    """Stacked bars (paper, figure 1): where the time of one step of the fastest class went, for every class."""
    names, parts = [], []
    for s in series:
        totals: dict[str, list[dict[str, float]]] = {}
        for summary in s.finished:
            steps = fast_steps(summary["classes"])
            for c in summary["classes"]:
                share = {kind: 1e3 * seconds / steps for kind, seconds in c["time_sec"].items()}
                totals.setdefault(c["name"], []).append(share)
        for name, rows in totals.items():
            names.append(f"{s.label} · {name}")
            parts.append({kind: float(np.mean([row[kind] for row in rows])) for kind in KINDS})
    if not names:
        return None
    with rc_context({**SETTINGS, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(9.5, 1.4 + 0.34 * len(names)), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(names))
        left = np.zeros(len(names))
        for kind in KINDS:
            widths = np.array([part[kind] for part in parts])
            axes.barh(places, widths, left=left, height=0.72, label=kind, linewidth=0.6, **bar(kind))
            left += widths
        for place, total, part in zip(places, left, parts, strict=True):
            axes.annotate(f"{part['blocked'] / total:.0%} blocked" if total else "no time", (total, place), (4, 0),
                          textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.margins(x=0.15, y=0.02)
        axes.set_xlabel("time of a rank for each step of the fastest class [ms]")
        _stamp(figure, series)
        figure.legend(loc="outside lower center", ncols=len(KINDS))
    return figure


def timeline(run: Run, title: str) -> Figure | None:
    """A lane a rank over the recorded rounds (paper, figure 2); None where nothing was recorded."""
    if run.trace is None:
        return None
    ranks, lanes = from_chrome(run.trace)
    if not any(ranks):
        return None
    start, end = _window(ranks)
    with rc_context({**SETTINGS, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(9.5, 1.5 + 0.42 * len(ranks)), layout="constrained")
        axes = figure.subplots()
        for lane, laps in enumerate(ranks):
            for kind in KINDS:
                spans = [(1e3 * (a - start), 1e3 * (b - a)) for k, a, b in laps if k == kind and b > start]
                edge = {"edgecolor": "white"} if kind in OWN_WORK else {}  # so that steps can be told apart
                axes.broken_barh(spans, (lane - 0.38, 0.76), linewidth=0.3, **{**bar(kind), **edge})
        axes.set_yticks(range(len(lanes)), lanes)
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.set_xlim(0, 1e3 * (end - start))
        axes.set_xlabel("time [ms]")
        axes.set_title(title, loc="left", fontsize=10)
        figure.legend(handles=[Patch(label=kind, **bar(kind)) for kind in KINDS],
                      loc="outside lower center", ncols=len(KINDS))
    return figure


def _window(ranks: Sequence[Sequence[Lap]]) -> tuple[float, float]:
    """From the first local step to the end of the last recorded lap: dealing the samples comes before."""
    start = min(a for laps in ranks for kind, a, _ in laps if kind in OWN_WORK)
    return start, max(b for laps in ranks for _, _, b in laps)
