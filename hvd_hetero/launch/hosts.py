"""Where a job runs: hosts as configured or given by a scheduler, and the device classes that follow from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hvd_hetero.cluster.allocation import Allocation, find
from hvd_hetero.cluster.device_classes import integers
from hvd_hetero.cluster.hardware import local_facts
from hvd_hetero.cluster.hosts import Host, listed, parse_hosts, ranges
from hvd_hetero.config.load import device_classes
from hvd_hetero.config.schema import AUTO, Config
from hvd_hetero.errors import ConfigError


def allocation(config: Config) -> Allocation | None:
    """Return what a scheduler or a host file gives the job, see :func:`hvd_hetero.cluster.allocation.find`."""
    return find(config.cluster.hosts, os.environ)


def settled(config: Config) -> Config:
    """Return the configuration with what ``cluster.hosts`` leaves to a host file or to a scheduler filled in.

    In a heterogeneous Slurm job, classes that say nothing of where their ranks are have one component each.

    Raises:
        ConfigError: naming what was read and is of no use, or too small for the classes.
    """
    allocated = allocation(config)
    if allocated is None:
        return replace(config, cluster=replace(config.cluster, hosts=None)) if config.cluster.hosts == AUTO else config
    classes = config.cluster.classes
    if classes != AUTO:
        classes = _by_component(classes, allocated)
        _check_size(classes, allocated)
    shell = config.cluster.remote_shell or allocated.shell
    return replace(
        config, cluster=replace(config.cluster, hosts=listed(allocated.hosts), classes=classes, remote_shell=shell)
    )


def settings_of(config: Config) -> list[str]:
    """Return where a job runs as settings, for its ranks and for what starts it again."""
    cluster = config.cluster
    values = {"hosts": cluster.hosts, "classes": cluster.classes, "remote_shell": cluster.remote_shell}
    return [f"cluster.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def job_hosts(config: Config) -> list[Host]:
    """Hosts and slots: as configured, else as many slots here as the classes name ranks (``auto``: one more than GPUs).

    Raises:
        ConfigError: a class names a rank beyond the slots, or nothing says how many ranks to start.
    """
    spec = config.cluster
    classes = {} if spec.classes == AUTO else device_classes(spec.classes)
    if spec.hosts is not None:
        return parse_hosts(spec.hosts)
    if spec.classes == AUTO:
        return [("localhost", len(local_facts(0, "localhost", 0).gpus) + 1)]
    if any(c.ranks is None for c in classes.values()):
        raise ConfigError("cluster.hosts", None, "classes are chosen by host, and no hosts are given",
                          "set cluster.hosts=host:slots,... or give ranks")
    ranks = [rank for name, c in classes.items() for rank in integers(f"cluster.classes.{name}.ranks", c.ranks)]
    return [("localhost", max(ranks, default=0) + 1)]


def _by_component(classes: Mapping[str, Any], allocated: Allocation) -> dict[str, Any]:
    """Classes with the ranks of their components, where none of them says which ranks it has."""
    placed = any(c.get(key) is not None for c in classes.values() for key in ("ranks", "hosts", "slots"))
    if placed or not allocated.components:
        return dict(classes)
    if len(classes) != len(allocated.components):
        problem = f"are {len(classes)} classes, and the job has {len(allocated.components)} components (SLURM_HET_SIZE)"
        remedy = "give a class for each component, in the same order, or cluster.classes=auto"
        raise ConfigError("cluster.classes", list(classes), problem, remedy)
    return {
        name: {**content, "ranks": ranges(ranks)}
        for (name, content), ranks in zip(classes.items(), allocated.components, strict=True)
    }


def _check_size(classes: Mapping[str, Any], allocated: Allocation) -> None:
    for name, c in device_classes(classes).items():
        ranks = [] if c.ranks is None else integers(f"cluster.classes.{name}.ranks", c.ranks)
        if max(ranks, default=0) >= allocated.slots:
            wanted = max(ranks) + 1
            problem = f"gives the job {allocated.slots} slots, and class {name} has rank {max(ranks)}"
            value = os.environ.get(allocated.source, listed(allocated.hosts))
            raise ConfigError(allocated.source, value, problem, f"ask for {wanted} slots (tasks), or name fewer ranks")
