"""Where the runs of a comparison go that are on their way at once: cores of their own on this machine."""

from __future__ import annotations

from hvd_hetero.analysis.compare.spec import Comparison
from hvd_hetero.cluster.hardware import local_facts
from hvd_hetero.config.load import device_classes
from hvd_hetero.config.schema import AUTO
from hvd_hetero.errors import ConfigError
from hvd_hetero.launch.hosts import job_hosts
from hvd_hetero.launch.remote import is_local

KEY = "compare.jobs"
FORCE = "compare.share_cores=true"


def places(comparison: Comparison) -> list[tuple[int, ...] | None]:
    """Return the cores of each run that goes at once, ``compare.jobs`` of them; None: wherever it may.

    Raises:
        ConfigError: runs would be in each other's way, and the figures of a table be those of a crowd.
    """
    jobs, shares = comparison.settings.jobs, comparison.settings.share_cores
    if jobs == 1:
        return [None]
    ranks = 1
    for row in comparison.rows:
        config = row.config(comparison.seeds[0], comparison.folder, None)
        hosts, classes = job_hosts(config), config.cluster.classes
        ranks = max(ranks, sum(slots for _, slots in hosts))
        problem = None
        if not all(is_local(host) for host, _ in hosts):
            problem = f"row {row.name!r} runs on other hosts, whose cores cannot be told apart here"
        elif classes == AUTO or any(c.device != "cpu" for c in device_classes(classes).values()):
            problem = f"row {row.name!r} is for GPUs, and its runs would share them"
        if problem is not None and not shares:
            raise ConfigError(KEY, jobs, problem, f"set 1, or {FORCE}")
    here = local_facts(0, "localhost", 0)
    if jobs * ranks <= here.usable:
        size = here.usable // jobs
        # a container that may have only some of its cores at once has none of its own
        return [here.cores[i * size : (i + 1) * size] if here.cpus is None else None for i in range(jobs)]
    if not shares:
        problem = f"runs of {ranks} ranks each take more than the {here.usable} cores here"
        raise ConfigError(KEY, jobs, problem, f"set {max(1, here.usable // ranks)} or less, or {FORCE}")
    return [None] * jobs
