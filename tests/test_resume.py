"""Runs that go on from a checkpoint: the same, to the last bit, as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("horovod.torch", reason="Horovod is not installed: run scripts/setup")

import torch  # noqa: E402

TAU = "train.tau={fast: 8, slow: 2}"
COMMON = ["train.batch_size=8",
          "cluster.classes.slow.slowdown=1", "model.args.hidden=[32]", "checkpoint.every_sec=0", "run.trace_rounds=0",
          "train.scheduler=MultiStepLR", "train.scheduler_args={milestones: [3], gamma: 0.5}"]
EXACT = {
    "biased_local_sgd": [TAU],
    "biased_local_sgd, Nesterov": ["algorithm.name=biased_local_sgd", TAU, "aggregation.outer_lr=0.7",
                                   "aggregation.outer_momentum=0.9", "aggregation.outer_nesterov=true"],
    "balanced_local_sgd, AdamW": ["algorithm.name=balanced_local_sgd", "train.tau=4", "train.optimizer=AdamW",
                                  "train.optimizer_args={}", "train.lr=0.001"],
    "unbalanced_local_sgd, unified": ["algorithm.name=unbalanced_local_sgd", TAU, "sampling.scheme=unified"],
    "sync_sgd": ["algorithm.name=sync_sgd"],
    "byteps": ["algorithm.name=byteps"],
    "merging, nobody late": [TAU, "aggregation.mode=solo", "aggregation.sync_every=1", "aggregation.patience_sec=60"],
}


def run(hvd_hetero: Callable[..., Any], folder: Path, *settings: str) -> Any:
    done = hvd_hetero(["launch", *COMMON, *settings, f"run.dir={folder}"])
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint" / "model.pt", weights_only=True)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("pass", "round", "samples_seen", "train_loss", "lr")} for row in lines]


def assert_same(one: Path, other: Path) -> None:
    assert rows(one) == rows(other), "rows neither lost nor doubled, and the same losses"
    first, second = weights(one), weights(other)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("method", EXACT)
def test_stopped_and_gone_on_is_bit_equal(hvd_hetero: Callable[..., Any], tmp_path: Path, method: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = EXACT[method]
    run(hvd_hetero, whole, *settings, "train.passes=4")
    run(hvd_hetero, parts, *settings, "train.passes=2")
    halfway = weights(parts)
    said = run(hvd_hetero, parts, *settings, "train.passes=4", "run.resume=auto").stdout
    assert "goes on after pass 2" in said
    assert_same(whole, parts)
    assert any(not torch.equal(value, weights(parts)[name]) for name, value in halfway.items())
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, parts)]
    for key in ("rounds", "passes", "samples_seen"):
        assert summaries[0][key] == summaries[1][key]
    assert [c["steps"] for c in summaries[0]["classes"]] == [c["steps"] for c in summaries[1]["classes"]]


@pytest.mark.parametrize("settings", [
    ["algorithm.name=eager_sgd"], ["algorithm.name=dlb"], [TAU, "aggregation.mode=solo"],
    ["train.tau=16", "profile.seconds=0.3"],
])  # fmt: skip
def test_methods_that_go_by_the_clock_go_on_too(
    hvd_hetero: Callable[..., Any], tmp_path: Path, settings: list[str]
) -> None:
    run(hvd_hetero, tmp_path, *settings, "train.passes=2")
    run(hvd_hetero, tmp_path, *settings, "train.passes=4", "run.resume=auto")
    assert [row["pass"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    seen = [row["samples_seen"] for row in rows(tmp_path)]
    assert seen == sorted(seen) and seen[3] > 1.5 * seen[1]


def test_killed_at_any_moment(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    """A rank is killed again and again; each time the job goes on from what it had saved."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = [TAU, "train.passes=30", "algorithm.name=biased_local_sgd"]
    run(hvd_hetero, whole, *settings)
    rng, kills = random.Random(1), 0
    command = [sys.executable, "-m", "hvd_hetero", "launch", *COMMON, *settings, f"run.dir={killed}", "run.resume=auto"]
    for attempt in range(12):
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kills < 4:
            before = len((killed / "metrics.jsonl").read_text().splitlines()) if attempt else 0
            deadline = time.monotonic() + 60
            while job.poll() is None and time.monotonic() < deadline and _passes(killed) <= before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            victims = _ranks(killed)
            if victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
                kills += 1
        if job.wait(timeout=120) == 0:
            break
    assert kills >= 2, "the job was over before anybody was killed"
    assert_same(whole, killed)


def _passes(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _ranks(folder: Path) -> list[int]:
    """Processes of the job's ranks, found by their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "train" in words and f"run.dir={folder}" in words and "-m" in words and "horovodrun" not in words[1]:
            found.append(int(entry.name))
    return found


def test_nothing_to_go_on_from_is_a_start(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    said = run(hvd_hetero, tmp_path / "new", TAU, "train.passes=1", "run.resume=auto").stdout
    assert "goes on" not in said and len(rows(tmp_path / "new")) == 1


@pytest.mark.parametrize(("change", "named"), [("train.lr=0.5", "config"), ("train.batch_size=4", "config")])
def test_another_configuration_is_refused(
    hvd_hetero: Callable[..., Any], tmp_path: Path, change: str, named: str
) -> None:
    run(hvd_hetero, tmp_path / "run", TAU, "train.passes=1")
    settings = [*COMMON, TAU, change, "train.passes=2", "run.resume=auto", f"run.dir={tmp_path / 'run'}"]
    done = hvd_hetero(["launch", *settings])
    assert done.returncode == 2 and "Traceback" not in done.stderr and named in done.stderr


def test_a_damaged_checkpoint_gives_way_to_the_one_before(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    run(hvd_hetero, whole, TAU, "train.passes=4")
    run(hvd_hetero, damaged, TAU, "train.passes=3")
    newest = sorted((damaged / "checkpoints").iterdir())[-1]
    shard = newest / "rank0001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    said = run(hvd_hetero, damaged, TAU, "train.passes=4", "run.resume=auto")
    assert "goes on after pass 2" in said.stdout and "rank0001" in said.stderr
    assert_same(whole, damaged)
