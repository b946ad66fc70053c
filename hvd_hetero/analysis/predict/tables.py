"""Predictions as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hvd_hetero.analysis.predict.advice import Advice, Worth
from hvd_hetero.analysis.predict.looks import table
from hvd_hetero.analysis.predict.predict import Scenario
from hvd_hetero.analysis.predict.prediction import Prediction

LEFT_OUT = (
    "Forecast are training seconds: no start, measuring, evaluation, dealing of samples, or ends of epochs; how well a "
    "method learns is another matter. Blocked is the share of a class's time spent waiting."
)


@dataclass(frozen=True)
class Forecast:
    """All that was found out.

    Attributes:
        sweep: local SGD by tau of the fastest class.
        batches: scale of the batch sizes, and the best tau with them.
    """

    scenario: Scenario
    methods: Sequence[Prediction]
    sweep: Sequence[tuple[int, Prediction]]
    advice: Advice
    batches: Sequence[tuple[float, Advice]]
    worth: Sequence[Worth]


def as_text(foretold: Forecast) -> str:
    """Tables and sentences."""
    scenario = foretold.scenario
    names = [c.name for c in scenario.cluster.classes]
    parts = [
        "\n".join(f"class {c.name}, ranks {len(c.ranks)}: {1e3 * scenario.step_sec[c.name]:.4g} ms a step of "
                  f"{scenario.batch_size[c.name]}, jitter {scenario.known.speeds[c.name].jitter:.2g}"
                  for c in scenario.cluster.classes),
        table([["method", *_head(names)], *([row.label, *_cells(row, names)] for row in foretold.methods)]),
        table([["local SGD", *_head(names)],
               *([f"tau {tau}{' *' if tau == foretold.advice.tau else ''}", *_cells(row, names)]
                 for tau, row in foretold.sweep if row.problem is None)]),
        table([["batch sizes", "best tau", *_head(names)],
               *([_by_class(advice.prediction.batch_size), str(advice.tau), *_cells(advice.prediction, names)]
                 for _, advice in foretold.batches)]),
        f"* Recommended: {foretold.advice.reason}",
        "\n".join(w.sentence for w in foretold.worth) or "There is no class to leave out.",
        "\n".join(_notes(foretold)),
    ]
    return "\n\n".join(parts)


def _head(names: Sequence[str]) -> list[str]:
    return ["tau", "time s", "samples/s", *(f"blocked, {name}" for name in names), "samples", "averages",
            "MB sent by a rank", "comm s"]


def _cells(row: Prediction, names: Sequence[str]) -> list[str]:
    if row.problem is not None:
        return ["-"] * len(_head(names))
    shares = [f"{row.blocked[name]:.1%}" if name in row.blocked else "-" for name in names]
    return [_by_class(row.tau), f"{row.seconds:.4g}", f"{row.samples_per_sec:.4g}", *shares, f"{row.samples:.0f}",
            f"{row.averages:.0f}", f"{row.sent_bytes / 1e6:.4g}", f"{row.comm_sec:.3g}"]


def _by_class(numbers: dict[str, int]) -> str:
    return "/".join(map(str, numbers.values()))


def _notes(foretold: Forecast) -> list[str]:
    """What cannot run, and what was assumed."""
    cannot = [f"{row.label} cannot run: {row.problem}" for row in foretold.methods if row.problem is not None]
    failing: dict[str, list[str]] = {}
    for tau, row in foretold.sweep:
        if row.problem is not None:
            failing.setdefault(row.problem, []).append(str(tau))
    cannot += [f"tau {', '.join(numbers)} cannot be planned: {problem}" for problem, numbers in failing.items()]
    return [*cannot, *foretold.scenario.known.notes, LEFT_OUT]


def as_json(foretold: Forecast) -> dict[str, Any]:
    """What ``table.json`` holds; shares and times as fractions and seconds."""
    scenario, advice = foretold.scenario, foretold.advice
    return {
        "classes": [
            {"name": c.name, "ranks": len(c.ranks), "batch_size": scenario.batch_size[c.name],
             "step_sec": scenario.step_sec[c.name], "jitter": scenario.known.speeds[c.name].jitter}
            for c in scenario.cluster.classes
        ],
        "methods": [_row(row) for row in foretold.methods],
        "sweep": [{"tau_fastest": tau, **_row(row)} for tau, row in foretold.sweep],
        "batches": [{"scale": scale, "tau_fastest": best.tau, **_row(best.prediction)}
                    for scale, best in foretold.batches],
        "recommended": {"tau_fastest": advice.tau, "reason": advice.reason, **_row(advice.prediction)},
        "worth": [{**asdict(w), "worth_having": w.worth_having, "sentence": w.sentence} for w in foretold.worth],
        "notes": _notes(foretold),
    }


def _row(row: Prediction) -> dict[str, Any]:
    return {
        "label": row.label,
        "method": row.method,
        "problem": row.problem,
        "tau": row.tau,
        "batch_size": row.batch_size,
        "seconds": row.seconds,
        "samples": row.samples,
        "samples_per_sec": row.samples_per_sec,
        "averages": row.averages,
        "sent_bytes": row.sent_bytes,
        "comm_sec": row.comm_sec,
        "blocked_fraction": row.blocked,
        "time_sec": {name: {"compute": s.compute, "blocked": s.blocked, "comm": s.comm}
                     for name, s in (row.classes or {}).items()},
    }
