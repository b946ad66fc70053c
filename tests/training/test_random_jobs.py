"""Random numbers in a job: each rank has its own, and nobody's depend on how often one evaluates."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from together import together

pytestmark = pytest.mark.horovod

OWN = Path(__file__).parents[1] / "ranks"
TRAIN = [sys.executable, "-m", "hvd_hetero", "train"]
"""Without the launcher, which would try out the model once more."""


def test_evaluating_more_often_leaves_the_run_as_it_is(horovodrun: Callable[..., Any], tmp_path: Path) -> None:
    settings = ["model.target=noise:Noisy", "data.target=noise:data", "train.loss_args={}", "train.epochs=3",
                "train.tau={fast: 4, slow: 2}", "cluster.classes.slow.slowdown=1", "run.trace_rounds=0"]  # fmt: skip
    found = []
    for often in (1, 3):
        folder = tmp_path / str(often)
        folder.mkdir()
        words = [*settings, f"eval.every_epochs={often}", f"model.args.folder={folder}", f"run.dir={folder}/run"]
        found.append((folder, partial(horovodrun, 2, [*TRAIN, *words], cwd=OWN)))
    for done in together(*(call for _, call in found)):
        assert done.returncode == 0, done.stdout + done.stderr
    rows, drawn, models = [], [], []
    for folder, _ in found:
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        rows.append([row["train_loss"] for row in lines] + [lines[-1]["eval_loss"], lines[-1]["eval_accuracy"]])
        drawn.append([json.loads((folder / rank).read_text()) for rank in "01"])
        models.append(torch.load(folder / "run" / "checkpoint" / "model.pt", weights_only=True))
        assert sum("eval_loss" in row for row in lines) == (3 if folder.name == "1" else 1)
    assert rows[0] == rows[1] and drawn[0] == drawn[1]
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
    assert not set(drawn[0][0]) & set(drawn[0][1]), "of Python, numpy and torch, on both ranks"
