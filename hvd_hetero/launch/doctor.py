"""``hvd-hetero doctor``: what this machine has, what Horovod was built with, whether a configuration can run here."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

import hvd_hetero
from hvd_hetero import algorithms
from hvd_hetero.cluster.allocation import find
from hvd_hetero.cluster.cgroups import cpu_limit, memory_limit
from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts, limit_threads, local_facts
from hvd_hetero.cluster.hosts import ranges
from hvd_hetero.comm.horovod_build import build_info
from hvd_hetero.comm.kv_store import exchange, job_env
from hvd_hetero.config.load import device_classes, load
from hvd_hetero.config.schema import AUTO, Config
from hvd_hetero.errors import EXIT_BAD_INPUT, UserError
from hvd_hetero.launch.environment import for_ranks, hidden
from hvd_hetero.launch.hosts import job_hosts, settled
from hvd_hetero.launch.launcher import preflight, thread_variables
from hvd_hetero.training import dry_run, startup

TIMEOUT_SEC = 60.0
MIN_SHARED_MEMORY_BYTES = 64 * 2**20


def doctor(files: Sequence[str], overrides: Sequence[str]) -> int:
    """Prints the findings; returns 0 if all is well (and the configuration, if one is given, can run), else 2."""
    limit_threads()
    env = job_env()
    if env.size > 1:
        facts = local_facts(env.rank, env.host, env.local_rank)
        reports = exchange(env, "doctor", {"facts": facts.to_dict(), **_rank_line(facts)}, TIMEOUT_SEC)
        problem = _configuration(files, overrides, [RankFacts.from_dict(other["facts"]) for other in reports])
        if env.rank == 0:
            print("\n".join(f"rank {rank}: {other['line']}" for rank, other in enumerate(reports)), flush=True)
            print(f"problem: {problem}" if problem else "configuration can run here", flush=True)
        return EXIT_BAD_INPUT if problem else 0
    problems = []
    for name, (text, problem) in _machine().items():
        print(f"{name:16} {text}")
        if problem:
            problems.append(f"{name}: {problem}")
    print(f"{'environment':16} {_environment(files, overrides)}")
    if files or overrides:
        problem = _configuration(files, overrides)
        print(f"{'configuration':16} {'can run here' if problem is None else 'cannot run here'}")
        problems += [problem] if problem else []
    for problem in problems:
        print(f"problem: {problem}")
    return EXIT_BAD_INPUT if problems else 0


def _machine() -> dict[str, tuple[str, str | None]]:
    """Each finding as a text and, if it stands in the way, what to do about it."""
    facts = local_facts(0, "localhost", 0)
    horovod = build_info()
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    why_none = f"none ({facts.gpu_problem})" if facts.gpu_problem else "none"  # a CPU host may have a torch for GPUs
    gpus = ", ".join(f"{i}: {name}" for i, name in enumerate(facts.gpus)) or why_none
    built = ", ".join(name for name in ("gloo", "mpi", "nccl") if horovod[name]) or "nothing"
    fixes = f"with this project's changes: {', '.join(horovod['fixes']) or 'none'}"
    found: dict[str, tuple[str, str | None]] = {
        "hvd-hetero": (hvd_hetero.__version__, None),
        "python": (f"{platform.python_version()} at {sys.executable}", None),
        "torch": (f"{torch.__version__} ({cuda})", None),
        "horovod": (
            f"{horovod['version']} built with {built}, {fixes}",
            None if horovod["gloo"] else "no Gloo: build it with scripts/setup",
        ),
        "gpus": (gpus, _gpu_problem(facts, horovod)),
        "cpu": (facts.cpu, None),
        "cores": (_cores(facts), None),
        "memory": (_memory(), None),
        "threads": (_thread_settings(), None),
        "shared memory": _shared_memory(),
        "horovodrun": _program("horovodrun", "install Horovod with scripts/setup", beside=True),
        "ssh": _program("ssh", None),
        "cluster": _allocation(),
    }
    return found


def _allocation() -> tuple[str, str | None]:
    """What cluster.hosts=auto would find."""
    try:
        return str(find(AUTO, os.environ) or "none: cluster.hosts=auto is this machine"), None
    except UserError as error:
        return "cannot be read", str(error)


def _rank_line(facts: RankFacts) -> dict[str, Any]:
    gpus = ", ".join(facts.gpus) or "none"
    horovod = build_info()
    parts = [
        f"host {facts.host}, local rank {facts.local_rank}",
        f"cores {_cores(facts)}",
        f"memory {_memory()}",
        f"gpus {gpus}",
        f"python {platform.python_version()}, torch {torch.__version__}",
        f"horovod {horovod['version']} with {', '.join(horovod['fixes']) or 'no fixes'}",
        f"threads {_thread_settings()}",
        f"shared memory {_shared_memory()[0]}",
    ]
    return {"line": ", ".join(parts)}


def _configuration(
    files: Sequence[str], overrides: Sequence[str], facts: Sequence[RankFacts] | None = None
) -> str | None:
    """What keeps the configuration from running: on the ranks with these facts, else on the hosts that it names."""
    try:
        config = load(files, overrides, algorithms.method)
        if facts is None:
            config = settled(config)
            preflight(config, job_hosts(config))
        elif files or overrides:
            classes = config.cluster.classes
            classes = classes if classes == AUTO else device_classes(classes)
            cluster = assign(classes, facts, config.cluster.share_gpus)
            startup.check(config, dry_run.build(config), cluster)
    except UserError as error:
        return str(error)
    return None


def _environment(files: Sequence[str], overrides: Sequence[str]) -> str:
    """Which of the variables that are set here ranks get from launch; names alone, since values may be secrets."""
    try:
        config = load(files, overrides, algorithms.method)
    except UserError:
        config = Config()
    passed_on, kept_back = ", ".join(sorted(for_ranks(config))), ", ".join(hidden(config))
    return f"ranks get {passed_on}; they do not get {kept_back or 'any other'}"


def _gpu_problem(facts: RankFacts, horovod: dict[str, Any]) -> str | None:
    if facts.gpus and not horovod["nccl"]:
        return "Horovod was built without NCCL, so no class can have several GPU ranks: run scripts/setup where nvcc is"
    return None


def _cores(facts: RankFacts) -> str:
    text, limit = f"{len(facts.cores)} of {os.cpu_count()}: {ranges(facts.cores)}", cpu_limit()
    if limit is None or facts.cpus is None:
        return text
    return f"{text}; at most {limit.value:g} at once ({limit.file}), so {facts.usable} in use, no rank bound to its own"


def _memory() -> str:
    text, limit = f"{psutil.virtual_memory().total / 2**30:.1f} GiB", memory_limit()
    return text if limit is None else f"{text}; at most {limit.value / 2**30:.2g} ({limit.file})"


def _thread_settings() -> str:
    variables = [f"{name}={value}" for name, value in thread_variables().items()]
    return ", ".join([f"torch {torch.get_num_threads()}", *variables])


def _shared_memory() -> tuple[str, str | None]:
    if not Path("/dev/shm").is_dir():
        return "no /dev/shm", None
    free = shutil.disk_usage("/dev/shm").free
    problem = f"less than {MIN_SHARED_MEMORY_BYTES >> 20} MiB: data workers need it (docker: --shm-size=1g)"
    return f"{free >> 20} MiB free", problem if free < MIN_SHARED_MEMORY_BYTES else None


def _program(name: str, remedy: str | None, beside: bool = False) -> tuple[str, str | None]:
    """A missing ssh is no problem on one host, so it has no remedy."""
    path = Path(sys.executable).with_name(name)
    found = str(path) if beside and path.exists() else shutil.which(name)
    return (found, None) if found else ("not found", remedy)
