"""How runs stand, in the text format that Prometheus scrapes (exposition format 0.0.4)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hvd_hetero.telemetry.run_status import RunStatus

TYPE = "text/plain; version=0.0.4; charset=utf-8"
BEFORE = "hvd_hetero"
RUN = {
    "epoch": ("epoch", "Whole epochs so far."),
    "round": ("round", "Rounds so far."),
    "share_done": ("done_ratio", "Share of the run that is done."),
    "left_sec": ("left_seconds", "Seconds left at the pace so far."),
    "wall_sec": ("wall_seconds", "Seconds so far."),
    "train_loss": ("train_loss", "Training loss of the last epoch."),
    "eval_loss": ("eval_loss", "Newest test loss."),
    "eval_accuracy": ("eval_accuracy_ratio", "Newest test accuracy."),
    "samples_per_sec": ("samples_per_second", "Samples per second of all ranks, in the last epoch."),
}
CLASS = {
    "steps_per_sec": ("class_steps_per_second", "Local steps per second of a rank."),
    "blocked_fraction": ("class_blocked_ratio", "Share of its time in which a rank waits for others."),
    "tau": ("class_tau", "Local steps of a rank in a round."),
    "batch_size": ("class_batch_size", "Samples of a local step."),
    "excluded": ("class_excluded", "Contributions left out of averages, up to the last epoch's end."),
}
CHECKPOINT = {
    "round": ("checkpoint_round", "Round of the newest checkpoint."),
    "age_sec": ("checkpoint_age_seconds", "Age of the newest checkpoint when the run last told."),
}

Sample = tuple[str, str, Mapping[str, str], Any]
"""Name, help, labels, value."""


def metrics(runs: Iterable[RunStatus]) -> str:
    """Return the figures of all runs, all of them gauges; what a run does not tell is left out."""
    found: dict[str, list[str]] = {}
    for name, text, labels, value in (sample for run in runs for sample in _samples(run)):
        name = f"{BEFORE}_{name}"
        lines = found.setdefault(name, [f"# HELP {name} {text}", f"# TYPE {name} gauge"])
        if isinstance(value, (int, float)):
            label_text = ",".join(f'{key}="{_escaped(word)}"' for key, word in labels.items())
            lines.append(f"{name}{{{label_text}}} {float(value)!r}")
    return "".join(f"{line}\n" for lines in found.values() if len(lines) > 2 for line in lines)


def _samples(run: RunStatus) -> Iterator[Sample]:
    labels, content = {"run": str(run.path)}, run.content
    yield "phase", "1 for the phase that the run is in.", {**labels, "phase": run.phase}, 1
    yield "silent_seconds", "For so long at least the run has said nothing new.", labels, run.silent_sec
    for known, where in ((RUN, content), (CHECKPOINT, content.get("checkpoint") or {})):
        yield from ((*known[key], labels, where.get(key)) for key in known)
    for key, value in content.items():
        if key.startswith("eval_") and key not in RUN:
            name = key.removeprefix("eval_")
            yield "eval_" + re.sub(r"\W", "_", name, flags=re.ASCII), f"Newest {name} of the test set.", labels, value
    for name, figures in content.get("classes", {}).items():
        yield from ((*CLASS[key], {**labels, "class": name}, figures.get(key)) for key in CLASS)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
