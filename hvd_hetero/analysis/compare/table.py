"""The table of a comparison, as numbers and as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hvd_hetero.analysis.compare.spec import Comparison, Row
from hvd_hetero.analysis.report.figures import Figures, figures
from hvd_hetero.analysis.report.runs import Run, Series
from hvd_hetero.analysis.report.write import percent, stamped
from hvd_hetero.files import write_text

DONE, FAILED, WAITING = "done", "failed", "waiting"

UNITS = {"fast_steps": "local steps of a fast rank", "samples": "samples of all ranks", "wall_clock": "s of training"}


@dataclass
class Result:
    """The figures of one row.

    Attributes:
        runs: of the seeds that finished.
        errors: what went wrong, by seed.
        waiting: how many seeds are still to be run.
    """

    row: Row
    runs: list[Run] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    waiting: int = 0

    @property
    def status(self) -> str:
        """``failed`` if any seed failed, ``waiting`` while some are to be run."""
        return FAILED if self.errors else WAITING if self.waiting else DONE

    @property
    def series(self) -> Series:
        return Series(self.row.label, tuple(self.runs))

    @property
    def figures(self) -> Figures | None:
        return figures(self.series)


def speedup(result: Result, baseline: Result | None) -> float | None:
    """How many times as fast as the baseline a row gets through the shared budget; None where one of them has no run.

    Rows that share samples are measured in samples a second of training, others in steps of a fast rank.
    """
    mine, its = result.figures, baseline.figures if baseline is not None else None
    if mine is None or its is None:
        return None
    in_samples = result.row.budget.equal == "samples"
    rates = [(f.samples if in_samples else f.fast_steps) / f.train_sec for f in (mine, its)]
    return rates[0] / rates[1]


def rows_json(results: Sequence[Result], baselines: Mapping[str, Result | None]) -> list[dict[str, Any]]:
    """The rows of ``table.json``: means over the seeds that finished, null where none did."""
    return [_row_json(result, baselines[result.row.workload]) for result in results]


def _row_json(result: Result, baseline: Result | None) -> dict[str, Any]:
    f = result.figures
    return {
        "label": result.row.name,
        "method": result.runs[0].method if result.runs else result.row.config(0, Path(), None).algorithm.name,
        "status": result.status,
        "seeds": list(f.seeds) if f else [],
        "accuracy_mean": f.accuracy if f else None,
        "accuracy_std": f.accuracy_std if f else None,
        "wall_sec_mean": f.wall_sec if f else None,
        "samples_seen": _integer_if_exact(f.samples) if f else None,
        "averages": _integer_if_exact(f.rounds) if f else None,
        "speedup_vs_sync": speedup(result, baseline),
        "blocked_fraction": f.blocked if f else {},
        "emulated": f.emulated if f else None,
    }


def _integer_if_exact(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def details(
    comparison: Comparison, results: Sequence[Result], baselines: Mapping[str, Result | None]
) -> dict[str, Any]:
    """What ``table.json`` has no room for: budgets, every seed's accuracy, training seconds, where the runs are."""
    rows = []
    for result in results:
        f, baseline = result.figures, baselines[result.row.workload]
        rows.append({
            "label": result.row.name,
            "workload": result.row.workload,
            "budget": asdict(result.row.budget) | {"times": result.row.times},
            "speed_measured_against": baseline.row.name if baseline is not None else None,
            "runs": [str(run.path.relative_to(comparison.folder)) for run in result.runs],
            "errors": {str(seed): text for seed, text in result.errors.items()},
            **(asdict(f) if f else {}),
        })
    return {"title": comparison.title, "rows": rows}


def table_rows(results: Sequence[Result], baseline: Result | None) -> list[list[str]]:
    """The table of one workload as texts, the first row a heading."""
    classes = list(dict.fromkeys(name for r in results if r.figures for name in r.figures.blocked))
    head = ["method", "epochs", "averages per epoch", "training [s]", "whole run [s]", "fast steps", "samples",
            "samples/s", "lost samples", "sent by a rank [MB]", "accuracy [%]", "seeds", "speed against sync"]
    table = [[*head, *(f"blocked: {name}" for name in classes), "emulated", "status"]]
    for result in results:
        f, speed = result.figures, speedup(result, baseline)
        if f is None:
            table.append([result.row.label, *["-"] * (len(table[0]) - 2), result.status])
            continue
        shares = [f"{f.blocked[name]:.1%}" if name in f.blocked else "-" for name in classes]
        table.append([
            result.row.label, f"{f.epochs:.4g}", f"{f.rounds_per_epoch:.4g}", f"{f.train_sec:.1f}", f"{f.wall_sec:.1f}",
            f"{f.fast_steps:.0f}", f"{f.samples:.0f}", f"{f.samples / f.train_sec:.0f}", f"{f.lost:.0f}",
            "-" if f.sent_bytes is None else f"{f.sent_bytes / 1e6:.3g}", percent(f), ", ".join(map(str, f.seeds)),
            "-" if speed is None else f"{speed:.2f}x", *shares, stamped(f), result.status,
        ])
    return table


def notes(comparison: Comparison, results: Sequence[Result], baseline: Result | None) -> list[str]:
    """Sentences that say how to read the table of one workload, and what failed."""
    budget = results[0].row.budget
    amount = f"{budget.amount:g} " if budget.amount is not None else ""
    source = "" if budget.amount is not None else f", as many as {results[0].row.label!r} takes with the same seed"
    lines = [f"Every row had the same {amount}{UNITS[budget.equal]}{source}, to within one round."]
    more = [f"{r.row.label!r} {r.row.times:g} times" for r in results if r.row.times != 1]
    lines += [f"More or less of it by intent: {', '.join(more)}."] if more else []
    lines.append("Accuracy is that of the last evaluation: mean ± sample standard deviation over the seeds. Training "
                 "seconds leave out start, profiling and evaluation; the whole run has them. An average is one "
                 "communication of all training ranks. Lost samples were computed on or dealt, and no step was made of "
                 "them. Sent is by a rank of the class that sends the most. Blocked is the share of a class's time "
                 "spent waiting.")
    if baseline is not None:
        unit = "samples" if budget.equal == "samples" else "steps of a fast rank"
        lines.append(f"Speed is {unit} per second of training, divided by that of {baseline.row.label!r}.")
    for result in results:
        lines += [f"FAILED: {result.row.label}, seed {seed}: {text}" for seed, text in result.errors.items()]
    return lines


def write_tables(comparison: Comparison, results: Sequence[Result], baselines: Mapping[str, Result | None]) -> None:
    """Writes ``table.json``, ``table.md`` and ``details.json`` into the comparison's folder."""
    lines = [f"# {comparison.title}", ""]
    for workload in comparison.workloads():
        mine, baseline = [r for r in results if r.row.workload == workload], baselines[workload]
        lines += [f"## {workload}", ""] if workload else []
        lines += [*markdown(table_rows(mine, baseline)), ""]
        lines += [line for text in notes(comparison, mine, baseline) for line in (text, "")]
    write_text(comparison.folder / "table.md", "\n".join(lines))
    write_text(comparison.folder / "table.json", json.dumps({"rows": rows_json(results, baselines)}, indent=2) + "\n")
    write_text(comparison.folder / "details.json", json.dumps(details(comparison, results, baselines), indent=2) + "\n")


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, its columns aligned in the text too."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in escaped) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in escaped]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
