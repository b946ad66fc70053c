"""Find the hosts that a scheduler has given to a job, from its variables and files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_hetero.cluster.hosts import Host, expand, is_script, listed, merged, read_host_file, run_host_script
from hvd_hetero.config.schema import AUTO
from hvd_hetero.errors import ConfigError
from hvd_hetero.secrets import is_secret

Env = Mapping[str, str]
HOST_FILE = "HVD_HETERO_HOSTFILE"
MPI_HOST_FILE = Path("/etc/mpi/hostfile")
"""Where the MPI Operator and Kubeflow put a launcher's host file."""
MPI_VARIABLES = ("OMPI_MCA_orte_default_hostfile", "I_MPI_HYDRA_HOST_FILE", "HYDRA_HOST_FILE")
INTERACTIVE_STEP = "4294967290"
"""Slurm's number of the step in which a salloc on the first node runs its shell: it is that of the job."""
TASK = "SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_NTASKS SLURM_NPROCS SLURM_STEP_ID SLURM_STEPID"
"""Each rank is a step of its own, and by these libraries would take every one for the first. (The signal before a time
limit goes to all processes of a step: it is for the rank, and would end the rank's shell.)"""
REMEDY = "set cluster.hosts=host:slots,... yourself"


@dataclass(frozen=True)
class Allocation:
    """What a job has been given.

    Attributes:
        scheduler: what gave it.
        source: the variable or file that tells of the slots.
        hosts: and their slots in the order of ranks, each host once.
        shell: what runs a command on one of them, see :func:`hvd_hetero.cluster.hosts.remote_command`; None: ssh.
        components: the ranks of each component of a heterogeneous Slurm job; none of any other.
    """

    scheduler: str
    source: str
    hosts: tuple[Host, ...]
    shell: str | None = None
    components: tuple[tuple[int, ...], ...] = ()

    @property
    def slots(self) -> int:
        return sum(slots for _, slots in self.hosts)

    def __str__(self) -> str:
        counts = f"{self.slots} slot{'s' * (self.slots != 1)} on {len(self.hosts)} host{'s' * (len(self.hosts) != 1)}"
        counts += f" in {len(self.components)} components" if self.components else ""
        return f"{self.scheduler} ({self.source}), {counts}: {listed(self.hosts)}"


def find(hosts: str | None, env: Env) -> Allocation | None:
    """Return what ``cluster.hosts`` leaves to a host file or a script (a path, with a /) or to a scheduler (``auto``).

    ``auto`` takes the first of these that is there: the host file that ``HVD_HETERO_HOSTFILE`` names, Slurm, LSF, PBS,
    Grid Engine, OAR, the host file of the MPI Operator or Kubeflow, SkyPilot.

    Args:
        env: the environment of the launcher.

    Returns:
        None where the setting lists the hosts, or nothing gives any, and the job is to run on this machine.

    Raises:
        ConfigError: a file or variable that cannot be read, naming it.
    """
    if hosts is not None and "/" in hosts:
        kind, ask = ("script", run_host_script) if is_script(Path(hosts)) else ("host file", read_host_file)
        return Allocation(kind, hosts, tuple(ask(Path(hosts), "cluster.hosts")))
    found = (read(env) for read in SOURCES) if hosts == AUTO else iter(())
    return next((each for each in found if each is not None), None)


def check_one_task(env: Env) -> None:
    """Refuse to launch from a step that runs the launcher several times.

    Raises:
        ConfigError: it does.
    """
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        problem = f"srun runs this launcher in {tasks} tasks, and each would start all ranks"
        remedy = "launch without srun, or with srun --overlap --ntasks=1"
        raise ConfigError("SLURM_STEP_NUM_TASKS", tasks, problem, remedy)


def restarts(env: Env) -> int:
    """Return how often Slurm has put this job back into its queue."""
    return int(env.get("SLURM_RESTART_COUNT") or 0)


# ---- sources --------------------------------------------------------------------------------------------------------


def _host_file(env: Env) -> Allocation | None:
    if not env.get(HOST_FILE):
        return None
    return Allocation("host file", env[HOST_FILE], tuple(read_host_file(Path(env[HOST_FILE]), HOST_FILE)))


def _slurm(env: Env) -> Allocation | None:
    if "SLURM_JOB_NODELIST" not in env and "SLURM_HET_SIZE" not in env:
        return None
    groups = [f"_HET_GROUP_{number}" for number in range(int(env.get("SLURM_HET_SIZE", 0)))]
    parts = [_slurm_nodes(env, group) for group in groups or [""]]
    hosts = tuple(merged(host for part in parts for host in part))
    srun = f"srun --jobid={env.get('SLURM_JOB_ID')} --overlap --nodes=1 --ntasks=1 --input=none --mpi=none --nodelist="
    run = f"""sh -c 'trap "" USR1; unset {TASK}; eval "$0"'"""
    if not groups:
        return Allocation("Slurm", "SLURM_TASKS_PER_NODE", hosts, f"{srun}{{host}} {run} {{command}}")
    homes = {host: number for number, part in reversed(list(enumerate(parts))) for host, _ in part}
    cases = " ".join(f"{host}) n={number};;" for host, number in homes.items())
    script = f'case $0 in {cases} esac; exec {srun}$0 --het-group=$n {run} "$1"'
    shell = f"sh -c {shlex.quote(script)} {{host}} {{command}}"
    return Allocation("Slurm", "SLURM_TASKS_PER_NODE_HET_GROUP_*", hosts, shell, _components(parts, hosts))


