"""Runs that stop in the middle and go on from a checkpoint: the same, to the last bit, as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from together import together

from hvd_hetero.checkpoint import Store
from hvd_hetero.errors import EXIT_STOPPED

pytestmark = pytest.mark.horovod

TAU = "train.tau={fast: 8, slow: 2}"
COMMON = ["train.batch_size=8", "cluster.classes.slow.slowdown=1", "model.args.hidden=[32]", "run.trace_rounds=0",
          "train.scheduler=MultiStepLR", "train.scheduler_args={milestones: [3], gamma: 0.5}"]  # fmt: skip


def launched(folder: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hvd_hetero", "launch", *COMMON, *settings, f"run.dir={folder}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder: Path, *settings: str, status: int = 0) -> str:
    job = launched(folder, *settings)
    output, _ = job.communicate(timeout=240)
    assert job.returncode == status, output
    return output


def stopped(folder: Path, *settings: str) -> str:
    """Runs until there is a row of figures, then asks the launcher to stop."""
    job = launched(folder, *settings)
    deadline = time.monotonic() + 120
    while not epochs(folder) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == EXIT_STOPPED, output
    return output


def epochs(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint" / "model.pt", weights_only=True)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("epoch", "round", "samples_seen", "train_loss", "lr")} for row in lines]


def assert_same(one: Path, other: Path) -> None:
    assert rows(one) == rows(other), "rows neither lost nor doubled, and the same losses"
    first, second = weights(one), weights(other)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for key in ("rounds", "epochs", "samples_seen"):
        assert summaries[0][key] == summaries[1][key]
    assert [c["steps"] for c in summaries[0]["classes"]] == [c["steps"] for c in summaries[1]["classes"]]


def test_stopped_within_an_epoch_and_gone_on_is_bit_equal(tmp_path: Path) -> None:
    """Through the launcher; tests/training/test_resume_methods.py has all methods."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = ["algorithm.name=sync_sgd", "train.epochs=5", "checkpoint.every_rounds=40"]
    _, output = together(partial(run, whole, *settings), partial(stopped, parts, *settings))
    assert "run.resume=auto goes on from round" in output
    halfway = epochs(parts)
    assert 1 <= halfway < 5
    assert "resumed after epoch" in run(parts, *settings, "run.resume=auto")
    assert_same(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[TAU, "aggregation.mode=solo"], ["algorithm.name=eager_sgd"],
                                      ["algorithm.name=ringleader_asgd"]])
def test_methods_that_go_by_the_clock_stop_and_go_on_too(tmp_path: Path, settings: list[str]) -> None:
    stopped(tmp_path, *settings, "train.epochs=60")
    done = epochs(tmp_path)
    run(tmp_path, *settings, f"train.epochs={done + 2}", "run.resume=auto")
    assert [row["epoch"] for row in rows(tmp_path)] == list(range(1, done + 3))
    seen = [row["samples_seen"] for row in rows(tmp_path)]
    assert all(later > earlier for earlier, later in zip(seen, seen[1:], strict=False))


@pytest.mark.slow  # tests/launch/test_supervisor.py kills too, scripts/soak much more
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A rank is killed again and again; each time the job goes on from what it had saved."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = [TAU, "train.epochs=25", "checkpoint.every_rounds=7"]
    run(whole, *settings)
    rng, kills = random.Random(1), 0
    while True:
        before = epochs(killed)
        job = launched(killed, *settings, "run.resume=auto")
        if kills < 3:
            while job.poll() is None and epochs(killed) <= before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            victims = [p for p in psutil.process_iter() if is_rank(p, killed)]
            if victims:
                os.kill(rng.choice(victims).pid, signal.SIGKILL)
                kills += 1
        job.communicate(timeout=120)
        if job.returncode == 0:
            break
    assert kills >= 2, "the job was over before anybody was killed"
    assert_same(whole, killed)


