"""A test session without Horovod: the tests that need it are skipped, all for one reason, or the session fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PURE, IMPORTS, MARKED = "planning/test_stop_criteria.py", "comm/test_send_buffer.py", "training/test_loop.py"
FIXTURE = "comm/test_comm.py"
MISSING, UNFIT = "No module named 'horovod'", "this Horovod was built for another torch"
STUBS = {"missing": f"raise ModuleNotFoundError({MISSING!r})", "unfit": f"raise ImportError({UNFIT!r})"}


def session(folder: Path, stub: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run pytest where importing Horovod fails."""
    (folder / "horovod.py").write_text(STUBS[stub])
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "HVD_HETERO_REQUIRE_HOROVOD")}
    path = os.pathsep.join(filter(None, [str(folder), kept.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *words]
    return subprocess.run(command, cwd=TESTS.parent, env={**kept, "PYTHONPATH": path, **environment},
                          capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("stub", STUBS)
def test_without_horovod_pure_tests_run_and_the_others_are_skipped_for_one_reason(tmp_path: Path, stub: str) -> None:
    done = session(tmp_path, stub, *(str(TESTS / name) for name in (PURE, IMPORTS, MARKED, FIXTURE)))
    assert done.returncode == 0, done.stdout + done.stderr
    _, _, counted = done.stdout.partition("skipped, by reason")
    rows = [line for line in counted.splitlines() if "Horovod cannot be imported" in line]
    assert rows and all("run scripts/setup" in row for row in rows), done.stdout
    assert len({row.split(":", 1)[1] for row in rows}) == 1, "one reason"
    assert " passed" in done.stdout.splitlines()[-1] and "error" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("variable", ["CI", "HVD_HETERO_REQUIRE_HOROVOD"])
def test_where_horovod_is_required_the_session_fails_at_its_start(tmp_path: Path, variable: str) -> None:
    done = session(tmp_path, "unfit", str(TESTS / PURE), str(TESTS / IMPORTS), **{variable: "1"})
    assert done.returncode == 1
    assert UNFIT in done.stderr and f"{variable} is set" in done.stderr and "scripts/setup" in done.stderr
    assert "passed" not in done.stdout and "skipped" not in done.stdout


def test_no_module_skips_for_horovod_by_itself() -> None:
    """The one place that knows is conftest.py."""
    others = [path for path in TESTS.rglob("*.py") if path != Path(__file__)]
    assert [path for path in others if 'importorskip("horovod' in path.read_text()] == []
