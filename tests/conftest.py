"""What several test modules share: jobs under real horovodrun, ended for certain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
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
        pytest.importorskip("horovod", reason="Horovod is not installed: run scripts/setup")
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also the variants of jobs that others stand for")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:  # tests that share a job go to one process, all others to whichever is free
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if shared := sorted(f.argname for (*_, f) in fixtures if f.scope == "module"):
            item.add_marker(pytest.mark.xdist_group(f"{item.nodeid.split('::')[0]}:{shared[0]}"))
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="a variant that takes long: give --slow"))
