"""Read a comparison file. All rows of a workload get the same budget; a run is one row with one seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from hvd_hetero import algorithms
from hvd_hetero.analysis.report.write import slug
from hvd_hetero.config.load import load, read_mapping, typed
from hvd_hetero.config.overrides import parse_override
from hvd_hetero.config.schema import Config
from hvd_hetero.errors import ConfigError, nearest
from hvd_hetero.launch.hosts import settled

LIMITS = {"fast_steps": "train.max_fast_steps", "samples": "train.max_samples", "wall_clock": "train.max_train_sec"}
"""What rows may share, and the setting that ends a run there."""

EPOCHS = ("milestones", "step_size", "T_max", "total_iters")
"""Arguments of torch's learning-rate schedulers that count epochs."""

OURS = {"run.dir", "run.seed", "run.overwrite", "run.resume", "run.name"}
"""Settings that the comparison makes for each run."""

PARTS = ("compare", "seeds", "budget", "base", "overrides", "workloads", "rows")


@dataclass(frozen=True)
class Settings:
    """Section ``compare``.

    Attributes:
        dir: where everything goes; None: ``runs/compare-`` and the file's name.
        baseline: label of the row that speeds are measured against; None: the first sync_sgd of all ranks.
        timeout_sec: a run that takes longer counts as failed.
        jobs: runs at once, each on cores of its own.
        share_cores: whether more may run at once than there are cores for.
    """

    dir: Optional[str] = None  # noqa: UP045
    title: Optional[str] = None  # noqa: UP045
    baseline: Optional[str] = None  # noqa: UP045
    timeout_sec: Optional[float] = field(default=None, metadata={"above": 0})  # noqa: UP045
    jobs: int = field(default=1, metadata={"at_least": 1})
    share_cores: bool = False


@dataclass(frozen=True)
class Budget:
    """Section ``budget``.

    Attributes:
        equal: what all rows get the same amount of.
        amount: local steps of a fast rank, samples of all ranks, or seconds of training; None: what the first row
            takes for its ``train.epochs``, with the same seed.
    """

    equal: str = field(default="fast_steps", metadata={"choices": tuple(LIMITS)})
    amount: Optional[float] = field(default=None, metadata={"above": 0})  # noqa: UP045


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        workload: its name; empty where there is only one.
        files: configuration files, then ``overrides``, dotted keys in the order in which they apply.
        times: the row gets this many times the budget, and its learning-rate schedule is stretched as much.
        leads: whether it sets the budget of its workload.
    """

    workload: str
    label: str
    files: tuple[Path, ...]
    overrides: Mapping[str, Any]
    budget: Budget
    times: float
    leads: bool

    @property
    def name(self) -> str:
        return f"{self.workload}: {self.label}" if self.workload else self.label

    def config(self, seed: int, folder: Path, amount: float | None) -> Config:
        """The configuration of a run.

        Args:
            amount: of the budget, as the row that leads took it; not looked at where the budget has one itself.

        Raises:
            ConfigError: as :func:`hvd_hetero.config.load.load` and :func:`hvd_hetero.launch.hosts.settled`, with the
                row's name before the key.
        """
        limit = self.limit(amount)
        of_run: dict[str, Any] = {"run.seed": seed, "run.dir": str(folder), "run.overwrite": True}
        if limit is not None:
            of_run |= {"train.epochs": None, LIMITS[self.budget.equal]: limit}
        elif not self.leads:
            of_run["train.epochs"] = 1  # the budget is not known yet: this is to be checked, not run
        try:
            config = load(self.files, layered(self.overrides, of_run), algorithms.method)
            if self.times != 1 and config.train.scheduler_args:
                of_run["train.scheduler_args"] = _stretched(config.train.scheduler_args, self.times)
                config = load(self.files, layered(self.overrides, of_run), algorithms.method)
            return settled(config)
        except ConfigError as error:
            raise self.complaint(error) from error

    def limit(self, amount: float | None = None) -> float | None:
        """What ends the row's runs: an integer for steps and samples; None where its epochs do, or it is not known."""
        amount = self.budget.amount if self.budget.amount is not None else amount
        if amount is None:
            return None
        return amount * self.times if self.budget.equal == "wall_clock" else round(amount * self.times)

    def complaint(self, error: ConfigError) -> ConfigError:
        """The same error, saying which row has it."""
        return ConfigError(f"row {self.name!r}: {error.key}", error.value, error.problem, error.remedy)


