"""What several test modules share: jobs under real horovodrun, ended for certain; what is skipped, and why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

Done = subprocess.CompletedProcess[str]


def run_group(
    command: Sequence[str], *, timeout: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Done:
    """Runs a command in a process group of its own, which a timeout ends as a whole; the test then fails."""
    process = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **(env or {})}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        out, err = _end(process)
        if isinstance(error, subprocess.TimeoutExpired):
            pytest.fail(f"not done within {timeout:g} s: {' '.join(command)}\n{out[-4000:]}\n{err[-4000:]}")
        raise
    return Done(command, process.returncode, out, err)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Asks first: horovodrun keeps its ranks in sessions of their own, and ends them only when it is asked."""
    for number, grace_sec in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
        try:
            return process.communicate(timeout=grace_sec)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("unreachable: SIGKILL cannot be survived")


@pytest.fixture(scope="session")
def horovodrun() -> Callable[..., Done]:
    """``horovodrun(np, args, hosts=None, timeout=120)`` runs ``args`` on ``np`` ranks; hosts as for ``-H``.

    Further keywords: ``cwd`` and ``env`` (added to the environment).
    """

    def run(np: int, args: Sequence[Any], hosts: str | None = None, timeout: float = 120, **options: Any) -> Done:
        program = str(Path(sys.executable).with_name("horovodrun"))
        line = [program, "--gloo", "-np", str(np), "-H", hosts or f"localhost:{np}", *map(str, args)]
        return run_group(line, timeout=timeout, **options)

    return run


@pytest.fixture(scope="session")
def hvd_hetero() -> Callable[..., Done]:
    """``hvd_hetero(args, timeout=120)`` runs the command ``hvd-hetero``; ``cwd`` and ``env`` as for horovodrun."""

    def run(args: Sequence[Any], timeout: float = 120, **options: Any) -> Done:
        return run_group([sys.executable, "-m", "hvd_hetero", *map(str, args)], timeout=timeout, **options)

    return run


@pytest.fixture
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process finds no GPU, wherever it runs."""
    monkeypatch.setattr("hvd_hetero.cluster.hardware._gpus", lambda: ([], ""))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], without_gpus: None
) -> Callable[..., tuple[int, str, str]]:
    """``launched(key=value, ...)``: status, stdout and stderr of ``hvd-hetero launch``; starting a process fails."""

    def no_process(*args: Any, **options: Any) -> None:
        pytest.fail(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "ranks"))

    def launch(*words: str) -> tuple[int, str, str]:
        folder = [] if any(word.startswith("run.dir=") for word in words) else [f"run.dir={tmp_path / 'run'}"]
        from hvd_hetero.cli import main

        status = main(["launch", *words, *folder])
        output = capsys.readouterr()
        return status, output.out, output.err

    return launch


# ---- what is skipped ------------------------------------------------------------------------------------------------


JOBS = {"horovodrun", "hvd_hetero", "launched"}
"""Fixtures that start jobs, or try out what a job trains; no test that takes one runs without Horovod."""


@cache
def horovod_error() -> str:
    """Return why Horovod cannot be imported, or "" if it can."""
    try:
        import_module("horovod.torch")
    except ImportError as error:
        return str(error)
    return ""


def without_horovod() -> str:
    """Return the reason of everything that is skipped for want of Horovod."""
    return f"Horovod cannot be imported ({horovod_error()}): run scripts/setup"


class Module(pytest.Module):
    """A test module that is skipped if it cannot be imported for want of Horovod."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            if isinstance(error.__cause__, ImportError) and str(error.__cause__) == horovod_error():
                pytest.skip(without_horovod(), allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return Module.from_parent(parent, path=module_path)


def pytest_sessionstart() -> None:
    required = [name for name in ("CI", "HVD_HETERO_REQUIRE_HOROVOD") if os.environ.get(name)]
    if required and horovod_error():
        pytest.exit(f"{without_horovod()}. It is required since {required[0]} is set.", returncode=1)


def pytest_collection() -> None:
    """Let this process compute on one thread: with more they would wait for one another, as jobs have the cores."""
    with suppress(ImportError):
        import_module("torch").set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also the variants of jobs that others stand for")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if not config.getoption("--slow") and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="a variant that takes long: give --slow"))
        elif (item.get_closest_marker("horovod") or JOBS & fixtures_of(item)) and horovod_error():
            item.add_marker(pytest.mark.skip(reason=without_horovod()))


def fixtures_of(item: pytest.Item) -> set[str]:
    """Return the names of all fixtures that a test takes, and that these take."""
    return set(getattr(item, "fixturenames", ()))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    """Count what was skipped, by reason, below all else."""
    yield
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter((report.longrepr[2].removeprefix("Skipped: "), isinstance(report, pytest.CollectReport))
                      for report in skipped if isinstance(report.longrepr, tuple))
    if reasons:
        terminalreporter.section("skipped, by reason")
    for (reason, whole), count in reasons.most_common():
        terminalreporter.line(f"{count:5} {'module' if whole else 'test'}{'s' * (count > 1)}: {reason}")
