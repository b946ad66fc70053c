"""Runs that go on from a checkpoint: the same, to the last bit, as if nothing had happened."""

from __future__ import annotations

import json
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