@dataclass(frozen=True)
class Comparison:
    """A comparison file, read; rows of the same workload are neighbours."""

    settings: Settings
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    folder: Path
    title: str

    def workloads(self) -> dict[str, list[Row]]:
        """The rows by workload."""
        result: dict[str, list[Row]] = {}
        for row in self.rows:
            result.setdefault(row.workload, []).append(row)
        return result

    def baseline(self, workload: str) -> Row | None:
        """The row that speeds of a workload are measured against, if there is one."""
        rows = self.workloads()[workload]
        if self.settings.baseline is not None:
            return next(row for row in rows if row.label == self.settings.baseline)
        for row in rows:
            algorithm = row.config(0, self.folder, None).algorithm
            if algorithm.name == "sync_sgd" and getattr(algorithm, "participants", "all") == "all":
                return row
        return None


def read(path: Path, overrides: Sequence[str]) -> Comparison:
    """Reads a comparison file.

    Args:
        overrides: ``key=value`` for ``compare.*``, ``budget.*``, ``seeds`` and ``base``; every other key is a setting
            of all runs, which only a row itself wins over.

    Raises:
        ConfigError: an unknown key, a wrong type, rows without labels of their own, nothing to compare.
    """
    content = read_mapping(path)
    for key in content:
        if key not in PARTS:
            raise ConfigError(str(key), content[key], "is not part of a comparison", nearest(str(key), PARTS))
    parsed = dict(parse_override(text) for text in overrides)
    ours = {key: value for key, value in parsed.items() if key.split(".")[0] in PARTS}
    settings = _section("compare", Settings(), content, ours)
    seeds = _seeds(ours.pop("seeds", content.get("seeds", [0])))
    base = ours.pop("base", content.get("base"))
    for key, value in ours.items():
        if not key.startswith("budget."):
            raise ConfigError(key, value, "cannot be set here", "change it in the file")
    theirs = {key: value for key, value in parsed.items() if key.split(".")[0] not in PARTS}
    listed = content.get("rows")
    if isinstance(listed, str):
        listed = read_mapping(path.parent / listed).get("rows")
    workloads = _mapping("workloads", content.get("workloads")) or {"": {}}
    rows: list[Row] = []
    for name, workload in workloads.items():
        where = f"workloads.{name}" if name else ""
        workload = _mapping(where, workload)
        _known(where, workload, ("base", "overrides", "budget"))
        budget = _section("budget", Budget(), {"budget": _budget(content, workload, parsed)}, {})
        files = _files(path.parent, workload.get("base", base))
        shared = layered(_overrides("overrides", content), _overrides(f"{where}.overrides", workload), theirs)
        rows += _rows(listed, str(name), files, shared, budget)
    if settings.baseline is not None and settings.baseline not in (row.label for row in rows):
        labels = list(dict.fromkeys(row.label for row in rows))
        raise ConfigError("compare.baseline", settings.baseline, "is no row", nearest(settings.baseline, labels))
    for row in rows:
        for key in sorted(OURS & row.overrides.keys()):
            where = f"row {row.name!r}: {key}"
            raise ConfigError(where, row.overrides[key], "is the comparison's own", "set seeds or compare.dir instead")
        twins = [other.name for other in rows if slug(other.name) == slug(row.name) and other is not row]
        if twins:
            raise ConfigError("rows", row.name, f"and {twins[0]!r} would share a folder", "make the labels differ more")
    folder = Path(settings.dir) if settings.dir is not None else Path("runs") / f"compare-{path.stem}"
    return Comparison(settings, seeds, tuple(rows), folder, settings.title or path.stem)


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of several layers; a later one's keys come later, so that they apply on top."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            result.pop(key, None)
            result[key] = value
    return result


