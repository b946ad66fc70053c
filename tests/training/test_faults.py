"""How a job ends when one of its ranks fails: soon, with rank and cause, and nobody left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_helpers import processes_with
from torch.utils.data import DataLoader, Dataset

from hvd_hetero.config.instantiate import in_a_line
from hvd_hetero.errors import EXIT_BAD_INPUT, EXIT_LOST
from hvd_hetero.launch.horovodrun import meaning_of

RANKS = Path(__file__).parents[1] / "ranks"


def test_a_fault_on_one_rank_ends_the_job(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    """In mid-run: a status that is not 0, a message with rank and cause, nobody left behind."""
    folder = tmp_path / "run"
    done = hvd_hetero(["launch", f"run.dir={folder}", "train.loss=own_parts:fails_on_rank_1",
                       "train.tau={fast: 8, slow: 4}", "train.epochs=1000"], cwd=RANKS)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("hvd-hetero: error: ")]
    assert "hvd-hetero: error: rank 1 on localhost failed: RuntimeError: the disk of rank 1 is on fire" in errors
    assert errors[-1] == ("hvd-hetero: error: the job failed: rank 1 on localhost ended first, with status 1; it said: "
                          "RuntimeError: the disk of rank 1 is on fire")
    assert done.stderr.count("Traceback (most recent call last)") == 1 and "rank 1: Traceback" in done.stderr
    assert (folder / "metrics.jsonl").read_text(), "it was in mid-run"
    assert not (folder / "summary.json").exists()
    assert processes_with(str(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wagma_sgd", "daso", "decentlam"])
def test_a_fault_ends_the_other_groups_too(hvd_hetero: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """Ranks 2 and 3 are in no group with rank 1 for a while; they learn of its end all the same."""
    done = hvd_hetero(["launch", f"run.dir={tmp_path / 'run'}", "train.loss=own_parts:fails_on_rank_1",
                       "cluster.classes={every: {ranks: 0-3}}", "cluster.hosts=localhost:4", f"algorithm.name={name}",
                       "train.epochs=1000"], cwd=RANKS)  # fmt: skip
    assert done.returncode == 1
    assert "rank 1 on localhost ended first, with status 1; it said: RuntimeError: the disk" in done.stderr
    assert processes_with(str(tmp_path)) == []


BROKEN = """
import os
import torch
from hvd_hetero.errors import ConfigError

class Images:
    def __init__(self):
        self.read = 0
    def __len__(self):
        return 400
    def __getitem__(self, i):
        self.read += 1
        if os.environ.get("HOROVOD_RANK") == "1" and self.read > 50:
            raise ConfigError("data.root", f"image {i}", "is corrupt", "replace it")
        return torch.rand(8), i % 10

def data():
    return Images(), Images()
"""


@pytest.mark.parametrize(("words", "tau"), [
    (["launch", "--max-restarts", "3", "data.workers=1"], "{fast: 16, slow: 4}"),
    pytest.param(["launch"], "16", marks=pytest.mark.slow), pytest.param(["profile"], "16", marks=pytest.mark.slow),
], ids=["training", "profiling", "profile"])
def test_bad_input_that_one_rank_meets_in_mid_run_ends_all(
    hvd_hetero: Callable[..., Any], tmp_path: Path, words: list[str], tau: str
) -> None:
    """A file that only one rank reads: the others wait in another collective, so nobody may wait for them.

    It would be met again, so that the job is not started again. Data workers that outlive the rank keep horovodrun from
    seeing its end before those of the others.
    """
    (tmp_path / "broken.py").write_text(BROKEN)
    settings = ["data.target=broken:data", "model.args={in_features: 8}", f"train.tau={tau}", "profile.seconds=0.2"]
    done = hvd_hetero([*words, f"run.dir={tmp_path / 'run'}", *settings], cwd=tmp_path, timeout=120)
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("hvd-hetero: error: rank 1 on localhost: ")]
    assert len(errors) == 1 and "is corrupt, in the batch of the samples [" in errors[0]
    assert "replace it" in errors[0]
    *before, last = done.stderr.splitlines()
    assert last in (errors[0], "hvd-hetero: error: the job failed: rank 1 on localhost ended first, with status 2; it "
                    f"said: {errors[0].partition('localhost: ')[2]}"), "what others say after it is not the last word"
    assert "starting 2 ranks on localhost" in done.stdout.splitlines()
    if "launch" in words:  # horovodrun's own words are kept where the run is
        assert "Exit code: 2" in (tmp_path / "run" / "horovodrun.log").read_text()
    if "profile" in words or tau == "16":
        assert "measuring how fast each class is" in done.stdout
    assert "Traceback" not in done.stderr and "restart" not in done.stderr
    assert processes_with(str(tmp_path)) == []


class Raises(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> None:
        raise KeyError(f"image {index}\nis not there")


def test_what_a_data_worker_raises_is_told_in_a_line() -> None:
    """The loader makes a text of several lines of it, whose last one is the cause."""
    for workers in (0, 1):
        with pytest.raises(KeyError) as caught:
            next(iter(DataLoader(Raises(), num_workers=workers)))
        assert in_a_line(caught.value) == "KeyError: 'image 0\\nis not there'"
    assert in_a_line(RuntimeError("one\n  two")) == "RuntimeError: one two"


@pytest.mark.parametrize(("code", "text"), [
    (3, "with status 3"), (-9, "killed by SIGKILL"), (137, "killed by SIGKILL"), (143, "killed by SIGTERM"),
    (200, "with status 200"),
])
def test_how_a_rank_ended(code: int, text: str) -> None:
    assert meaning_of(code) == text


LEAVES = """
import sys
from hvd_hetero.training import api
from hvd_hetero.training.stop_request import StopRequest

api.PEER_GONE_SEC = 3600.0
StopRequest.was_ended = True
api.let_cause_end_first()
StopRequest.was_ended = False
sys.stdin.read()
api.let_cause_end_first()
api._end(4, "nobody hears this")
"""


def test_a_survivor_waits_no_longer_than_it_is_heard_of() -> None:
    """Not where it was told to end, nor where nobody reads what it says, as of a rank on another host; and it ends."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", LEAVES], stdin=pipe, stdout=pipe, stderr=pipe)
    for stream in (process.stdout, process.stderr, process.stdin):
        assert stream is not None
        stream.close()
    assert process.wait(timeout=100) == EXIT_LOST
