"""Running horovodrun: what its ranks say, which of them ended first and how, and that nothing of a job is left."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from errno import E2BIG
from pathlib import Path
from typing import Any

from hvd_hetero.cluster.hosts import Host
from hvd_hetero.comm.horovodrun import STDERR, STDOUT
from hvd_hetero.comm.kv_store import COLUMNS, JOB
from hvd_hetero.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAULT,
    EXIT_LOST,
    EXIT_NON_FINITE,
    EXIT_STOPPED,
    EXIT_STUCK,
    ConfigError,
)
from hvd_hetero.launch.rank_output import RankOutput
from hvd_hetero.launch.remote import is_local, reap

GRACE_SEC = 20.0
"""horovodrun gives its ranks 5 s before it kills them."""
SAVING_SEC = 30.0
"""What a job that was asked to stop has for the round that it is in and for saving; then it is told to end."""
LEAST_SIGNAL = 128
"""From there on a status tells of a signal, which horovodrun may have sent."""
KNOWN = (EXIT_FAULT, EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_LOST, EXIT_STUCK, EXIT_NON_FINITE)
SSH_LOST = 255


@dataclass(frozen=True)
class End:
    """How a job ended.

    Attributes:
        status: of the job, one of :mod:`hvd_hetero.errors`.
        job: its id.
        cause: which rank ended first, and how; empty if none failed.
        error: what that rank said of it, if anything; of bad input, what any rank said.
        asked: whether the job was asked to end, by a signal to this process.
        is_said: that error was the last that ranks said.
        log: what horovodrun itself said, with a traceback if the job failed.
        silent: hosts that did not answer when it had ended; None: nobody has asked them.
    """

    status: int
    job: str = ""
    cause: str = ""
    error: str = ""
    asked: bool = False
    is_said: bool = False
    log: str = ""
    silent: tuple[str, ...] | None = None

    @property
    def why(self) -> str:
        """The cause in the rank's own words, if it had any."""
        return self.error or self.cause


