"""``hvd-hetero run``: a program of the user's own on every rank; and what is told of any job's start and end."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from hvd_hetero.cluster.hosts import SSH, Host, listed, parse_hosts
from hvd_hetero.config.schema import ClusterConfig
from hvd_hetero.errors import EXIT_BAD_INPUT, EXIT_STOPPED, UserError
from hvd_hetero.launch.horovodrun import End, Horovodrun
from hvd_hetero.launch.remote import is_local
from hvd_hetero.log import LOGGER

LEAVE_SEC = 1.0
"""Where a rank of a program fails, others fail of that, and may be the first whose end is seen; so all have a moment to
end by themselves, and tell which was the one. Ranks of ours wait for each other."""
MOST_NAMED = 4
"""Hosts; more are told by their number."""


def run(ranks: int | None, hosts: str | None, command: Sequence[str]) -> int:
    """Run a program on every rank; return the job's exit status, one of :mod:`hvd_hetero.errors`.

    Ranks have the whole environment, as under horovodrun, but for secrets in command lines.

    Args:
        ranks: None: one for each slot.
        hosts: ``host:slots,...``; None: this machine.

    Raises:
        UserError: found wrong before any rank was started.
    """
    if not command:
        raise UserError("PROGRAM='': there is nothing to run; give a command: hvd-hetero run -np 2 python my.py")
    if ranks is None and hosts is None:
        raise UserError("-np=None: says not how many ranks there are to be; give -np N or -H HOST:SLOTS,...")
    slots_by_host = parse_hosts(hosts, "-H") if hosts is not None else [("localhost", ranks or 0)]
    slots = sum(count for _, count in slots_by_host)
    if ranks is not None and not 1 <= ranks <= slots:
        raise UserError(f"-np={ranks}: the hosts have {slots} slots; give 1 to {slots}" if hosts is not None else
                        f"-np={ranks}: is below 1; give the number of ranks")
    places = first_slots(slots_by_host, ranks or slots)
    line = command_line(ClusterConfig(), places, command)
    return run_and_explain(line, places, SSH, os.environ, leave_sec=LEAVE_SEC).status


def first_slots(hosts: Sequence[Host], ranks: int) -> list[Host]:
    """Return as many slots as there are ranks, in the order of the hosts."""
    found: list[Host] = []
    for host, slots in hosts:
        taken = min(slots, ranks - sum(count for _, count in found))
        found += [(host, taken)] if taken else []
    return found


def run_and_explain(
    line: Sequence[str], hosts: Sequence[Host], shell: str, env: Mapping[str, str], stop: Path | None = None,
    grace_sec: float = 0.0, leave_sec: float = 0.0,
) -> End:  # fmt: skip
    """Run a line of horovodrun, and tell what is started and, as the last line, why it failed; see :class:`Horovodrun`.

    A rank's own line about bad input is left to be the last one, if it is.
    """
    LOGGER.info("starting %s", ranks_on(hosts))
    end = Horovodrun(line[1:], hosts, shell, env, stop, grace_sec, leave_sec).wait()
    if end.status not in (0, EXIT_STOPPED) and not (end.status == EXIT_BAD_INPUT and end.is_said):
        print(f"hvd-hetero: error: the job failed: {end.cause}", file=sys.stderr, flush=True)
    return end


def ranks_on(hosts: Sequence[Host]) -> str:
    """Tell how many ranks there are, and where."""
    names = list(dict.fromkeys(host for host, _ in hosts))
    where = ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} hosts"
    return f"{counted(sum(slots for _, slots in hosts))} on {where}"


def counted(count: int) -> str:
    """Return a number of ranks as a person says it."""
    return f"{count} rank{'s' * (count != 1)}"


def command_line(spec: ClusterConfig, hosts: Sequence[Host], command: Sequence[str]) -> list[str]:
    """Return the horovodrun line that runs a command on every rank."""
    beside = Path(sys.executable).with_name("horovodrun")
    program = str(beside) if beside.exists() else shutil.which("horovodrun") or "horovodrun"
    line = [program, "--gloo", "-np", str(sum(slots for _, slots in hosts)),
            "-H", listed(hosts),
            "--start-timeout", str(spec.start_timeout_sec),
            "--gloo-timeout-seconds", str(spec.gloo_timeout_sec),
            "--cycle-time-ms", f"{spec.cycle_time_ms:g}"]
    interface = spec.network_interface
    if interface is None and len(hosts) == 1 and not is_local(hosts[0][0]):
        # of one remote host Horovod takes any interface, the loopback too, by which it would not find the launcher
        interface = _interface_to(hosts[0][0])
    if interface is not None:
        line += ["--network-interfaces", interface]
    return [*line, *command]


def _interface_to(host: str) -> str | None:
    """The network interface of this machine from which another host is reached; None if it is none, or out of reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return None
        mine, other = probe.getsockname()[0], probe.getpeername()[0]
    if mine == other:
        return None
    found = (name for name, known in psutil.net_if_addrs().items() if any(a.address == mine for a in known))
    return next(found, None)
