"""``hvd-hetero status``, ``stop`` and ``save``: from a run's folder alone, on any host that has it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvd_hetero.cluster.hosts import ranges
from hvd_hetero.errors import ConfigError
from hvd_hetero.telemetry.progress import span
from hvd_hetero.telemetry.run_status import SAVE, RunStatus, StatusReader
from hvd_hetero.telemetry.tables import or_dash, table
from hvd_hetero.training.stop_request import STOP

WATCH_SEC = 2.0
CLEAR = "\x1b[H\x1b[2J"
"""Sends a terminal's cursor home, and clears the screen."""
WILL = {STOP: "it saves and ends after the round that it is in", SAVE: "it saves after the round that it is in"}


def status(path: str | Path, as_json: bool = False, watch: bool = False) -> None:
    """Print how a run stands; with ``watch`` again and again, until it has ended.

    Raises:
        ConfigError: it is no folder of a run.
    """
    read = StatusReader(path)
    while True:
        found = read()
        if watch and not as_json and sys.stdout.isatty():
            print(CLEAR, end="")
        print(json.dumps(to_dict(found)) if as_json else text(found), flush=True)
        if not watch or found.over:
            return
        time.sleep(WATCH_SEC)


def ask(path: str | Path, what: str) -> str:
    """Ask a run to save, or to stop; return what it will do.

    Args:
        what: the name of the file that asks, one of :data:`WILL`.

    Raises:
        ConfigError: it is no folder of a run, the run has ended, or it does not listen.
    """
    found = StatusReader(path)()
    if found.over:
        raise ConfigError("RUN", str(path), f"has ended ({found.phase})", f"there is nothing to {what}")
    if found.content.get("checkpoint", {}) is None:
        problem = "keeps no checkpoints, and so hears nothing"
        raise ConfigError("RUN", str(path), problem, "end its launcher with SIGTERM, and set checkpoint.every_sec")
    try:
        (found.path / what).touch()
    except OSError as error:
        raise ConfigError("RUN", str(path), f"cannot be written: {error.strerror}", "ask as its user") from error
    return f"{path}: {WILL[what]} (round {found.content.get('round', 0)} when it last said)"


def to_dict(found: RunStatus) -> dict[str, Any]:
    """Return what ``--json`` prints: ``status.json``, with what a reader adds to it."""
    return {**found.content, "phase": found.phase, "run": str(found.path), "silent_sec": found.silent_sec}


def text(found: RunStatus) -> str:
    """Return how a run stands, in a few lines."""
    content = found.content
    age = f"{span(found.silent_sec)} ago" if found.here else f"at {content['written']} by the clock there"
    lines = [f"{found.path}: {found.phase}, rank 0 on {content['host']}, told {age}"]
    if found.lost:
        lines.append("rank 0 is gone without a word: resume with run.resume=auto")
    elif found.silent:
        lines.append(f"it has said nothing for {span(found.silent_sec)}, and may have died: look at its launcher")
    if "round" not in content:
        return "\n".join(lines)
    total = "" if content["epochs"] is None else f" of {content['epochs']}"
    left = "" if found.over or content["left_sec"] is None else f", {span(content['left_sec'])} left"
    lines.append(f"epoch {content['epoch']}{total}, round {content['round']} ({content['rounds_in_epoch']} of "
                 f"{content['rounds_per_epoch']} in its epoch), {content['share_done']:.0%} done{left}")  # fmt: skip
    if "train_loss" in content:
        lines.append(", ".join(f"{name} {value}" for name, value in results(content).items()))
    if content["checkpoint"] is not None:
        lines.append(saved(found))
    return "\n".join([*lines, table(classes(content))])


def saved(found: RunStatus) -> str:
    """Return what there is to resume from."""
    checkpoint = found.content["checkpoint"]
    age = "" if found.over else f", {span(checkpoint['age_sec'] + found.silent_sec)} old"
    return "no checkpoint yet" if checkpoint["round"] is None else f"checkpoint of round {checkpoint['round']}{age}"


def results(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the newest losses and the newest metrics, as a person reads them."""
    shown = {"training loss": or_dash(content["train_loss"])}
    shown |= {"test loss" if name == "eval_loss" else name.removeprefix("eval_"): or_dash(value)
              for name, value in content.items() if name.startswith("eval_")}  # fmt: skip
    if (accuracy := content.get("eval_accuracy")) is not None:
        shown["accuracy"] = f"{100 * accuracy:.2f} %"
    return shown


def classes(content: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of the device classes, the first row a heading."""
    rows = [["class", "ranks", "tau", "batch", "steps/s", "blocked", "excluded"]]
    for name, known in content["classes"].items():
        blocked = known.get("blocked_fraction")
        rows.append([name, ranges(known["ranks"]), str(known["tau"]), str(known["batch_size"]),
                     or_dash(known.get("steps_per_sec")), "-" if blocked is None else f"{blocked:.1%}",
                     str(known["excluded"] + known["excluded_in_epoch"])])  # fmt: skip
    return rows