class Horovodrun:
    """Runs horovodrun, passes on what its ranks say, and finds out which one failed first.

    horovodrun itself exits with 1 and a traceback whatever happened; the traceback is kept back.

    Args:
        arguments: of horovodrun, which runs as :mod:`hvd_hetero.comm.horovodrun`.
        hosts: and slots, in the order of the ranks.
        shell: what runs a command on another host, see :func:`hvd_hetero.cluster.hosts.remote_command`.
        env: the environment of ranks.
        stop: the file that asks the job to save and to end, if it can.
        grace_sec: what ranks that survive another one have to save, once horovodrun has ended.
        leave_sec: what ranks have to end by themselves, when one has ended, before they are told to.
    """

    def __init__(
        self, arguments: Sequence[str], hosts: Sequence[Host], shell: str, env: Mapping[str, str],
        stop: Path | None = None, grace_sec: float = 0.0, leave_sec: float = 0.0,
    ) -> None:
        self._grace_sec = grace_sec
        self._hosts, self._shell, self._stop = list(hosts), shell, stop
        self._job = secrets.token_hex(8)
        env = {**env, JOB: self._job}
        if sys.stderr.isatty():
            env[COLUMNS] = str(shutil.get_terminal_size().columns)
        self._log_lines: list[str] = []
        self._rank_output = RankOutput({STDOUT: sys.stdout, STDERR: sys.stderr})
        self._signalled = self._asked = False
        reading, writing = os.pipe()
        try:
            # In a session of its own: a terminal's Ctrl-C would reach it beside the signal that is passed on, and
            # horovodrun's handlers deadlock when a second signal interrupts the first one's.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hvd_hetero.comm.horovodrun", str(writing), shell, str(leave_sec), *arguments],
                env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[writing],
            )  # fmt: skip
        except OSError as error:
            os.close(reading)
            problem = f"cannot be started: {error.strerror}"
            remedy = "make what it is given shorter" if error.errno == E2BIG else "install Horovod with scripts/setup"
            raise ConfigError("horovodrun", shlex.join(arguments), problem, remedy) from error
        finally:
            os.close(writing)
        self._readers = [
            threading.Thread(target=self._read_ranks, args=(reading,), daemon=True),
            threading.Thread(target=self._read_log, daemon=True),
        ]

    def wait(self) -> End:
        """Waits for the end, and makes sure of it on all hosts where it was not a good one."""
        for reader in self._readers:
            reader.start()
        ends = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]  # the last one is what schedulers are told to send
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            ends.append(signal.SIGHUP)
        before = {wanted: signal.signal(wanted, self._pass_on) for wanted in ends}
        status = self._process.wait()
        for wanted, handler in before.items():
            signal.signal(wanted, handler)
        # before the readers are waited for: what is left of the job may hold their pipes open
        names = [host for host, _ in self._hosts]
        silent = reap(self._job, names, self._shell, self._grace_sec) if status != 0 else []
        for reader in self._readers:
            reader.join()
        self._rank_output.end(failed=status != 0)
        if status == 0:
            return End(0, self._job)
        end = self._judge(status, silent)
        is_said = bool(end.error) and end.error == self._rank_output.final_error
        return replace(end, log="\n".join(self._log_lines), is_said=is_said, silent=tuple(silent))

    def _judge(self, status: int, silent: Sequence[str]) -> End:
        log = "\n".join(self._log_lines)
        code = re.search(r"^Exit code: (-?\d+)", log, re.M)
        name = re.search(r"^Process name: (\d+)", log, re.M)
        if code is None or name is None:
            cause = self._log_lines[-1] if self._log_lines else f"horovodrun ended with status {status}"
            lost = "could not connect to some hosts via ssh" in log
            if unreached := re.search(r"^ssh not successful for host (.*):\n(.*)", log, re.M):
                cause = f"{unreached[1]} cannot be reached by {self._shell.split()[0]}: {unreached[2]}"
            return End(EXIT_LOST if lost else EXIT_FAULT, self._job, cause, asked=self._signalled)
        number, rank = int(code[1]), int(name[1])
        if self._follows(number, rank):  # the other one's end is seen later where data workers or ssh outlive it
            ends = re.findall(r"^Process (\d+) exit with status code (\d+)", log, re.M)
            failures = ((int(end), int(other)) for other, end in ends if int(end) < LEAST_SIGNAL)
            number, rank = next((end for end in failures if not self._follows(*end)), (number, rank))
        host = [host for host, slots in self._hosts for _ in range(slots)][rank]
        cut = (number == SSH_LOST or host in silent) and not is_local(host)
        meaning = meaning_of(number)
        if cut:  # ssh says the same of a rank that a signal has killed
            meaning = "and its host does not answer any more" if host in silent else "killed by a signal"
        lost = (cut or killed_by(number) is not None) and not self._signalled
        known = EXIT_LOST if lost else number if number in KNOWN else EXIT_FAULT
        errors, last = self._rank_output.errors, self._rank_output.last(rank)
        error = errors.get(rank, "")
        if number == EXIT_BAD_INPUT:  # which ranks find together, and one of them says
            error = error or next(iter(errors.values()), "")
        cause = f"rank {rank} on {host} ended first, {meaning}"
        if error:
            cause += f"; it said: {re.sub(f'^rank {rank} on {re.escape(host)}( failed)?: ', '', error)}"
        elif last:
            cause += f"; its last line: {last}"
        return End(known, self._job, cause, error, self._signalled)

    def _follows(self, status: int, rank: int) -> bool:
        """Tell whether a rank has ended because another one had: by its status, or in a program of the user's own."""
        return status == EXIT_LOST or rank in self._rank_output.followers

    def _pass_on(self, number: int, frame: Any) -> None:
        """Asks the job to save and to end; where it cannot or does not, and at the second signal, tells it to end."""
        self._signalled = True
        stop, self._stop = self._stop, None
        try:
            if stop is None or not stop.parent.is_dir():
                raise FileNotFoundError
            stop.touch()
        except OSError:  # a disk that is full, for instance
            self._end(number)
            return
        self._later(SAVING_SEC, lambda: self._end(number))
        with suppress(OSError):  # the terminal may be gone
            print("hvd-hetero: stops after this round and saves; repeat to stop at once", file=sys.stderr, flush=True)

    def _end(self, number: int) -> None:
        """Asks horovodrun once to end its ranks, and ends it if it does not."""
        if not self._asked:
            self._asked = True
            self._process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)
            self._later(GRACE_SEC, self._process.kill)

    @staticmethod
    def _later(seconds: float, call: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, call)
        timer.daemon = True
        timer.start()

    def _read_ranks(self, pipe: int) -> None:
        with os.fdopen(pipe, "rb") as file:
            self._rank_output.read(file)

    def _read_log(self) -> None:
        """Keeps what horovodrun itself says."""
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            self._log_lines += [line.decode(errors="replace").rstrip() for line in pipe]


def killed_by(code: int) -> str | None:
    """The signal that an exit status tells of, as Python says it or as a shell does."""
    try:
        return signal.Signals(-code if code < 0 else code - 128).name if code < 0 or code > 128 else None
    except ValueError:
        return None


def meaning_of(code: int) -> str:
    name = killed_by(code)
    return f"with status {code}" if name is None else f"killed by {name}"