def is_rank(process: psutil.Process, folder: Path) -> bool:
    try:
        words = process.cmdline()
        mine = "train" in words and f"run.dir={folder}" in words and process.name().startswith("python")
        return mine and "HOROVOD_RANK" in process.environ()
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs with a checkpoint at the end of each."""
    folder = tmp_path_factory.mktemp("base") / "run"
    run(folder, TAU, "train.epochs=3", "checkpoint.every_sec=0")
    return folder


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(("change", "named"), [
    ("train.lr=0.5", "train.lr=0.5: the checkpoint of round"),
    ("cluster.classes.slow.ranks=[1, 2]", "was saved by 2 ranks, and this job has 3"),
])
def test_another_configuration_is_refused(copy: Path, change: str, named: str) -> None:
    output = run(copy, TAU, "train.epochs=4", "run.resume=auto", change, status=2)
    assert "Traceback" not in output and named in output
    assert epochs(copy) == 3, "nothing was touched"


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copy: Path, tmp_path: Path) -> None:
    run(tmp_path / "whole", TAU, "train.epochs=4")
    newest = sorted((copy / "checkpoints").glob("0*"))[-1]
    shard = newest / "rank0001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    output = run(copy, TAU, "train.epochs=4", "run.resume=auto")
    resumed = next(line for line in output.splitlines() if "resumed after epoch" in line)
    assert f"round {int(newest.name)}" not in resumed and "rank0001" in output
    assert_same(tmp_path / "whole", copy)


@pytest.mark.slow
def test_averages_go_on_the_way_that_was_measured_at_first(copy: Path) -> None:
    """Rounding differs between the two ways."""
    settings = [TAU, "run.resume=reshape", "cluster.classes.slow.ranks=[1, 2]", "aggregation.path=measured"]
    run(copy, *settings, "train.epochs=4", "checkpoint.every_sec=0")
    on_another_path(copy)
    output = run(copy, *settings, "train.epochs=5", "checkpoint.every_sec=0")
    assert "averages go" not in output and json.loads((copy / "summary.json").read_text())["path"] == "hierarchical"
    after = rows(copy)
    output = run(copy, *settings, "train.epochs=4")
    assert "there the run has ended" in output and "train.epochs" in output and rows(copy) == after


def on_another_path(folder: Path) -> None:
    """Changes the newest checkpoint: averages had gone by class."""
    store = Store(folder)
    found = store.latest()
    assert found is not None
    number, meta = found.meta.round, found.meta
    states = [found.load(rank) | {"path": "hierarchical"} for rank in range(meta.world_size)]
    shutil.rmtree(found.path)
    infos = [store.write_shard(number, rank, state) for rank, state in enumerate(states)]
    store.commit(number, infos, epochs=meta.epochs, made_with=meta.made_with)


def test_on_another_number_of_ranks(copy: Path) -> None:
    before = rows(copy)
    losses = Store(copy).at(before[-1]["round"]).load(0)["rank0"]["sampler"]["losses"]
    settings = [TAU, "run.resume=reshape", "cluster.classes.slow.ranks=[1, 2]", "train.epochs=5"]
    output = run(copy, *settings, "checkpoint.every_sec=0", "aggregation.path=measured")
    assert "resumed after epoch 3" in output and "reshaped" in output
    told = r"averages take the (flat|hierarchical) path, the faster one: flat \S+ ms, hierarchical \S+ ms"
    assert len(re.findall(told, output)) == 1
    after = rows(copy)
    assert after[:3] == before and [row["epoch"] for row in after] == [1, 2, 3, 4, 5]
    assert after[3]["samples_seen"] > before[2]["samples_seen"] and after[3]["round"] > before[2]["round"]
    assert after[3]["train_loss"] < before[0]["train_loss"], "it went on from the model"
    assert [row["lr"] for row in after] == pytest.approx([0.02] * 3 + [0.01] * 2)
    summary = json.loads((copy / "summary.json").read_text())
    assert summary["world_size"] == 3
    rounds, size = after[-1]["round"] - before[-1]["round"], 4 * (64 * 32 + 32 + 32 * 10 + 10)
    sent = summary["classes"][0]["sent_bytes"]
    assert rounds * size <= sent < (rounds + 5) * size, "nothing of the 18 averages that were only measured"
    assert torch.isfinite(torch.as_tensor(losses)).sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("change", "named"), [("model.args.hidden=[16]", "another model")])
def test_reshaping_something_else_is_refused(copy: Path, change: str, named: str) -> None:
    output = run(copy, TAU, "train.epochs=5", "run.resume=reshape", change, status=2)
    assert named in output and "run.resume" in output and "Traceback" not in output
