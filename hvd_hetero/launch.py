"""``hvd-hetero launch``: checks everything on this machine, then builds the horovodrun line and runs it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from hvd_hetero import algorithms, components, job
from hvd_hetero.api import run_dir
from hvd_hetero.cluster import Cluster, RankFacts, assign, integers, local_facts, parse_hosts
from hvd_hetero.comm.rendezvous import COLUMNS
from hvd_hetero.config import device_classes, load
from hvd_hetero.errors import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_STOPPED, ConfigError
from hvd_hetero.metrics import check_run_dir
from hvd_hetero.profiles import check_profile, load_profile
from hvd_hetero.schema import AUTO, Config
from hvd_hetero.stopping import STOP

FORWARDED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TMPDIR|TZ|LANG|LC_.*|TERM|VIRTUAL_ENV|LD_LIBRARY_PATH|LD_PRELOAD|PYTHON.*|"
    r"HVD_HETERO_.*|HOROVOD_.*|NCCL_.*|CUDA_.*|OMP_.*|MKL_.*|KMP_.*|GOMP_.*|TORCH_.*|PYTORCH_.*|HF_.*OFFLINE|SSH_AUTH_SOCK"
)
"""Variables that workers get. horovodrun writes them all into command lines that every user of a host can read, so
nothing else of the environment (tokens, passwords) goes along."""


GRACE_SEC = 20.0
"""horovodrun gives its ranks 5 s before it kills them."""
SAVING_SEC = 30.0
"""What a job that was asked to stop has for the round that it is in and for saving; then it is told to end."""


def launch(files: Sequence[str], overrides: Sequence[str], show: bool) -> int:
    """Runs a job and returns its exit status: 0 done, 2 bad input, 1 a fault while running.

    Args:
        show: only print the horovodrun line.

    Raises:
        ConfigError: found wrong before any worker was started.
    """
    config = load(files, overrides, algorithms.method)
    hosts = job_hosts(config)
    folder = run_dir(config)
    check_run_dir(folder, config.run.overwrite or config.run.resume is not None)
    if not show:
        preflight(config, hosts)
    extra = [f"run.dir={folder}"] if config.run.dir is None else []
    command = horovodrun_line(config, hosts, ["train", *files, *overrides, *extra])
    if show:
        print(shlex.join(command))
        return 0
    saves = config.checkpoint.every_sec is not None or config.checkpoint.every_rounds is not None
    return _run(command, folder / STOP if saves else None)


def run_job(command: str, files: Sequence[str], overrides: Sequence[str]) -> int:
    """Runs a command other than ``train`` on all ranks; returns its exit status as :func:`launch`.

    Raises:
        ConfigError: as :func:`launch`.
    """
    config = load(files, overrides, algorithms.method)
    hosts = job_hosts(config)
    preflight(config, hosts, trains=False)
    return _run(horovodrun_line(config, hosts, [command, *files, *overrides]))


def _run(command: Sequence[str], stop: Path | None = None) -> int:
    status, first = _Horovodrun(command, stop).wait()
    if status in (0, EXIT_BAD_INPUT, EXIT_STOPPED):
        return status
    print(f"hvd-hetero: error: the job failed: {first}", file=sys.stderr)
    return EXIT_FAULT


def job_hosts(config: Config) -> list[tuple[str, int]]:
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
    return [("localhost", max((rank for c in classes.values() for rank in integers("ranks", c.ranks)), default=0) + 1)]


def preflight(config: Config, hosts: Sequence[tuple[str, int]], trains: bool = True) -> None:
    """Tries out, on this machine, what every rank will do before it connects, so that mistakes cost no start.

    Args:
        trains: whether the job is to train, and so to find the files that it needs for that.

    Raises:
        ConfigError: as :func:`hvd_hetero.job.start`.
    """
    parts = components.build(config)
    cluster = expected_cluster(config, hosts)
    if cluster is not None:
        job.check(config, parts, cluster)
        if trains and config.profile.file is not None:
            profile = load_profile(Path(config.profile.file))
            if all(is_local(host) for host, _ in hosts):  # else only the hosts themselves can say whether it fits
                check_profile(profile, config, cluster)


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
        facts += [RankFacts(len(facts) + i, host, i, gpus, here.cpu, here.cores) for i in range(slots)]
    if config.cluster.classes == AUTO and not all(is_local(host) for host, _ in hosts):
        return None
    classes = AUTO if config.cluster.classes == AUTO else device_classes(config.cluster.classes)
    return assign(classes, facts)


def is_local(host: str) -> bool:
    if host in ("localhost", "127.0.0.1", socket.gethostname()):
        return True
    try:
        addresses = {item[4][0] for item in socket.getaddrinfo(host, None)}
        own = {item[4][0] for item in socket.getaddrinfo(socket.gethostname(), None)} | {"127.0.0.1", "::1"}
    except OSError:
        return False
    return bool(addresses & own)


def horovodrun_line(config: Config, hosts: Sequence[tuple[str, int]], arguments: Sequence[str]) -> list[str]:
    """The command that starts the job; ``arguments`` are those of ``hvd-hetero`` on every rank."""
    spec = config.cluster
    beside = Path(sys.executable).with_name("horovodrun")
    program = str(beside) if beside.exists() else shutil.which("horovodrun") or "horovodrun"
    line = [program, "--gloo", "-np", str(sum(slots for _, slots in hosts)),
            "-H", ",".join(f"{host}:{slots}" for host, slots in hosts),
            "--start-timeout", str(spec.start_timeout_sec),
            "--gloo-timeout-seconds", str(spec.gloo_timeout_sec),
            "--cycle-time-ms", f"{spec.cycle_time_ms:g}"]
    if spec.network_interface is not None:
        line += ["--network-interfaces", spec.network_interface]
    return [*line, sys.executable, "-m", "hvd_hetero", *arguments]


def thread_variables() -> dict[str, str]:
    """The environment's say in how many threads there are and where they run."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HOROVOD_THREAD_AFFINITY")
    return {name: os.environ[name] for name in names if name in os.environ}


