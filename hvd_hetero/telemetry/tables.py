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
    rows = [[*head, *(f"{kind} s" for kind in KINDS), "sent MB", *(["GPU GB"] if on_gpus else [])]]
    for c in summary["classes"]:
        total = sum(c["time_sec"].values()) or 1.0
        times = [f"{c['time_sec'][k]:.2f} ({100 * c['time_sec'][k] / total:.1f}%)" for k in KINDS]
        name = c["name"] + (f" (x{c['slowdown']:g} emulated)" if c["slowdown"] > 1 else "")
        batch = str(c["batch_size"]) + (f" in {c['micro_batches']}" if c.get("micro_batches", 1) > 1 else "")
        step = "-" if c["step_sec"] is None else f"{1e3 * c['step_sec']:.3g}"
        rows.append([name, c["device"], ",".join(map(str, c["ranks"])), str(c["tau"]), batch,
                     f"{c['weight']:.4f}", step, str(c["steps"]), str(c["samples"]), *times,
                     or_dash(c.get("sent_bytes", math.nan) / 1e6)])
        if on_gpus:
            peak = c.get("peak_gpu_bytes")
            rows[-1].append("-" if peak is None else f"{peak / 1e9:.2f}")
    result = summary["eval"]
    figures = [
        f"{summary['algorithm']}: {summary['epochs']} epochs, {summary['rounds']} rounds",
        f"{summary['samples_seen']} samples",
        f"training {summary['train_sec']:.1f} s of {summary['wall_sec']:.1f} s",
    ]
    figures += evaluated(result, "final_")
    if averaged := evaluated(result, "averaged_"):
        figures.append(f"averaged model: {', '.join(averaged)}")
    if lost := [f"{c['name']} {c['excluded']}" for c in summary["classes"] if c.get("excluded")]:
        figures.append(f"LEFT OUT of averages (NaN, Inf): {', '.join(lost)}")
    if left := [f"{c['name']} {c['dropped']}" for c in summary["classes"] if c.get("dropped")]:
        figures.append(f"samples LEFT OUT of steps: {', '.join(left)}")
    if summary["emulated"]:
        figures.append(" and ".join(STAMPS[reason] for reason in summary["emulation"]))
    return "\n".join([table(rows), "; ".join(figures), *worth(summary)])


def evaluated(result: Mapping[str, Any], prefix: str) -> list[str]:
    """Return the figures of the test set whose names begin so, the loss last, each with the best value if it is known.

    Args:
        result: ``eval`` of ``summary.json``.
    """
    found = {name.removeprefix(prefix): value for name, value in result.items() if name.startswith(prefix)}
    texts = []
    for name, value in sorted(found.items(), key=lambda item: item[0] == "loss"):
        shown = (lambda x: f"{100 * x:.2f}%") if name == "accuracy" else or_dash
        if value is not None or name == "loss":
            best = result.get(f"best_{name}") if prefix == "final_" and name != "loss" else None
            title = "test loss" if name == "loss" else name  # lines of epochs have that of training
            texts.append(f"{title} {shown(value)}" + ("" if best is None else f" (best {shown(best)})"))
    return texts


def worth(summary: Mapping[str, Any]) -> list[str]:
    """Return what the slower classes were worth in throughput, and how far a round moves: one line, or none.

    The fastest class alone is taken to take its steps as fast as in the run, and to wait for nothing. How far a round's
    average moves, :func:`hvd_hetero.planning.plan.round_way` tells.
    """
    training = [c for c in summary["classes"] if c["steps"] and c["step_sec"]]
    if len(training) < 2 or not summary["train_sec"]:
        return []
    fastest = max(training, key=lambda c: c["batch_size"] / c["step_sec"])
    alone = len(fastest["ranks"]) * fastest["batch_size"] / fastest["step_sec"]
    rate = sum(c["samples"] for c in training) / summary["train_sec"]
    name, others = fastest["name"], " and ".join(c["name"] for c in training if c is not fastest)
    line = f"{rate:.4g} samples/s, {rate / alone:.2f} times what class {name} could process alone ({alone:.4g})"
    if rate < alone:
        line += f", so the run was SLOWER than without {others}"
    if len({c["tau"] for c in training}) > 1:
        line += f"; a round moves the model {summary['round_way']:.2f} times as far as a {name} rank alone"
    return [line]


def or_dash(value: float | None, form: str = ".4g") -> str:
    """A dash for a figure that there is not, or that was no number."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first row a heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
