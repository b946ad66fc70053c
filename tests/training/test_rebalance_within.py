"""A wrong tau is put right within the epoch, in a real job."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.horovod

SAMPLES = 1437


@pytest.mark.slow
def test_tau_is_put_right_and_the_rest_of_the_epoch_dealt_anew(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    """Delays begin with the training, after speeds were measured: 10 ms a step for fast, 20 for slow."""
    delays = ["delays.distribution=linear_skew", "delays.sec=0.02", "delays.seed=0", "profile.seconds=0.2"]
    settings = ["train.tau=64", "train.batch_size=1", "train.epochs=1", "checkpoint.every_sec=null",
                "model.args={hidden: [1500, 1500]}"]  # fmt: skip
    done = hvd_hetero(["launch", *settings, *delays, f"run.dir={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    changes = [(int(a), int(b)) for a, b in re.findall(r"tau of slow (\d+) -> (\d+)", done.stdout + done.stderr)]
    assert changes, "within the only epoch there is"
    assert changes[-1][1] > changes[0][0], "the delays make the ranks less unlike"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    fast, slow = summary["classes"]
    assert slow["tau"] == changes[-1][1]
    assert summary["epochs"] == 1 and fast["steps"] == 64 * summary["rounds"]
    taus = [tau for change in changes for tau in change]
    assert summary["rounds"] * min(taus) < slow["steps"] < summary["rounds"] * max(taus)
    assert SAMPLES - 2 * (64 + slow["tau"]) < summary["samples_seen"] == fast["steps"] + slow["steps"] <= SAMPLES
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["tau"] == {"fast": 64, "slow": slow["tau"]} and row["samples_seen"] == summary["samples_seen"]
