"""Other hosts: which they are, and that nothing of a job is left on them."""

from __future__ import annotations

import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from hvd_hetero.cluster.hosts import SSH, remote_command
from hvd_hetero.comm.kv_store import JOB
from hvd_hetero.config.schema import Config

SHELL_SEC = 15.0
"""For all that is done over one connection: a link may be cut after it was made."""
REAP_TIMES, REAP_PAUSE_SEC = 20, 0.1
NOTHING, KILL, TERM = 0, 9, 15
LEFT = "left:"
"""Says that a host has answered, before the processes that it still had."""


def remote_shell(config: Config) -> str:
    """Return what runs a command on another host: as configured, else ssh."""
    return config.cluster.remote_shell or SSH


def is_local(host: str) -> bool:
    """Whether this is the launcher's own machine."""
    if host in ("localhost", "127.0.0.1", socket.gethostname()):
        return True
    try:
        addresses = {item[4][0] for item in socket.getaddrinfo(host, None)}
        of_this_host = {item[4][0] for item in socket.getaddrinfo(socket.gethostname(), None)} | {"127.0.0.1", "::1"}
    except OSError:
        return False
    return bool(addresses & of_this_host)


def reap(job: str, hosts: Sequence[str], shell: str, grace_sec: float = 0.0) -> list[str]:
    """Kill whatever is left of a job on its hosts, stopped or not; return the hosts that do not answer.

    Args:
        shell: as of :func:`hvd_hetero.cluster.hosts.remote_command`.
        grace_sec: it is asked to end first, and has so long for it.
    """
    mark = shlex.quote(f"{JOB}={job}")
    # One grep for all processes; -z takes their environments apart.
    script = f'p=$(grep -lszxF {mark} /proc/[0-9]*/environ | cut -d/ -f3); [ -z "$p" ] || kill -%s $p; echo {LEFT} $p'
    patience = round(grace_sec / REAP_PAUSE_SEC)
    signals = [*([TERM] if patience else []), *[NOTHING] * (patience - 1), *[KILL] * REAP_TIMES]

    def answers(host: str) -> bool:
        local = is_local(host)
        for number in signals:
            words = script % number
            command = ["sh", "-c", words] if local else remote_command(shell, host, words)
            try:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SHELL_SEC)
            except (OSError, subprocess.TimeoutExpired):
                return False
            output = done.stdout.decode(errors="replace").splitlines()
            if not output or not output[-1].startswith(LEFT):
                return False
            if output[-1].strip() == LEFT:
                return True
            time.sleep(REAP_PAUSE_SEC)
        return True

    with ThreadPoolExecutor(max_workers=16) as pool:
        return [host for host, answered in zip(hosts, pool.map(answers, hosts), strict=True) if not answered]