def _slurm_nodes(env: Env, group: str) -> list[Host]:
    """The nodes of a job, or of a component of a heterogeneous one, with a slot for each task."""
    names = _parsed(env, f"SLURM_JOB_NODELIST{group}", expand)
    tasks = _parsed(env, f"SLURM_TASKS_PER_NODE{group}", _counts)
    if env.get("SLURM_STEP_ID", INTERACTIVE_STEP) != INTERACTIVE_STEP or len(tasks) != len(names):
        # within a step that runs the launcher alone, the variable tells of that step
        cpus = int(env.get(f"SLURM_CPUS_PER_TASK{group}") or 1)
        tasks = [max(1, n // cpus) for n in _parsed(env, f"SLURM_JOB_CPUS_PER_NODE{group}", _counts)]
    if len(tasks) != len(names):
        node_list = env[f"SLURM_JOB_NODELIST{group}"]
        raise ConfigError(f"SLURM_JOB_NODELIST{group}", node_list, f"is {len(names)} nodes, not {len(tasks)}", REMEDY)
    return list(zip(names, tasks, strict=True))


def _counts(text: str) -> list[int]:
    """Slurm's ``2(x3),1``: two for each of three nodes, and one."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if match is None:
            raise ValueError(f"{part!r} is no count")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _components(parts: Iterable[Iterable[Host]], hosts: Iterable[Host]) -> tuple[tuple[int, ...], ...]:
    """The ranks of each component: on a host that several have, those of the first come first."""
    after, first = {}, 0
    for host, slots in hosts:
        after[host], first = first, first + slots
    components = []
    for part in parts:
        ranks: list[int] = []
        for host, slots in part:
            ranks += range(after[host], after[host] + slots)
            after[host] += slots
        components.append(tuple(ranks))
    return tuple(components)


def _lsf(env: Env) -> Allocation | None:
    if "LSB_JOBID" not in env:
        return None
    for name, parse in (("LSB_MCPU_HOSTS", _pairs), ("LSB_DJOB_HOSTFILE", _lines), ("LSB_HOSTS", str.split)):
        if env.get(name):
            hosts = _parsed(env, name, parse)
            break
    else:
        return None
    hosts = merged(host if isinstance(host, tuple) else (host, 1) for host in hosts)
    if "CSM_ALLOCATION_ID" in env:
        del hosts[0]  # with jsrun the job's script runs on a node of its own, which computes nothing
    return Allocation("LSF", name, tuple(hosts), f"{_carrying(env, 'LSB_', 'LSF_')} blaunch {{host}} {{command}}")


def _pbs(env: Env) -> Allocation | None:
    return _slot_lines("PBS", "PBS_NODEFILE", env)


def _grid_engine(env: Env) -> Allocation | None:
    if "PE_HOSTFILE" not in env:
        return None

    def parse(path: str) -> list[Host]:
        return [(words[0], int(words[1])) for words in map(str.split, _lines(path))]

    return Allocation("Grid Engine", "PE_HOSTFILE", tuple(merged(_parsed(env, "PE_HOSTFILE", parse))))


def _oar(env: Env) -> Allocation | None:
    return _slot_lines("OAR", "OAR_NODEFILE", env, f"{_carrying(env, 'OAR_')} oarsh {{host}} {{command}}")


def _mpi_operator(env: Env) -> Allocation | None:
    name = next((name for name in MPI_VARIABLES if env.get(name)), "K_MPI_JOB_ROLE")
    path = Path(env[name]) if name in MPI_VARIABLES else MPI_HOST_FILE
    if name not in MPI_VARIABLES and not path.is_file():
        return None
    agent = env.get("OMPI_MCA_plm_rsh_agent")  # of former versions, kubexec.sh, where pods have no sshd
    return Allocation("MPI Operator", str(path), tuple(read_host_file(path, name)), agent)


def _skypilot(env: Env) -> Allocation | None:
    if "SKYPILOT_NODE_IPS" not in env:
        return None
    slots = max(1, int(env.get("SKYPILOT_NUM_GPUS_PER_NODE") or 1))
    hosts = merged((host, slots) for host in _parsed(env, "SKYPILOT_NODE_IPS", str.split))
    return Allocation("SkyPilot", "SKYPILOT_NODE_IPS", tuple(hosts))


SOURCES: tuple[Callable[[Env], Allocation | None], ...] = (
    _host_file, _slurm, _lsf, _pbs, _grid_engine, _oar, _mpi_operator, _skypilot
)


# ---- what they have in common ---------------------------------------------------------------------------------------


def _slot_lines(scheduler: str, name: str, env: Env, shell: str | None = None) -> Allocation | None:
    """Of a file that has a line for each slot."""
    if name not in env:
        return None
    return Allocation(scheduler, name, tuple(merged((host, 1) for host in _parsed(env, name, _lines))), shell)


def _lines(path: str) -> list[str]:
    return [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]


def _pairs(text: str) -> list[Host]:
    words = text.split()
    return [(host, int(slots)) for host, slots in zip(words[::2], words[1::2], strict=True)]


def _parsed(env: Env, name: str, parse: Callable[[str], list[Any]]) -> list[Any]:
    """What a variable, or the file that it names, holds; something at least."""
    text = env.get(name, "")
    try:
        found = parse(text)
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(name, text, f"cannot be read ({error})", REMEDY) from error
    if not found:
        raise ConfigError(name, text, "names no host", REMEDY)
    return found


def _carrying(env: Env, *prefixes: str) -> str:
    """The beginning of a command that has these variables, which horovodrun does not get."""
    names = [name for name in env if name.startswith(prefixes) and not is_secret(name, env[name])]
    resolved = [name for name in names if "${" not in env[name]]  # such as a job's command: settings resolve it
    return shlex.join(["env", *(f"{name}={env[name]}" for name in resolved)])
