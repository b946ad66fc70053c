"""``hvd-hetero profile`` under real horovodrun, and what a run makes of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_hetero.launch import profile as profile_command
from hvd_hetero.planning.local_steps import derive_tau, slower_share

pytestmark = pytest.mark.horovod

THREE = {"a": {"ranks": [0]}, "b": {"ranks": [1], "slowdown": 3}, "c": {"ranks": [2], "slowdown": 6}}
QUICK = ["profile.seconds=0.2", f"cluster.classes={json.dumps(THREE)}", "train.tau=32"]


@pytest.fixture(scope="module")
def kept(hvd_hetero: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file, and what the command said; three classes."""
    path = tmp_path_factory.mktemp("profile") / "speeds.json"
    done = hvd_hetero(["profile", *QUICK, f"profile.file={path}"])
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout


def test_what_is_kept(kept: tuple[Path, str]) -> None:
    content = json.loads(kept[0].read_text())
    classes = {c["name"]: c for c in content["classes"]}
    assert list(classes) == ["a", "b", "c"]
    steps = {name: c["step_sec"] for name, c in classes.items()}  # of a busy machine: in no order that is sure
    assert min(steps.values()) > 0
    slower = slower_share(steps, {c["name"]: c["ranks"] * c["batch_size"] for c in content["classes"]})
    assert content["tau"] == derive_tau(32, steps, margin=0.1 * max(0.0, 1 - 2 * slower))
    assert set(classes["b"]["by_batch"]) == {"2", "4", "8"} == set(classes["b"]["by_batch_alone"])
    assert min(classes["b"]["by_batch_alone"].values()) > 0
    assert classes["b"]["by_batch_alone"]["4"] == classes["b"]["step_sec_alone"]
    assert content["samples"] == 1438 and content["parameters"] == 64 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    assert content["average_sec"] > 0 and all(0 <= share < 1 for share in content["predicted_blocked"].values())
    assert "a | " in kept[1] and str(kept[0]) in kept[1]


@pytest.mark.slow
def test_a_run_takes_its_speeds_from_it(kept: tuple[Path, str], hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    run = ["launch", *QUICK, f"profile.file={kept[0]}", "train.epochs=1", f"run.dir={tmp_path / 'run'}"]
    done = hvd_hetero(run)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    profile = json.loads(kept[0].read_text())
    assert [c["step_sec"] for c in plan["classes"]] == [c["step_sec"] for c in profile["classes"]]
    assert [c["tau"] for c in plan["classes"]] == list(profile["tau"].values())
    assert f"step times from {kept[0]}" in done.stdout


@pytest.mark.parametrize(("settings", "named"), [
    (["train.batch_size=8"], "batch_size"),
    (["model.args.hidden=[32]"], "trained"),
    (['cluster.classes={"a": {"ranks": [0]}, "b": {"ranks": [1], "slowdown": 2}}'], "device"),
])  # fmt: skip
def test_that_of_something_else_is_refused(
    kept: tuple[Path, str], launched: Callable[..., tuple[int, str, str]], settings: list[str], named: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    status, _, output = launched(*QUICK, *settings, f"profile.file={kept[0]}")
    assert status == 2 and "Traceback" not in output
    assert "profile.file" in output and named in output and "hvd-hetero profile" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_the_launcher_too_all_ranks_end(
    kept: tuple[Path, str], horovodrun: Callable[..., Any], tmp_path: Path
) -> None:
    settings = [*QUICK, "train.batch_size=8", f"profile.file={kept[0]}", f"run.dir={tmp_path / 'run'}"]
    done = horovodrun(3, [sys.executable, "-m", "hvd_hetero", "train", *settings])
    assert done.returncode != 0 and "Exit code: 2" in done.stderr
    assert done.stderr.count("hvd-hetero: error: profile.file") == 1


def test_the_only_rank_of_a_job_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start a job again and again if it went by the number of ranks."""
    for name, value in {"RANK": "0", "SIZE": "1", "LOCAL_RANK": "0", "GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
                        "GLOO_RENDEZVOUS_PORT": "1"}.items():
        monkeypatch.setenv(f"HOROVOD_{name}", value)
    done: list[str] = []
    monkeypatch.setattr(profile_command, "_measure", lambda files, overrides: done.append("measured"))
    monkeypatch.setattr(profile_command, "run_job", lambda *_: done.append("launched"))
    assert profile_command.profile([], []) == 0 and done == ["measured"]


@pytest.mark.parametrize(("content", "output"), [
    ("{", "no JSON"), ('{"version": 7}', "version 7"), (None, "cannot be"),
])  # fmt: skip
def test_no_profile_at_all(
    launched: Callable[..., tuple[int, str, str]], tmp_path: Path, content: str | None, output: str
) -> None:
    path = tmp_path / "speeds.json"
    if content is not None:
        path.write_text(content)
    status, _, err = launched(*QUICK, f"profile.file={path}")
    assert status == 2 and output in err and "profile.file" in err
