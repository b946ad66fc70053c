"""The example programs run as their first lines say, on two real ranks, or in one process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.horovod

EXAMPLES = Path(__file__).parents[1] / "scripts" / "examples"


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@pytest.mark.slow
def test_own_model_in_a_program(tmp_path: Path) -> None:
    run([program("horovodrun"), "-np", "2", sys.executable, str(EXAMPLES / "own_model.py")], tmp_path)
    (summary,) = tmp_path.glob("runs/*/summary.json")
    content = json.loads(summary.read_text())
    assert content["epochs"] == 20
    assert [c["tau"] for c in content["classes"]] == [16, 2]
    assert content["eval"]["final_accuracy"] > 0.9  # the larger class alone is 0.63


def test_own_loop(tmp_path: Path) -> None:
    out = run([program("horovodrun"), "-np", "2", sys.executable, str(EXAMPLES / "own_loop.py")], tmp_path)
    (line,) = [line for line in out.splitlines() if "accuracy" in line]
    assert float(line.split()[-1]) > 0.85


def test_method_in_one_process(tmp_path: Path) -> None:
    out = run([sys.executable, str(EXAMPLES / "method_in_one_process.py")], tmp_path)
    assert float(out.split()[-1]) > 0.85


def test_own_target_in_a_configuration(tmp_path: Path) -> None:
    for file in ("own_target.py", "own_target.yaml"):
        shutil.copy(EXAMPLES / file, tmp_path)
    run([program("hvd-hetero"), "launch", "own_target.yaml", "run.dir=run"], tmp_path)
    content = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert content["eval"]["final_accuracy"] > 0.9
    assert content["samples_seen"] == 20 * (16 + 2) * 4
