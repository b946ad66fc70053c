"""A class that cannot take one step in a round: the ways out, in the plan and in whole jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.local_steps import derive_tau, shrink_batches, too_slow_classes
from hvd_hetero.planning.plan import make_plan

STEP_SEC = {"fast": 0.01, "mid": 0.04, "slow": 0.5}
BATCH = {"fast": 32, "mid": 32, "slow": 32}
FACTS = tuple(RankFacts(rank, "localhost", rank, (), "cpu", (0,)) for rank in range(4))
CLUSTER = Cluster(
    (DeviceClass("fast", "cpu", (0, 1)), DeviceClass("mid", "cpu", (2,)), DeviceClass("slow", "cpu", (3,))), FACTS
)


def test_which_are_too_slow() -> None:
    assert too_slow_classes(32, STEP_SEC) == {"slow": pytest.approx(50)}
    assert too_slow_classes(50, STEP_SEC) == {}, "just fast enough"


def test_it_is_an_error_that_names_the_ways_out() -> None:
    with pytest.raises(ConfigError, match=r"slow is 50\.0 times slower.*train\.tau=50.*cluster\.too_slow"):
        derive_tau(32, STEP_SEC)


def test_left_out_it_takes_no_steps_and_has_no_weight() -> None:
    taus = derive_tau(32, STEP_SEC, "leave_out")
    assert taus == {"fast": 32, "mid": 8, "slow": 0}
    for weights, expected in (("steps", [32 / 72, 8 / 72, 0]), ("uniform", [1 / 3, 1 / 3, 0])):
        plan = make_plan(CLUSTER, 10_000, taus, BATCH, weights=weights, step_sec=STEP_SEC)
        assert [c.weight for c in plan.classes] == pytest.approx(expected)
        assert plan.epoch_samples()["slow"] == 0 and [c.name for c in plan.training] == ["fast", "mid"]
        assert sum(c.weight * len(c.ranks) for c in plan.classes) == pytest.approx(1)


def test_a_shrunk_batch_fits_into_a_round_and_weighs_as_much_as_its_samples() -> None:
    batch = shrink_batches(32, STEP_SEC, BATCH)
    assert batch == {"fast": 32, "mid": 32, "slow": 20}, "20.48 samples in 0.32 s"
    with_margin = shrink_batches(32, STEP_SEC, BATCH, 0.1)
    assert with_margin == {"fast": 32, "mid": 32, "slow": 18}, "18.47 samples in 0.32 s, less 9.8 %"
    taus = {"fast": 32, "mid": 8, "slow": 1}
    plan = make_plan(CLUSTER, 10_000, taus, batch, weights="steps", whole_batch=BATCH)
    samples = [c.tau * c.batch_size for c in plan.classes]
    assert [c.weight for c in plan.classes] == pytest.approx([s / (2 * 1024 + 256 + 20) for s in samples])


def test_no_batch_becomes_smaller_than_the_model_can_be_trained_on() -> None:
    """Others wait for it then. A batch that was smaller from the start stays as it is."""
    step_sec, batch = {"fast": 0.01, "slow": 0.5}, {"fast": 16, "slow": 2}
    assert shrink_batches(25, step_sec, batch) == {"fast": 16, "slow": 1}
    assert shrink_batches(25, step_sec, batch, min_batch=2) == batch
    assert shrink_batches(25, step_sec, {"fast": 16, "slow": 8}, min_batch=2) == {"fast": 16, "slow": 4}


def test_not_even_one_sample_fits() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.too_slow.*not even a batch of one"):
        shrink_batches(32, {"fast": 0.01, "slow": 20.0}, {"fast": 32, "slow": 32})


MODEL = """
import torch
from torch import nn


class Observed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("evaluated", torch.zeros(1, dtype=torch.long))
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

    def forward(self, x):
        if not self.training:
            self.evaluated += 1
        return self.layers(x)
"""


@pytest.mark.horovod
def test_ranks_left_out_learn_of_what_an_evaluation_changes(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    """They take part in the averages of the next round, and have to bring the same tensors there."""
    (tmp_path / "observed.py").write_text(MODEL)
    left_out = ["cluster.classes={fast: {ranks: [0, 1]}, slow: {ranks: [2], slowdown: 60}}",
                "train.tau=6", "train.batch_size=16", "cluster.too_slow=leave_out"]  # fmt: skip
    brief = ["train.epochs=3", "profile.seconds=0.3", "profile.reuse=false", "run.watchdog_sec=60"]
    own = ["model.target=observed:Observed", f"run.dir={tmp_path / 'run'}"]
    done = hvd_hetero(["launch", *left_out, *brief, *own], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cluster.too_slow=leave_out" in done.stderr, "the slow class is left out"
    model = torch.load(tmp_path / "run" / "checkpoint" / "model.pt", weights_only=True)
    assert model["evaluated"] >= 3


@pytest.mark.slow
@pytest.mark.horovod
@pytest.mark.parametrize("way", ["shrink_batch", "wait_avoiding", "leave_out"])
def test_whole_jobs(hvd_hetero: Callable[..., Any], tmp_path: Path, way: str) -> None:
    speeds = ["cluster.classes.slow.slowdown=60", "train.tau=16", "train.batch_size=16", "train.epochs=2"]
    profile = ["profile.seconds=0.3", "profile.reuse=false"]
    done = hvd_hetero(["launch", *speeds, *profile, f"cluster.too_slow={way}", f"run.dir={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"cluster.too_slow={way}" in done.stderr, "it is said"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    fast, slow = summary["classes"]
    assert fast["tau"] == 16
    assert slow["steps"] == 0 if way == "leave_out" else slow["tau"] >= 1
    assert (slow["batch_size"] < 16) == (way == "shrink_batch")
    assert ("partial" in summary) == (way == "wait_avoiding")
    assert summary["eval"]["final_accuracy"] > 0.8
