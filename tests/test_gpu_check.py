"""scripts/gpu_check, without a GPU: all of its stages run, and what takes too long is ended and told."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.horovod

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check"


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_all_stages_run_without_a_gpu(tmp_path: Path) -> None:
    folders = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--wheels", tmp_path / "none"]
    command = [sys.executable, SCRIPT, "--device", "cpu", *folders]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert [(row["stage"], row["check"]) for row in report["rows"] if row["ok"]] == [
        ("a", "setup"), ("a", "doctor"), ("b", "methods"), ("c", "shared"), ("d", "figures"),
    ]
    tested = [row["tail"][-1] for row in report["rows"] if row["stage"] in "bc"]
    assert all(" passed" in line for line in tested)
    figures = {row["row"]: row for row in report["rows"][-1]["found"]}
    assert figures.keys() == {"speed", "steps", "trace", "average"}
    assert not any("error" in row for row in figures.values())
    assert figures["speed"]["over_plain"] > 0 and figures["steps"]["waits"] == 0
    assert sum(path.is_file() for path in (tmp_path / "out").rglob("*")) <= 4, "few files come back"


@pytest.mark.slow
def test_a_check_that_takes_too_long_is_ended_with_what_it_has_started(parts: dict[str, Any], tmp_path: Path) -> None:
    """It leaves a row, with what it had said, and nothing that runs on."""
    check = parts["Check"]("x", "slow", ["sh", "-c", "sleep 60 & echo child $!; wait"], 60.0)
    row = parts["run"](check, 2.0, dict(os.environ), tmp_path / "log")
    assert (row["ok"], row["ended"]) == (False, "time limit")
    pid = next(line.split()[1] for line in row["tail"] if line.startswith("child"))
    for _ in range(100):  # what was killed may take a moment to go
        if not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} runs on")


@pytest.mark.parametrize(("says", "ok"), [(" passed", False), (" skipped", True)])
def test_tests_that_were_all_skipped_show_nothing(
    parts: dict[str, Any], tmp_path: Path, says: str, ok: bool
) -> None:
    check = parts["Check"]("x", "tests", ["echo", "49 skipped in 3 s"], 60.0, says=says)
    assert parts["run"](check, 60.0, dict(os.environ), tmp_path / "log")["ok"] is ok


def test_the_report_has_each_row_at_once(parts: dict[str, Any], tmp_path: Path) -> None:
    report = parts["Report"](tmp_path / "report.json", {"gpus": []})
    for number in range(2):
        report.add({"stage": "a", "check": str(number)})
        assert [row["check"] for row in json.loads((tmp_path / "report.json").read_text())["rows"]][-1] == str(number)


def test_stages_can_be_chosen(tmp_path: Path) -> None:
    folders = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--wheels", tmp_path]
    for words in (["--stages", "a", "--from", "b"], ["--from", "e"]):
        subprocess.run([sys.executable, SCRIPT, "--device", "cpu", *words, *folders], timeout=60, check=True)
        assert json.loads((tmp_path / "out" / "gpu_check.json").read_text())["rows"] == []
