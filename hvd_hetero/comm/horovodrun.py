"""horovodrun as ``hvd-hetero launch`` starts it: ``python -m hvd_hetero.comm.horovodrun PIPE SHELL SEC ARGUMENT...``.

horovodrun decodes what ranks say. Bytes that are no UTF-8 end the thread that reads them, and with nobody to read it
the rank blocks in a write; a line is gathered whole, however long. Here ranks' output goes through a pipe of its own,
byte for byte. horovodrun writes all variables into ranks' command lines, too: secrets only go where they are inherited.
And it writes the working directory into the command of a remote host as it is, blanks or not, and knows only ssh. Its
key-value store lets five connections wait, so ranks that come at once would be sent away. And it stops a rank before it
asks it to end, so that the rank hears nothing and is killed five seconds later. SEC is what ranks are given to end by
themselves before that.
"""

from __future__ import annotations

import os
import shlex
import struct
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

import psutil

from hvd_hetero.cluster.hosts import remote_command
from hvd_hetero.secrets import is_secret

HEADER = struct.Struct("!BII")
"""Before each block in the pipe: 1 for standard output or 2 for standard error, the rank, the length of the block."""
STDOUT, STDERR = 1, 2
BLOCK_BYTES = 1 << 16
SHELLS = ("sh", "dash", "bash")
GRACE_SEC, LOOK_SEC = 5.0, 0.05
"""What a rank has for its end once it is asked for it."""
WAITING = 1024
"""Connections to the key-value store that may wait; the kernel may allow fewer."""


def main() -> None:
    """Run horovodrun with what this module says in place of its own."""
    from horovod.runner import launch
    from horovod.runner.common.util import env, safe_shell_exec
    from horovod.runner.http.http_server import RendezvousHTTPServer
    from horovod.runner.util import remote

    pipe, lock = open(int(sys.argv.pop(1)), "wb"), threading.Lock()  # noqa: SIM115 (open to the end of the process)
    shell, leave_sec = sys.argv.pop(1), float(sys.argv.pop(1))
    os.set_inheritable(pipe.fileno(), False)
    forward_text, is_exportable = safe_shell_exec.prefix_connection, env.is_exportable

    def forward(source: Any, stream: Any, name: str, index: int | None, timestamp: bool) -> None:
        if index is None:  # what horovodrun itself has asked for, and reads
            forward_text(source, stream, name, index, timestamp)
            return
        while block := os.read(source.fileno(), BLOCK_BYTES):
            with lock, suppress(OSError):  # where nobody reads any more, ranks must not wait for that
                pipe.write(HEADER.pack(STDERR if name == "stderr" else STDOUT, index, len(block)) + block)
                pipe.flush()
        source.close()

    def on_host(local_command: str, host: str, *_: Any, **__: Any) -> str:
        words, here = shlex.split(local_command), os.getcwd()
        script = words[0] if len(words) == 1 else local_command
        return shlex.join(remote_command(shell, host, script.replace(f"cd {here} ", f"cd {shlex.quote(here)} ", 1)))

    safe_shell_exec.prefix_connection = forward
    env.is_exportable = lambda name: is_exportable(name) and not is_secret(name, os.environ.get(name, ""))
    remote.get_ssh_command = on_host
    RendezvousHTTPServer.request_queue_size = WAITING
    safe_shell_exec._exec_middleman = partial(run_rank, leave_sec)
    launch.run_commandline()


def run_rank(leave_sec: float, *args: Any) -> None:
    """Run a rank in a process of its own, which ends the rank when it is told to."""
    from horovod.runner.common.util import safe_shell_exec

    safe_shell_exec.terminate_executor_shell_and_children = partial(end_rank, leave_sec)
    safe_shell_exec._exec_middleman(*args)


def end_rank(leave_sec: float, pid: int) -> None:
    """Ask a command to end, and kill it with all that it has started if it does not in time.

    A shell that is left around the command is not asked: where it ends, so does this process, whether the command has
    heard or not. Nobody is waited for: that would take the command's status from the one that runs it.

    Args:
        leave_sec: what it has to end by itself before.
    """
    with suppress(psutil.NoSuchProcess):
        command = psutil.Process(pid)
        deadline = time.monotonic() + leave_sec
        while _runs(command) and time.monotonic() < deadline:
            time.sleep(LOOK_SEC)
        asked = (command.children() if command.name() in SHELLS else []) or [command]
        for process in asked:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        deadline = time.monotonic() + GRACE_SEC
        while any(map(_runs, [*asked, command])) and time.monotonic() < deadline:
            time.sleep(LOOK_SEC)
        for process in [*command.children(recursive=True), *asked, command]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    main()
