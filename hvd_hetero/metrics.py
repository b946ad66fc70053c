"""What a run leaves behind: its folder, a row a pass, TensorBoard events, and the accounts of every device class."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from hvd_hetero.cluster import Cluster
from hvd_hetero.errors import ConfigError
from hvd_hetero.limits import Done
from hvd_hetero.partial_counts import PartialAccounts
from hvd_hetero.plan import Plan
from hvd_hetero.timing import KINDS, split_waiting
from hvd_hetero.trace import TRACE

SUMMARY = "summary.json"
METRICS = "metrics.jsonl"


class RunFolder:
    """The folder of one run; rank 0 writes it.

    Args:
        keep_bytes: of ``metrics.jsonl``, where a run goes on; None: it starts.
        keep_samples: samples seen so far, by which TensorBoard knows what it is not to show twice.

    Raises:
        ConfigError: it already holds a run and ``overwrite`` is not set, or it cannot be written.
    """

    def __init__(
        self, path: str | Path, overwrite: bool, keep_bytes: int | None = None, keep_samples: int | None = None
    ) -> None:
        self.path = Path(path)
        check_run_dir(self.path, overwrite or keep_bytes is not None)
        try:
            self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            if keep_bytes is None:
                old = [self.path / name for name in (SUMMARY, METRICS, TRACE)]
                for path in (*old, *self.path.glob("tensorboard/events.*")):
                    path.unlink(missing_ok=True)
            self._rows = (self.path / METRICS).open("a")
            self._rows.truncate(keep_bytes or 0)
        except OSError as error:
            raise ConfigError("run.dir", str(path), f"cannot be written: {error.strerror}", "choose another") from error
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=keep_samples)

    def write(self, name: str, content: Mapping[str, Any] | str) -> None:
        """Writes a text or a JSON file whole: a reader sees the old one or the new one."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        part = self.path / f".{name}.part"
        part.write_text(text)
        part.replace(self.path / name)

    def row(self, row: Mapping[str, Any]) -> None:
        """Appends a row to ``metrics.jsonl``, flushed, and its numbers to TensorBoard, by samples seen."""
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        for name, value in row.items():
            for part, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, (int, float)):
                    self._events.add_scalar(f"{name}/{part}" if part else name, number, row["samples_seen"])
        self._events.flush()

    @property
    def rows_bytes(self) -> int:
        """Size of ``metrics.jsonl`` so far."""
        self._rows.flush()
        return self._rows.tell()

    def close(self) -> None:
        self._rows.close()
        self._events.close()


def check_run_dir(path: str | Path, overwrite: bool) -> None:
    """Refuses a folder that already holds a run.

    Raises:
        ConfigError: it does, and ``overwrite`` is not set.
    """
    if not overwrite and any((Path(path) / name).exists() for name in (SUMMARY, "config.yaml")):
        raise ConfigError("run.dir", str(path), "already holds a run", "choose another, or set run.overwrite=true")