class _Horovodrun:
    """Runs horovodrun, passes on what its ranks say, and finds out which one failed first.

    horovodrun itself exits with 1 and a traceback whatever happened; the traceback is kept back.

    Args:
        stop: the file that asks the job to save and to end, if it can.
    """

    def __init__(self, command: Sequence[str], stop: Path | None = None) -> None:
        self._stop = stop
        env = {name: value for name, value in os.environ.items() if FORWARDED.fullmatch(name)}
        if sys.stderr.isatty():
            env[COLUMNS] = str(shutil.get_terminal_size().columns - len("[0]<stderr>:"))
        self._own: list[str] = []
        self._asked = False
        try:
            # In a session of its own: a terminal's Ctrl-C would reach it beside the signal that is passed on, and
            # horovodrun's handlers deadlock when a second signal interrupts the first one's.
            self._process = subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            problem = f"cannot be started: {error.strerror}"
            raise ConfigError("horovodrun", command[0], problem, "install Horovod with scripts/setup") from error
        assert self._process.stdout is not None and self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._forward, args=pipe, daemon=True)
            for pipe in ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        ]

    def wait(self) -> tuple[int, str]:
        """Waits for the end; returns the status of the rank that failed first (0: none did) and what is known of it."""
        for reader in self._readers:
            reader.start()
        ends = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            ends.append(signal.SIGHUP)
        before = {wanted: signal.signal(wanted, self._pass_on) for wanted in ends}
        status = self._process.wait()
        for wanted, handler in before.items():
            signal.signal(wanted, handler)
        for reader in self._readers:
            reader.join()
        said = "\n".join(self._own)
        code = re.search(r"^Exit code: (-?\d+)", said, re.M)
        name = re.search(r"^Process name: (\d+)", said, re.M)
        if status != 0 and code is not None and name is not None:
            number = int(code[1])
            return number, f"rank {name[1]} ended first, {_meaning(number)}"
        return status, self._own[-1] if self._own else f"horovodrun ended with status {status}"

    def _pass_on(self, number: int, frame: Any) -> None:
        """Asks the job to save and to end; where it cannot or does not, and at the second signal, tells it to end."""
        if self._stop is not None and self._stop.parent.is_dir():
            self._stop, stop = None, self._stop
            stop.touch()
            print("hvd-hetero: stops after this round and saves; at once if you insist", file=sys.stderr, flush=True)
            self._later(SAVING_SEC, lambda: self._end(number))
        else:
            self._end(number)

    def _end(self, number: int) -> None:
        """Asks horovodrun once to end its ranks, and ends it if it does not."""
        if not self._asked:
            self._asked = True
            self._process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
            self._later(GRACE_SEC, self._process.kill)

    @staticmethod
    def _later(seconds: float, call: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, call)
        timer.daemon = True
        timer.start()

    def _forward(self, pipe: IO[bytes], stream: Any) -> None:
        """Passes on the ranks' lines: rank 0's bare, others' with their rank; keeps horovodrun's own."""
        for line in _lines(pipe):
            match = re.match(r"\[(\d+)\]<std(?:out|err)>:", line)
            if match is None:
                self._own.append(line.rstrip())
                continue
            text = line[match.end() :]
            stream.write(text if match[1] == "0" or text.startswith("hvd-hetero: ") else f"rank {match[1]}: {text}")
            stream.flush()
        pipe.close()


def _lines(pipe: IO[bytes]) -> Any:
    """Lines as they come, ended by newline or by carriage return (a progress bar's)."""
    rest = ""
    while block := os.read(pipe.fileno(), 4096):
        *whole, rest = re.split(r"(?<=[\r\n])", rest + block.decode(errors="replace"))
        yield from whole
    if rest:
        yield rest


def _meaning(code: int) -> str:
    number = -code if code < 0 else code - 128
    if code < 0 or code > 128:
        try:
            return f"killed by {signal.Signals(number).name}"
        except ValueError:
            pass
    return f"with status {code}"

