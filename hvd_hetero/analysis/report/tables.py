"""Format the tables of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hvd_hetero.telemetry.emulation import DELAYED, SLOWED
from hvd_hetero.telemetry.stopwatch import KINDS

STAMPS = {SLOWED: "EMULATED slow devices", DELAYED: "INJECTED delays"}


def closing_table(summary: Mapping[str, Any]) -> str:
    """The table that ends a run: a row a device class, then the run's own figures."""
    head = ["class", "device", "ranks", "tau", "batch", "weight", "step ms", "steps", "samples"]
    on_gpus = any(c.get("peak_gpu_bytes") is not None for c in summary["classes"])
    rows = [[*head, *(f"{kind} s" for kind in KINDS), *(["GPU GB"] if on_gpus else [])]]
    for c in summary["classes"]:
        total = sum(c["time_sec"].values()) or 1.0
        times = [f"{c['time_sec'][k]:.2f} ({100 * c['time_sec'][k] / total:.1f}%)" for k in KINDS]
        name = c["name"] + (f" (x{c['slowdown']:g} emulated)" if c["slowdown"] > 1 else "")
        step = "-" if c["step_sec"] is None else f"{1e3 * c['step_sec']:.3g}"
        rows.append([name, c["device"], ",".join(map(str, c["ranks"])), str(c["tau"]), str(c["batch_size"]),
                     f"{c['weight']:.4f}", step, str(c["steps"]), str(c["samples"]), *times])
        if on_gpus:
            peak = c.get("peak_gpu_bytes")
            rows[-1].append("-" if peak is None else f"{peak / 1e9:.2f}")
    result = summary["eval"]
    figures = [
        f"{summary['algorithm']}: {summary['epochs']} epochs, {summary['rounds']} rounds",
        f"{summary['samples_seen']} samples",
        f"training {summary['train_sec']:.1f} s of {summary['wall_sec']:.1f} s",
    ]
    if result["final_accuracy"] is not None:
        figures.append(f"accuracy {100 * result['final_accuracy']:.2f}% (best {100 * result['best_accuracy']:.2f}%)")
    figures.append(f"loss {or_dash(result['final_loss'])}")
    if result.get("averaged_loss") is not None:
        share = result["averaged_accuracy"]
        accuracy = "" if share is None else f"accuracy {100 * share:.2f}%, "
        figures.append(f"averaged model: {accuracy}loss {or_dash(result['averaged_loss'])}")
    if lost := [f"{c['name']} {c['excluded']}" for c in summary["classes"] if c.get("excluded")]:
        figures.append(f"LEFT OUT of averages (NaN, Inf): {', '.join(lost)}")
    if summary["emulated"]:
        figures.append(" and ".join(STAMPS[reason] for reason in summary["emulation"]))
    return f"{table(rows)}\n{'; '.join(figures)}"


def or_dash(value: float | None, form: str = ".4g") -> str:
    """A dash for a figure that there is not, or that was no number."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first row a heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
