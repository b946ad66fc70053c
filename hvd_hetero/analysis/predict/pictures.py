"""The pictures of a plan. Imports matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from hvd_hetero.analysis.predict.tables import Forecast
from hvd_hetero.analysis.report.style import SETTINGS, bar, line

DPI = 150
KINDS = ("compute", "blocked", "comm")


def draw(forecast: Forecast, folder: Path) -> list[Path]:
    """Write ``methods.png`` and ``tau.png``; return their paths."""
    paths = [folder / "methods.png", folder / "tau.png"]
    for path, figure in zip(paths, (methods(forecast), taus(forecast)), strict=True):
        figure.savefig(path, dpi=DPI)
    return paths


def methods(forecast: Forecast) -> Figure:
    """Draw as stacked bars where each class's time would go, by method."""
    rows = [(row.label, row.classes or {}) for row in forecast.methods]
    found = [(f"{label} · {name}", spent) for label, classes in rows for name, spent in classes.items()]
    with rc_context({**SETTINGS, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(9.5, 1.4 + 0.3 * len(found)), layout="constrained")
        axes = figure.subplots()
        places, left = np.arange(len(found)), np.zeros(len(found))
        for kind in KINDS:
            widths = np.array([getattr(spent, kind) for _, spent in found])
            axes.barh(places, widths, left=left, height=0.72, label=kind, linewidth=0.6, **bar(kind))
            left += widths
        for place, total, (_, spent) in zip(places, left, found, strict=True):
            axes.annotate(f"{spent.blocked_share:.0%} blocked", (total, place), (4, 0), textcoords="offset points",
                          va="center", fontsize=8)
        axes.set_yticks(places, [label for label, _ in found])
        axes.invert_yaxis()
        axes.margins(x=0.15, y=0.02)
        axes.set_xlabel("predicted training time [s]")
        figure.legend(loc="outside lower center", ncols=len(KINDS))
    return figure


def taus(forecast: Forecast) -> Figure:
    """Draw blocked shares and speed of local SGD over the fastest class's tau."""
    rows = [(tau, row) for tau, row in forecast.sweep if row.problem is None]
    x = [tau for tau, _ in rows]
    with rc_context(SETTINGS):
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, c in enumerate(forecast.scenario.cluster.classes):
            left.plot(x, [100 * row.blocked[c.name] for _, row in rows], label=c.name, **line(i))
        left.set_ylim(bottom=0)
        left.set_ylabel("predicted blocked share [%]")
        left.legend()
        right.plot(x, [row.samples_per_sec for _, row in rows], **line(len(forecast.scenario.cluster.classes)))
        right.axhline(forecast.scenario.capacity, color="#808080", linewidth=1)
        right.annotate("nobody waits, nothing is sent", (0, forecast.scenario.capacity), (2, 4),
                       xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8)
        right.set_ylabel("predicted samples/s")
        right.set_ylim(0, 1.12 * max(forecast.scenario.capacity, *(row.samples_per_sec for _, row in rows)))
        for axes in (left, right):
            axes.axvline(forecast.advice.tau, color="#808080", linestyle=":", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_xlabel(f"tau of {forecast.scenario.fastest} (dotted: recommended)")
    return figure
