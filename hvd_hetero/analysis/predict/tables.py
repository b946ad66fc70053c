"""Predictions as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hvd_hetero.analysis.predict.advice import Advice, Together, Worth
from hvd_hetero.analysis.predict.predict import Prediction, Scenario
from hvd_hetero.analysis.predict.roles import RoleWorth
from hvd_hetero.analysis.predict.start import Start
from hvd_hetero.telemetry.tables import table

LEFT_OUT = (
    "Times in the tables are of training: no start, measuring, evaluation, dealing of samples, or ends of epochs; how "
    "well a method learns is another matter. Blocked is the share of a class's time spent waiting."
)


@dataclass(frozen=True)
class Forecast:
    """All predictions and the advice.

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
    together: Together | None
    start: Start
    roles: Sequence[RoleWorth] = ()


def as_text(forecast: Forecast) -> str:
    """Return tables and sentences."""
    scenario = forecast.scenario
    names = [c.name for c in scenario.cluster.classes]
    parts = [
        "\n".join(f"class {c.name}, ranks {len(c.ranks)}: {1e3 * scenario.step_sec[c.name]:.4g} ms a step of "
                  f"{scenario.batch_size[c.name]}, jitter {scenario.inputs.speeds[c.name].jitter:.2g}"
                  for c in scenario.cluster.classes),
        table([["method", *_head(names)], *([row.label, *_cells(row, names)] for row in forecast.methods)]),
        table([["local SGD", *_head(names)],
               *([f"tau {tau}{' *' if tau == forecast.advice.tau else ''}", *_cells(row, names)]
                 for tau, row in forecast.sweep if row.problem is None)]),
        table([["batch sizes", "best tau", *_head(names)],
               *([_by_class(advice.prediction.batch_size), str(advice.tau), *_cells(advice.prediction, names)]
                 for _, advice in forecast.batches)]),
        f"* Recommended: {forecast.advice.reason}",
        "\n".join([*(w.sentence for w in forecast.worth), *([forecast.together.sentence] if forecast.together else []),
                   *(r.sentence for r in forecast.roles)])
        or "There is no class to leave out.",
        "\n".join(forecast.start.sentences(_round_sec(forecast))),
        "\n".join(_notes(forecast)),
    ]
    return "\n\n".join(parts)


def _round_sec(forecast: Forecast) -> float:
    best = forecast.advice.prediction
    return best.seconds / best.averages


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


def _notes(forecast: Forecast) -> list[str]:
    """List what cannot run, and what was assumed."""
    cannot = [f"{row.label} cannot run: {row.problem}" for row in forecast.methods if row.problem is not None]
    failing: dict[str, list[str]] = {}
    for tau, row in forecast.sweep:
        if row.problem is not None:
            failing.setdefault(row.problem, []).append(str(tau))
    lost = [(row, name, s.dropped / s.steps) for row in forecast.methods for name, s in (row.classes or {}).items()
            if s.dropped]  # fmt: skip
    cannot += [f"{row.label}: {share:.1%} of the samples of {name} are lost" for row, name, share in lost]
    cannot += [f"tau {', '.join(numbers)} cannot be planned: {problem}" for problem, numbers in failing.items()]
    return [*cannot, *forecast.scenario.inputs.notes, LEFT_OUT]


def as_json(forecast: Forecast) -> dict[str, Any]:
    """Return the content of ``table.json``; shares and times as fractions and seconds."""
    scenario, advice = forecast.scenario, forecast.advice
    return {
        "classes": [
            {"name": c.name, "ranks": len(c.ranks), "batch_size": scenario.batch_size[c.name],
             "step_sec": scenario.step_sec[c.name], "jitter": scenario.inputs.speeds[c.name].jitter}
            for c in scenario.cluster.classes
        ],
        "methods": [_row(row) for row in forecast.methods],
        "sweep": [{"tau_fastest": tau, **_row(row)} for tau, row in forecast.sweep],
        "batches": [{"scale": scale, "tau_fastest": best.tau, **_row(best.prediction)}
                    for scale, best in forecast.batches],
        "recommended": {"tau_fastest": advice.tau, "reason": advice.reason, **_row(advice.prediction)},
        "worth": [{**asdict(w), "worth_having": w.worth_having, "sentence": w.sentence} for w in forecast.worth],
        "roles": [{**asdict(r), "best": r.best, "sentence": r.sentence} for r in forecast.roles],
        "together": None if forecast.together is None else asdict(forecast.together),
        "start": {**asdict(forecast.start), "seconds": forecast.start.seconds},
        "notes": _notes(forecast),
    }


def _row(row: Prediction) -> dict[str, Any]:
    names = ("label", "method", "problem", "tau", "batch_size", "seconds", "samples", "samples_per_sec", "averages",
             "sent_bytes", "comm_sec")  # fmt: skip
    time_sec = {name: {"compute": s.compute, "blocked": s.blocked, "comm": s.comm}
                for name, s in (row.classes or {}).items()}  # fmt: skip
    return {**{name: getattr(row, name) for name in names}, "blocked_fraction": row.blocked, "time_sec": time_sec}
