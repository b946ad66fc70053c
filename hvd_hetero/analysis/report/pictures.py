"""The pictures: learning curves, where the time went, what came late, who waited for whom. Imports matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from hvd_hetero.analysis.report.figures import CONTRIBUTED, fast_steps, partial_shares
from hvd_hetero.analysis.report.runs import Run, Series, emulation
from hvd_hetero.analysis.report.style import KINDS, SETTINGS, bar, fit, line
from hvd_hetero.telemetry.trace import Span, from_chrome

SPAN_FOR_LOG = 4.0
"""A time axis is logarithmic where the slowest series takes this many times as long as the quickest."""

OWN_WORK = ("compute", "data")
DPI = 150


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """Return a figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


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
    if reasons := emulation(series):
        figure.suptitle(", ".join(reasons).upper(), x=0.995, ha="right", fontsize=8)


def _curve(axes: Axes, series: Series, x_key: str, key: str, scale: float, index: int) -> bool:
    points = [_points(run, x_key, key) for run in series.runs]
    points = [(x, y) for x, y in points if len(x)]
    if not points:
        return False
    start, end = max(x[0] for x, _ in points), min(x[-1] for x, _ in points)
    every = np.unique(np.concatenate([x for x, _ in points]))
    grid = every[(every >= start) & (every <= end)]
    if len(grid):
        values = scale * np.stack([np.interp(grid, x, y) for x, y in points])
    else:  # at no time there is a figure of all seeds: the first ones together, the second ones together, ...
        count = min(len(x) for x, _ in points)
        grid = np.mean([x[:count] for x, _ in points], axis=0)
        values = scale * np.stack([y[:count] for _, y in points])
    x_axis = grid / 1000 if x_key == "samples_seen" else grid
    style = line(index)
    several = f" ({len(points)} seeds: mean, lowest to highest)" if len(points) > 1 else ""
    axes.plot(x_axis, values.mean(0), label=fit(series.label, 58) + several, markevery=max(1, len(grid) // 8), **style)
    if len(points) > 1:
        axes.fill_between(x_axis, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)
    return True


def _points(run: Run, x_key: str, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    pairs = [(row[x_key], row[key]) for row in run.points if row.get(key) is not None]
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
            names.append(f"{fit(s.label, 40)} · {name}")
            parts.append({kind: float(np.mean([row[kind] for row in rows])) for kind in KINDS})
    if not names:
        return None
    with rc_context({**SETTINGS, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(9.5, 1.4 + 0.34 * len(names)), layout="constrained")
        axes = figure.subplots()
        lengths = _stack(axes, names, parts, KINDS)
        for place, (total, part) in enumerate(zip(lengths, parts, strict=True)):
            _beside(axes, place, total, f"{part['blocked'] / total:.0%} blocked" if total else "no time")
        axes.margins(x=0.15, y=0.02)
        axes.set_xlabel("time of a rank for each step of the fastest class [ms]")
        _stamp(figure, series)
        figure.legend(loc="outside lower center", ncols=len(KINDS))
    return figure


def _stack(
    axes: Axes, names: Sequence[str], parts: Sequence[Mapping[str, float]], kinds: Iterable[str]
) -> NDArray[Any]:
    """Stacked bars, the first one on top; returns their lengths."""
    left = np.zeros(len(names))
    for kind in kinds:
        widths = np.array([part[kind] for part in parts])
        axes.barh(np.arange(len(names)), widths, left=left, height=0.72, label=kind, linewidth=0.6, **bar(kind))
        left += widths
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    return left


def _beside(axes: Axes, place: int, length: float, text: str) -> None:
    axes.annotate(text, (length, place), (4, 0), textcoords="offset points", va="center", fontsize=8)


def contributions(series: Sequence[Series]) -> Figure | None:
    """What ranks sent in the rounds of partial collectives, and how old it was; None where there were none."""
    found = [(i, s, shares) for i, s in enumerate(series) if (shares := partial_shares(s)) is not None]
    if not found:
        return None
    names = [f"{fit(s.label, 40)} · {rank}" for _, s, shares in found for rank in shares.names]
    parts = [{kind: 100 * share for kind, share in rank.items()} for *_, shares in found for rank in shares.ranks]
    held = [times for *_, shares in found for times in shares.waited_for]
    with rc_context(SETTINGS):
        heights = [1.0 + 0.38 * len(names), 2.4 + 0.2 * len(found)]
        figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=heights)
        _stack(above, names, parts, CONTRIBUTED)
        for place, times in enumerate(held):
            if times:
                _beside(above, place, 100, f"held up {times:.4g}")
        above.grid(axis="y", visible=False)
        above.set_xlim(0, 115 if any(held) else 100.4)  # the edge of the bars is to be seen
        above.margins(y=0.02)
        above.set_xlabel("share of the rank's rounds [%]")
        above.legend(title="its contribution", loc="center left", bbox_to_anchor=(1.0, 0.5))
        for i, s, shares in found:
            label = f"{fit(s.label, 90)} (mean {shares.mean_staleness:.3g})"
            below.plot(100 * np.array(shares.staleness), label=label, clip_on=False, **line(i))
        below.set_ylim(bottom=0)
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.set_xlabel("age of a contribution when it was sent [rounds]")
        below.set_ylabel("share of contributions [%]")
        _stamp(figure, series)
        figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", handlelength=4)
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
        for lane, spans in enumerate(ranks):
            for kind in KINDS:
                bars = [(1e3 * (a - start), 1e3 * (b - a)) for k, a, b in spans if k == kind and b > start]
                edge = {"edgecolor": "white"} if kind in OWN_WORK else {}  # so that steps can be told apart
                axes.broken_barh(bars, (lane - 0.38, 0.76), linewidth=0.3, **{**bar(kind), **edge})
        axes.set_yticks(range(len(lanes)), lanes)
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.set_xlim(0, 1e3 * (end - start))
        axes.set_xlabel("time [ms]")
        axes.set_title(fit(title, 90), loc="left", fontsize=10)
        figure.legend(handles=[Patch(label=kind, **bar(kind)) for kind in KINDS],
                      loc="outside lower center", ncols=len(KINDS))
    return figure


def _window(ranks: Sequence[Sequence[Span]]) -> tuple[float, float]:
    """From the first local step to the end of the last recorded span: dealing the samples comes before."""
    start = min(a for spans in ranks for kind, a, _ in spans if kind in OWN_WORK)
    return start, max(b for spans in ranks for _, _, b in spans)
