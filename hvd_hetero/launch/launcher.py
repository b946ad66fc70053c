"""``hvd-hetero launch``: checks everything on this machine, then builds the horovodrun line and runs it."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hvd_hetero import algorithms
from hvd_hetero.checkpoint import Store
from hvd_hetero.cluster.allocation import check_one_task, restarts
from hvd_hetero.cluster.device_classes import Cluster, assign
from hvd_hetero.cluster.hardware import RankFacts, limit_threads, local_facts
from hvd_hetero.comm.kv_store import TRIED
from hvd_hetero.config.load import device_classes, load
from hvd_hetero.config.schema import AUTO, Config
from hvd_hetero.errors import EXIT_STOPPED, ConfigError, nearest
from hvd_hetero.files import check_writable
from hvd_hetero.launch.environment import as_ranks, check_secrets, for_ranks
from hvd_hetero.launch.horovodrun import End
from hvd_hetero.launch.hosts import allocation, job_hosts, settings_of, settled
from hvd_hetero.launch.program import command_line, run_and_explain
from hvd_hetero.launch.remote import is_local, remote_shell
from hvd_hetero.launch.supervisor import Supervisor, check_options
from hvd_hetero.log import LOGGER
from hvd_hetero.planning.speed_profile import check_profile, load_profile
from hvd_hetero.telemetry.run_folder import check_run_dir
from hvd_hetero.training import dry_run, startup
from hvd_hetero.training.api import run_dir
from hvd_hetero.training.resume import difference
from hvd_hetero.training.stop_request import STOP
from hvd_hetero.training.survivor import adopt
from hvd_hetero.worker.memory import release

TRYING = "reading data and model, and trying out one step on two samples"
LOG = "horovodrun.log"
"""In the run's folder: what horovodrun itself said of jobs that failed; ranks' output is passed on."""
SURVIVOR_SEC = 5.0
"""As horovodrun gives those on its own host."""


def launch(
    files: Sequence[str], overrides: Sequence[str], show: bool, max_restarts: int = 0, min_ranks: int | None = None
) -> int:
    """Runs a job and returns its exit status, one of :mod:`hvd_hetero.errors`.

    Args:
        show: only print the horovodrun line.
        max_restarts: how often to start it again, from its newest checkpoint, when it fails.
        min_ranks: of a restarted job, where hosts do not answer any more.

    Raises:
        ConfigError: found wrong before any worker was started.
    """
    config, chosen = placed(files, overrides)
    configured, hosts = read(files, overrides), job_hosts(config)
    check_options(max_restarts, min_ranks, sum(slots for _, slots in hosts))
    folder = run_dir(config)
    check_run_dir(folder, config.run.overwrite or config.run.resume is not None)
    if not show:
        LOGGER.info(TRYING)
        preflight(config, hosts)
    chosen += [f"run.dir={folder}"] if config.run.dir is None else []
    if show:
        print(shlex.join(horovodrun_line(config, hosts, ["train", *files, *chosen])))
        return 0
    saves = config.checkpoint.every_sec is not None or config.checkpoint.every_rounds is not None

    def check(settings: Sequence[str]) -> tuple[Config, list[tuple[str, int]]]:
        again = read(files, [*chosen, *settings])
        here = job_hosts(again)
        expected_cluster(again, here)  # all else is as it was when the job was first started
        return again, here

    def start(settings: Sequence[str]) -> End:
        again, here = check(settings)
        if not settings:
            (folder / STOP).unlink(missing_ok=True)
        command = horovodrun_line(again, here, ["train", *files, *chosen, *settings])
        end = _run(again, command, here, folder / STOP if saves else None)
        if end.status not in (0, EXIT_STOPPED) and folder.is_dir() and end.log:
            with suppress(OSError), open(folder / LOG, "a") as file:
                file.write(f"{end.log}\n")
        if end.status != 0 and again.checkpoint.memory_sec is not None:
            adopt(folder, again, training_ranks(again, here))
        return end

    def look() -> list[tuple[str, int]]:
        found = allocation(configured)
        return hosts if found is None else list(found.hosts)

    return Supervisor(start, config, hosts, folder, max_restarts, min_ranks, look, check).run()


def run_job(command: str, files: Sequence[str], overrides: Sequence[str]) -> int:
    """Runs a command other than ``train`` on all ranks; returns its exit status as :func:`launch`.

    Raises:
        ConfigError: as :func:`launch`.
    """
    config, chosen = placed(files, overrides, trains=False)
    hosts = job_hosts(config)
    LOGGER.info(TRYING)
    preflight(config, hosts, trains=False)
    return _run(config, horovodrun_line(config, hosts, [command, *files, *chosen]), hosts).status


def placed(files: Sequence[str], overrides: Sequence[str], trains: bool = True) -> tuple[Config, list[str]]:
    """The configuration of a job with its hosts, and all settings that ranks need for it beside the files.

    A job that trains and that Slurm has put back into its queue resumes.

    Raises:
        ConfigError: as :func:`read` and :func:`hvd_hetero.launch.hosts.settled`, or this is one launcher of several.
    """
    check_one_task(os.environ)
    config, chosen = read(files, overrides), list(overrides)
    if (there := settled(config)) is not config:
        print(f"hvd-hetero: hosts from {allocation(config) or 'this machine'}", file=sys.stderr, flush=True)
        chosen += settings_of(there)
    if trains and config.run.resume is None and (times := restarts(os.environ)) > 0:
        print(f"hvd-hetero: run.resume=auto, since SLURM_RESTART_COUNT={times}", file=sys.stderr, flush=True)
        chosen.append("run.resume=auto")
    return read(files, chosen), chosen


def read(files: Sequence[str], overrides: Sequence[str]) -> Config:
    """The configuration as ranks will read it, with no more of the environment than they have.

    Raises:
        ConfigError: as :func:`hvd_hetero.config.load.load`.
    """
    config = load(files, overrides, algorithms.method)
    with as_ranks(config):
        return load(files, overrides, algorithms.method)


def _run(config: Config, line: Sequence[str], hosts: Sequence[tuple[str, int]], stop: Path | None = None) -> End:
    release()  # what the dry run had on a GPU is for the ranks
    grace_sec = 0.0 if config.checkpoint.memory_sec is None else SURVIVOR_SEC
    return run_and_explain(line, hosts, remote_shell(config), {**for_ranks(config), TRIED: "1"}, stop, grace_sec)


def preflight(config: Config, hosts: Sequence[tuple[str, int]], trains: bool = True) -> None:
    """Tries out, on this machine, what every rank will do before it connects, so that mistakes cost no start.

    It sees of the environment what ranks will see.

    Args:
        trains: whether the job is to train, and so to find the files that it needs for that.

    Raises:
        ConfigError: as :func:`hvd_hetero.training.startup.start`.
    """
    _check_places(config, hosts, trains)
    limit_threads()
    local = all(is_local(host) for host, _ in hosts)
    if not local:
        check_secrets(config)
    with as_ranks(config):
        parts = dry_run.build(config)
        cluster = expected_cluster(config, hosts)
        if cluster is not None:
            startup.check(config, parts, cluster)
            if trains and config.profile.file is not None:
                profile = load_profile(Path(config.profile.file))
                if local:  # else only the hosts themselves can say whether it fits
                    check_profile(profile, config, cluster)


def _check_places(config: Config, hosts: Sequence[tuple[str, int]], trains: bool) -> None:
    """Makes sure of what the job is to write and to be resumed from, and that the network interfaces are there."""
    if trains and is_local(hosts[0][0]):  # where rank 0 is
        check_writable("run.dir", run_dir(config))
    if trains and config.run.resume == AUTO and config.run.dir is not None and is_local(hosts[0][0]):
        newest = Store(config.run.dir).latest()
        other = None if newest is None else difference(newest, config, training_ranks(config, hosts))
        if other is not None:
            raise other
    if not trains and config.profile.file is not None:
        check_writable("profile.file", Path(config.profile.file).parent)
    wanted, known = config.cluster.network_interface, [name for _, name in socket.if_nameindex()]
    for name in [] if wanted is None else wanted.split(","):
        if name not in known:
            problem = f"this machine has no {name!r}, and the launcher listens on it too"
            raise ConfigError("cluster.network_interface", wanted, problem, nearest(name, known))


def expected_cluster(config: Config, hosts: Sequence[tuple[str, int]]) -> Cluster | None:
    """The device classes as far as this machine can tell; None where only the hosts themselves know.

    Raises:
        ConfigError: the classes do not fit the ranks.
    """
    here = local_facts(0, "localhost", 0)
    facts: list[RankFacts] = []
    for host, slots in hosts:
        # What a remote host has is found out by its own ranks; here it is given the benefit of the doubt.
        gpus = here.gpus if is_local(host) else ("unknown",) * slots
        facts += [replace(here, rank=len(facts) + i, host=host, local_rank=i, gpus=gpus) for i in range(slots)]
    if config.cluster.classes == AUTO and not all(is_local(host) for host, _ in hosts):
        return None
    classes = AUTO if config.cluster.classes == AUTO else device_classes(config.cluster.classes)
    return assign(classes, facts, config.cluster.share_gpus)


def training_ranks(config: Config, hosts: Sequence[tuple[str, int]]) -> int:
    """Return the number of ranks that train, and so are saved: all but helpers."""
    cluster = expected_cluster(config, hosts)
    return sum(slots for _, slots in hosts) if cluster is None else cluster.size


def horovodrun_line(config: Config, hosts: Sequence[tuple[str, int]], arguments: Sequence[str]) -> list[str]:
    """The command that starts the job; ``arguments`` are those of ``hvd-hetero`` on every rank."""
    return command_line(config.cluster, hosts, [sys.executable, "-m", "hvd_hetero", *arguments])


def thread_variables() -> dict[str, str]:
    """The environment's say in how many threads there are and where they run."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HOROVOD_THREAD_AFFINITY")
    return {name: os.environ[name] for name in names if name in os.environ}
