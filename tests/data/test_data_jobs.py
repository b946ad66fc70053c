"""Whole jobs on data that differ between ranks, lose samples on the way, or are of unusual kinds."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from together import together

pytestmark = pytest.mark.horovod

OWN = """
import os
import random
from collections import UserDict

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate

import hvd_hetero
from hvd_hetero.data import MapSource

RANK = os.environ.get("HOROVOD_RANK")
X = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x, names, parts, nothing=None):
        assert isinstance(names[0], str) and isinstance(parts, list) and nothing is None
        return self.linear(x)


def shuffled():
    order = np.random.permutation(80)
    random.shuffle(order)
    order = order[torch.randperm(80).numpy()]
    print("order", RANK, order[:6].tolist(), flush=True)
    rows = [UserDict(x=X[i], names=f"{i}.png", parts=[X[i], [0.5, 1]], nothing=None, labels=int(Y[i])) for i in order]
    return rows[:60], rows[60:]


def unequal():
    return (X[:60], Y[:60]), (X[60:], Y[60:] if RANK != "1" else 1 - Y[60:])


def dropped():
    rows = [None if i == 37 else (X[i], int(Y[i])) for i in range(80)]
    return MapSource(rows, collate=lambda items: default_collate([item for item in items if item])), (X, Y)


def loop(folder):
    tau = {"train.tau": {"fast": 4, "slow": 2}, "train.batch_size": 4, "run.dir": folder}
    for round in hvd_hetero.Loop(nn.Linear(4, 2), dropped()[0], tau):
        for x, y in round:
            round.losses(torch.zeros(len(y)))
"""
SETTINGS = ["train.tau={fast: 8, slow: 2}", "train.batch_size=4", "train.loss_args={}", "train.epochs=2",
            "cluster.classes={fast: {ranks: 0}, slow: {ranks: 1}}"]  # fmt: skip
LINEAR = ["model.name=mlp", "model.args={in_features: 4, hidden: [4], num_classes: 2}"]
LOST = r"training data=3 targets: they came back for the batch of the 4 samples \[[0-9, ]*\b37\b[0-9, ]*\]; return each"


def test_jobs_on_unusual_data(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)

    def launch(*words: str) -> Any:
        folder = f"run.dir={tmp_path / words[0].rpartition(':')[2]}"
        return hvd_hetero(["launch", *words, *SETTINGS, folder], cwd=tmp_path)

    shuffled, unequal, dropped = together(
        lambda: launch("data.target=own:shuffled", "model.target=own:Net"),
        lambda: launch("data.target=own:unequal", *LINEAR),
        lambda: launch("data.target=own:dropped", *LINEAR, "--max-restarts", "3"),
    )
    # a data function without a seed reads the same on all ranks
    assert shuffled.returncode == 0, shuffled.stderr
    orders = re.findall(r"order (None|0|1) (\[.*\])", shuffled.stdout)
    assert {rank for rank, _ in orders} == {"None", "0", "1"} and len({order for _, order in orders}) == 1
    # what differs is refused before training, once for all ranks
    assert unequal.returncode == 2
    errors = [line for line in unequal.stderr.splitlines() if "error: " in line]
    output = "hvd-hetero: error: test data=targets: rank 1 on localhost has read other ones than rank 0 on localhost; "
    assert len(errors) == 1 and errors[0].startswith(output)
    assert not (tmp_path / "unequal").exists()
    # a batch that comes back shorter ends all ranks there, and is not tried again
    assert dropped.returncode == 2 and re.search(rf"error: rank [01] on localhost: {LOST}", dropped.stderr)
    assert "restart" not in dropped.stderr and (tmp_path / "dropped" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_loop_of_ones_own_ends_the_same_way(horovodrun: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    program = f"import own; own.loop({str(tmp_path / 'run')!r})"
    done = horovodrun(2, [sys.executable, "-c", program], cwd=tmp_path)
    assert "Exit code: 2" in done.stderr and re.search(rf"error: rank [01] on \S+: {LOST}", done.stderr), done.stderr