class Accounts:
    """Adds up, over passes, where every rank's time went and what every class did."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.seconds = [dict.fromkeys(KINDS, 0.0) for _ in range(cluster.size)]
        self.steps = [0] * cluster.size
        self.samples = [0] * cluster.size
        self.rounds = 0
        self.passes = 0
        self.partial = PartialAccounts()
        self.earlier = Done()

    def enter(
        self,
        plan: Plan,
        rounds: int,
        steps: Sequence[int],
        kinds: Sequence[Mapping[str, float]],
        collectives: Sequence[Sequence[float]],
    ) -> float:
        """Enters one pass; returns its seconds.

        Args:
            rounds: averages that were made.
            steps: local steps, by rank.
            kinds: seconds of each kind, by rank.
            collectives: durations ``[ranks][collectives]`` in the order in which ranks met in them, NaN: not in it.
        """
        blocked, comm = split_waiting(collectives)
        for rank, mine in enumerate(plan.by_rank()):
            together = {"blocked": blocked[rank], "comm": comm[rank]}
            for kind in KINDS:
                self.seconds[rank][kind] += kinds[rank][kind] + together.get(kind, 0.0)
            self.steps[rank] += steps[rank]
            self.samples[rank] += steps[rank] * mine.batch_size
        self.rounds += rounds
        self.passes += 1
        return sum(kinds[0].values()) + blocked[0] + comm[0]

    def state_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("seconds", "steps", "samples", "rounds", "passes")}
        return {**counts, "partial": self.partial.state_dict(), "earlier": asdict(self.earlier)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seconds = [dict(mine) for mine in state["seconds"]]
        self.steps, self.samples = list(state["steps"]), list(state["samples"])
        self.rounds, self.passes = state["rounds"], state["passes"]
        self.partial.load_state_dict(state["partial"])
        self.earlier = Done(**state["earlier"])

    def carry_over(self, state: Mapping[str, Any]) -> None:
        """Goes on from the totals of other ranks' accounts; what was each class's own is not counted any more."""
        other = Accounts(self._cluster)
        other.load_state_dict(state)
        self.rounds, self.passes, self.earlier = other.rounds, other.passes, other.done

    @property
    def done(self) -> Done:
        steps = self.earlier.fast_steps + max(self.steps)
        return Done(self.passes, self.rounds, steps, self.samples_seen, self.train_sec)

    @property
    def samples_seen(self) -> int:
        return self.earlier.samples + sum(self.samples)

    @property
    def train_sec(self) -> float:
        return self.earlier.train_sec + sum(self.seconds[0].values())

    def blocked_fractions(self) -> dict[str, float]:
        """By class, the share of its time that its ranks waited for others."""
        return {c.name: _share(self._times(c.ranks), "blocked") for c in self._cluster.classes}

    def classes(self, plan: Plan) -> list[dict[str, Any]]:
        """The ``classes`` of summary.json; seconds are means over a class's ranks, steps and samples sums."""
        result = []
        for item, planned in zip(self._cluster.classes, plan.classes, strict=True):
            times = self._times(item.ranks)
            steps = sum(self.steps[r] for r in item.ranks)
            busy = (times["compute"] + times["data"]) * len(item.ranks)
            result.append(
                {
                    "name": item.name,
                    "device": item.device,
                    "ranks": list(item.ranks),
                    "tau": planned.tau,
                    "batch_size": planned.batch_size,
                    "weight": planned.weight,
                    "slowdown": item.slowdown,
                    "step_sec": busy / steps if steps else None,
                    "steps": steps,
                    "samples": sum(self.samples[r] for r in item.ranks),
                    "time_sec": times,
                    "blocked_fraction": _share(times, "blocked"),
                }
            )
        return result

    def _times(self, ranks: Sequence[int]) -> dict[str, float]:
        return {kind: sum(self.seconds[r][kind] for r in ranks) / len(ranks) for kind in KINDS}


def _share(times: Mapping[str, float], kind: str) -> float:
    total = sum(times.values())
    return times[kind] / total if total else 0.0


class Progress:
    """Shows rank 0's progress: a bar where the launcher says that there is a terminal, else a line now and then.

    Args:
        columns: width of the terminal, or None.
        done: passes that a run which goes on had done before.
    """

    LINE_SEC = 5.0

    def __init__(
        self, passes: int | None, columns: int | None, done: int = 0, stream: TextIO = sys.stderr
    ) -> None:
        self._passes, self._stream = passes, stream  # passes: None where only the clock ends the run
        self._last_line = 0.0
        self._bar = None
        if columns:
            from tqdm import tqdm

            # The figures are what one looks at; the bar takes what is left of a narrow terminal.
            form = "pass {n_fmt}/{total_fmt} |{bar:8}| {remaining} left{postfix}"
            self._bar = tqdm(
                total=passes, initial=done, bar_format=form, ncols=columns, file=stream, leave=True, mininterval=0
            )

    def update(self, row: Mapping[str, Any], fastest: str) -> None:
        """Shows a metrics row; the last one is always shown."""
        done = row["pass"]
        figures = {
            "round": str(row["round"]),
            "loss": _short(row["train_loss"]),
            "acc": _percent(row.get("eval_accuracy")),
            "samples/s": _short(row["samples_per_sec"]),
            "blocked": _percent(row["blocked_fraction"][fastest]),
        }
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(1)
        elif done == self._passes or time.monotonic() - self._last_line >= self.LINE_SEC:
            self._last_line = time.monotonic()
            text = "  ".join(f"{name} {value}" for name, value in figures.items())
            total = "" if self._passes is None else f"/{self._passes}"
            print(f"pass {done}{total}  {text}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def environment(cluster: Cluster, horovod: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader needs to know of where a run was made."""
    packages = ("torch", "torchvision", "numpy", "omegaconf", "hvd-hetero")
    return {
        "versions": {"python": platform.python_version(), "horovod": dict(horovod)}
        | {name: _version(name) for name in packages},
        "platform": platform.platform(),
        "ranks": [fact.to_dict() for fact in cluster.facts],
        "command": sys.argv,
        "git_revision": _git_revision(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Of the working directory, where the user's own code and configs are."""
    command = ["git", "-C", os.getcwd(), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
