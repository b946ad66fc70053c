"""Check a comparison before anything runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hvd_hetero import algorithms
from hvd_hetero.analysis.compare.spec import Comparison, Row
from hvd_hetero.config.schema import Config
from hvd_hetero.errors import ConfigError
from hvd_hetero.launch.environment import as_ranks
from hvd_hetero.launch.hosts import job_hosts
from hvd_hetero.launch.launcher import expected_cluster
from hvd_hetero.planning.stop_criteria import check_limits, fast_steps
from hvd_hetero.training import dry_run, startup
from hvd_hetero.worker.components import Components


@dataclass(frozen=True)
class Checked:
    """A row, its configuration with the first seed, and the local steps of a fast rank between two averages.

    Attributes:
        steps: None where only the hosts themselves can tell.
    """

    row: Row
    config: Config
    steps: int | None


def check(comparison: Comparison) -> None:
    """Tries out every row on this machine, and makes sure that the rows of a workload can share their budget.

    Raises:
        ConfigError: naming the row and the key.
    """
    for rows in comparison.workloads().values():
        built: dict[str, Components] = {}
        checked = [_check_row(row, comparison, built) for row in rows]
        _check_same(checked)
        _check_budget(checked)


def _check_row(row: Row, comparison: Comparison, built: dict[str, Components]) -> Checked:
    """Builds what the row trains, or takes what another row has built, and asks its method for a plan."""
    config = row.config(comparison.seeds[0], comparison.folder, None)
    try:
        hosts = job_hosts(config)
        key = _content(config)
        if key not in built:
            with as_ranks(config):
                built[key] = dry_run.build(config)
        cluster = expected_cluster(config, hosts)
        if cluster is None:
            return Checked(row, config, None)
        startup.check(config, built[key], cluster)
        method = algorithms.policy(config, cluster, len(built[key].dataset.train), built[key].min_batch)
        if method.needs_average_sec:  # how long a round is will be known once it is measured
            if row.budget.equal == "fast_steps":
                problem = "is not known before it is measured, and rows of equal steps have to stop at a round's end"
                raise ConfigError("train.tau", config.train.tau, problem, "give a number, or other budgets")
            return Checked(row, config, None)
        if method.derives_tau:
            return Checked(row, config, int(config.train.tau))  # derived: tau is the fastest class's
        plan = method.make_plan(None)
        check_limits(config.train, plan)
        return Checked(row, config, fast_steps(plan))
    except ConfigError as error:
        raise row.complaint(error) from error


def _content(config: Config) -> str:
    """What the trained objects are made from, as a key."""
    train = dataclasses.asdict(config.train)
    used = {name: train[name] for name in train if name.startswith(("loss", "optimizer", "scheduler", "groups"))}
    return json.dumps([dataclasses.asdict(config.data), dataclasses.asdict(config.model), used, config.eval.metrics],
                      sort_keys=True, default=str)


def _check_same(checked: Sequence[Checked]) -> None:
    """Rows that train on different data, or are judged by different figures, belong into different workloads."""
    first = checked[0]
    for other in checked[1:]:
        for key, mine, theirs in (
            ("data", first.config.data, other.config.data),
            ("eval.metrics", first.config.eval.metrics, other.config.eval.metrics),
        ):
            if mine != theirs:
                problem = f"differs from that of row {first.row.name!r}, and the table would compare them"
                raise ConfigError(f"row {other.row.name!r}: {key}", theirs, problem, "make them workloads of their own")


def _check_budget(checked: Sequence[Checked]) -> None:
    """Rows can share steps only where a step of theirs is the same amount of work, and each can stop there."""
    if checked[0].row.budget.equal != "fast_steps":
        return
    sizes = {c.row.name: c.config.train.batch_size for c in checked if isinstance(c.config.train.batch_size, int)}
    for name, size in sizes.items():
        first = next(iter(sizes))
        if size != sizes[first]:
            problem = f"a step of row {first!r} has {sizes[first]} samples, so equal steps are not equal work"
            remedy = "set budget.equal=samples or wall_clock"
            raise ConfigError(f"row {name!r}: train.batch_size", size, problem, remedy)
    multiple = math.lcm(*(c.steps for c in checked if c.steps is not None))
    for c in checked:
        limit = c.row.limit()
        if limit is not None and c.steps is not None and limit % c.steps:
            problem = f"row {c.row.name!r} averages every {c.steps} fast steps, and cannot stop after {limit:g}"
            remedy = f"give a multiple of {multiple}, such as {max(multiple, round(limit / multiple) * multiple)}"
            raise ConfigError("budget.amount", c.row.budget.amount, problem, remedy)