def _stretched(arguments: Mapping[str, Any], times: float) -> dict[str, Any]:
    """Return a scheduler's arguments for a run n times as long: what is counted in epochs grows with it."""
    result = dict(arguments)
    for key in EPOCHS:
        value = result.get(key)
        if isinstance(value, list):
            result[key] = [round(epoch * times) for epoch in value]
        elif value is not None:
            result[key] = round(value * times)
    return result


# ---- parts of the file ----------------------------------------------------------------------------------------------


def _rows(content: Any, workload: str, files: tuple[Path, ...], shared: Mapping[str, Any], budget: Budget) -> list[Row]:
    if not isinstance(content, list) or not content:
        raise ConfigError("rows", content, "is not a list of rows", "write - {label: ..., method: ..., overrides: ...}")
    if budget.amount is not None and "train.epochs" in shared:
        remedy = "leave one of them out (budget.amount=null: as much as the first row takes)"
        raise ConfigError("train.epochs", shared["train.epochs"], "budget.amount ends the runs already", remedy)
    rows: list[Row] = []
    for i, item in enumerate(content):
        where = f"rows[{i}]"
        item = _mapping(where, item)
        _known(where, item, ("label", "method", "overrides", "times"))
        method = {} if item.get("method") is None else {"algorithm.name": str(item["method"])}
        label = str(item.get("label") or item.get("method") or "")
        times = item.get("times", 1)
        if not label:
            raise ConfigError(where, item, "has no label", "give it one, or a method")
        if label in (row.label for row in rows):
            raise ConfigError(f"{where}.label", label, "is another row's too", "give each row a label of its own")
        if isinstance(times, bool) or not isinstance(times, (int, float)) or times <= 0:
            raise ConfigError(f"{where}.times", times, "is no share of the budget", "give a number above 0")
        overridden = _overrides(f"{where}.overrides", item)
        leads = not rows and budget.amount is None
        if "train.epochs" in overridden and not leads:
            remedy = "say times, a share of the budget, instead"
            raise ConfigError(f"{where}.train.epochs", overridden["train.epochs"], "the budget ends this row", remedy)
        if leads and times != 1:
            raise ConfigError(f"{where}.times", times, "is on the row that sets the budget", "set budget.amount")
        overrides = layered(shared, method, overridden)
        rows.append(Row(workload, label, files, overrides, budget, float(times), leads))
    return rows


def _overrides(where: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as dotted keys; a whole section may be written as a mapping."""
    result: dict[str, Any] = {}
    for key, value in _mapping(where, content.get("overrides")).items():
        section = isinstance(value, Mapping) and "." not in key
        result |= {f"{key}.{inner}": x for inner, x in value.items()} if section else {key: value}
    return result


def _budget(content: Mapping[str, Any], workload: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    of_budget = {key.split(".", 1)[1]: value for key, value in settings.items() if key.startswith("budget.")}
    return {**_mapping("budget", content.get("budget")), **_mapping("budget", workload.get("budget")), **of_budget}


def _section(name: str, schema: Any, content: Mapping[str, Any], settings: dict[str, Any]) -> Any:
    """Fills a schema from the file's section and from dotted keys, which are taken out of ``given``."""
    known = [item.name for item in dataclasses.fields(schema)]
    values = _mapping(name, content.get(name))
    for key in [key for key in settings if key.startswith(f"{name}.")]:
        values[key.split(".", 1)[1]] = settings.pop(key)
    _known(name, values, known)
    return typed(f"{name}.", schema, {**dataclasses.asdict(schema), **values})


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = value if isinstance(value, list) else [value]
    if not seeds or any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in seeds):
        raise ConfigError("seeds", value, "is not a list of seeds", "give whole numbers of 0 or more, seeds: [0, 1]")
    if len(set(seeds)) < len(seeds):
        raise ConfigError("seeds", value, "names one twice", "name each once")
    return tuple(seeds)


def _files(folder: Path, base: Any) -> tuple[Path, ...]:
    names = [] if base is None else base if isinstance(base, list) else [base]
    return tuple(folder / str(name) for name in names)


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(where, value, "is not a mapping", "write keys and values")
    return dict(value)


def _known(where: str, content: Mapping[str, Any], names: Sequence[str]) -> None:
    for key in content:
        if key not in names:
            raise ConfigError(f"{where}.{key}", content[key], "is not a known key", nearest(str(key), names))
