"""Reading run folders, and putting runs together that differ only in the seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hvd_hetero.errors import ConfigError
from hvd_hetero.telemetry.emulation import emulation_reasons
from hvd_hetero.telemetry.run_folder import EVALUATIONS, METRICS, SUMMARY
from hvd_hetero.telemetry.trace import TRACE


@dataclass(frozen=True)
class Run:
    """What one run left behind.

    Attributes:
        settings: the resolved configuration, flat: dotted key to value.
        rows: of ``metrics.jsonl``, at least one.
        summary: None where the run did not reach its end.
        trace: the recorded rounds, if there are any.
        evaluations: by helpers, of models between those of the rows.
    """

    path: Path
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    plan: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    trace: Mapping[str, Any] | None
    evaluations: Sequence[Mapping[str, Any]] = ()

    @property
    def points(self) -> list[Mapping[str, Any]]:
        """Rows and evaluations, in the order of the run."""
        return sorted([*self.rows, *self.evaluations], key=lambda row: row["samples_seen"])

    @property
    def method(self) -> str:
        return str(self.settings["algorithm.name"])

    @property
    def emulation(self) -> tuple[str, ...]:
        """Why the times are not those of real devices; empty where they are."""
        planned = [f"cluster.classes.{c['name']}.slowdown" for c in self.plan.get("classes", ())]
        slow = any(self.settings.get(key, 1) > 1 for key in planned)
        delayed = self.settings.get("delays.distribution") is not None
        before = self.rows[-1].get("emulation", ())  # of jobs that this one goes on from
        return emulation_reasons(slow, delayed, before)


@dataclass(frozen=True)
class Series:
    """Runs that differ only in the seed, under one name."""

    label: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Mapping[str, Any]]:
        """The summaries of the runs that reached their end."""
        return [run.summary for run in self.runs if run.summary is not None]

    @property
    def emulation(self) -> tuple[str, ...]:
        """As :attr:`Run.emulation`, of any run."""
        return emulation_reasons(before=(reason for run in self.runs for reason in run.emulation))


def emulation(series: Sequence[Series]) -> list[str]:
    """Why times of some of the series are not those of real devices, each reason once."""
    return list(emulation_reasons(before=(reason for s in series for reason in s.emulation)))


def read_run(path: str | Path) -> Run:
    """Reads a run folder; one whose run was cut short will do, once it has finished an epoch.

    Raises:
        ConfigError: no such folder, not that of a run, nothing in it yet, or a file that cannot be read.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        problem = "is not the folder of a run (no config.yaml)" if folder.is_dir() else "does not exist"
        raise ConfigError("RUN", str(path), problem, "give the run.dir of a run")
    settings = flat(_read(folder / "config.yaml", _yaml))
    if "algorithm.name" not in settings:
        problem = "names no training method, so it is not that of a run"
        raise ConfigError("RUN", str(folder / "config.yaml"), problem, "leave the run out")
    rows = _read(folder / METRICS, _rows)
    if not rows:
        raise ConfigError("RUN", str(path), "has not finished an epoch", "wait for it, or leave it out")
    plan = _read(folder / "plan.json", _mapping)
    summary, trace = (_read(folder / name, _mapping) if (folder / name).exists() else None for name in (SUMMARY, TRACE))
    evaluations = _read(folder / EVALUATIONS, _rows) if (folder / EVALUATIONS).exists() else []
    return Run(folder, settings, rows, plan, summary, trace, evaluations)


def group(runs: Sequence[Run]) -> list[Series]:
    """Puts runs together that differ only in the seed (and in where they lie), and names each group.

    A name is the method, followed by what sets it apart from the others of the same method.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_setup(run), sort_keys=True, default=str), []).append(run)
    methods = [members[0].method for members in groups.values()]
    series = []
    for members in groups.values():
        method = members[0].method
        rivals = [m[0] for m in groups.values() if m[0].method == method]
        parts = [] if methods.count(method) == 1 else [
            f"{key.split('.', 1)[1]}={shown(members[0].settings.get(key))}" for key in differing(rivals)
        ]
        series.append(Series(" ".join([method, *parts]), tuple(members)))
    return series


def differing(runs: Sequence[Run]) -> list[str]:
    """The dotted keys in which some of the runs differ, those of the section ``run`` aside."""
    setups = [_setup(run) for run in runs]
    keys = dict.fromkeys(key for setup in setups for key in setup)
    return [key for key in keys if len({json.dumps(setup.get(key), default=str) for setup in setups}) > 1]


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys: section.key, and all the way down in the device classes.

    Elsewhere a mapping may stand where others have a number (``train.tau``), and is one value.
    """
    result: dict[str, Any] = {}
    for name, value in content.items():
        inner = isinstance(value, Mapping) and (not prefix or prefix.startswith("cluster."))
        result |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return result


def shown(value: Any) -> str:
    """A setting as it is written on a command line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {shown(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _setup(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if not key.startswith("run.")}


def _yaml(text: str) -> Any:
    content = OmegaConf.create(text)
    if not OmegaConf.is_dict(content):
        raise ValueError("it is no mapping")
    return OmegaConf.to_container(content)


def _rows(text: str) -> list[Any]:
    return [_mapping(line) for line in text.splitlines()]


def _mapping(text: str) -> Any:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is no mapping")
    return content


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError("RUN", str(path.parent), f"lacks {path.name}", "leave the run out") from error
    except Exception as error:  # whatever a parser finds in a file that was cut off or edited
        problem = f"cannot be read: {type(error).__name__}: {error}"
        raise ConfigError("RUN", str(path), problem, "leave the run out, or run it anew") from error


def own_metrics(series: Sequence[Series]) -> list[str]:
    """Return the names of what was evaluated beside loss and accuracy."""
    names = dict.fromkeys(name for s in series for run in s.runs for row in run.rows for name in row)
    return [name.removeprefix("eval_") for name in names
            if name.startswith("eval_") and name not in ("eval_loss", "eval_accuracy")]
