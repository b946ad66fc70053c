"""Several trainings in one program: each knows nothing of the others, and leaves the process as it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hvd_hetero import algorithms
from hvd_hetero.checkpoint import Store
from hvd_hetero.config.load import load
from hvd_hetero.training.api import run_dir
from hvd_hetero.worker.components import UserObjects

pytestmark = pytest.mark.horovod

SCRIPT = Path(__file__).parents[1] / "ranks" / "many_calls.py"
REFUSED = {"refused everywhere", "refused between ranks", "refused after the start", "an array refused",
           "an optimizer refused"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def output(horovodrun: Callable[..., Any], folder: Path) -> str:
    done = horovodrun(2, [sys.executable, SCRIPT, folder], cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def ranks(output: str, folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def weights(run: Path) -> list[torch.Tensor]:
    return list(torch.load(run / "checkpoint" / "model.pt", weights_only=True).values())


def same(one: Path, other: Path) -> bool:
    return all(map(torch.equal, weights(one), weights(other)))


def test_each_is_refused_or_done_for_itself(ranks: list[dict[str, Any]], output: str) -> None:
    for found in ranks:
        calls = {name: call["status"] for name, call in found.items() if name != "begin"}
        assert calls == {name: 2 if name in REFUSED else "done" for name in calls}
    errors = [line.partition("hvd-hetero: error: ")[2] for line in output.splitlines() if "hvd-hetero: error: " in line]
    assert [error.partition("=")[0] for error in errors[:3]] == ["train.lr", "train.lr", "cluster.classes"]
    assert "-1" in errors[0] and "0.2: so it is for rank 1" in errors[1] and "'fast': 'cpu [1]'" in errors[2]
    assert errors[3].startswith("the model's kept.projection=") and "another one for rank 1 on localhost" in errors[3]
    assert errors[4].startswith("the optimizer's lr=0.2: so it is for rank 1, for rank 0 it is 0.1")
    assert errors[5].endswith("unsaved/checkpoint/model.pt is missing or old: KeyError: 'no weights today'")


def test_the_same_call_gives_the_same_model_whatever_was_before(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert same(folder / "first", folder / "again") and not same(folder / "first", folder / "other")
    kept = sorted(folder.glob("runs/*/checkpoint/model.pt"))
    assert len(kept) == 2 and all(same(path.parents[1], folder / "first") for path in kept)


def test_figures_of_another_metric_are_not_compared_with(ranks: list[dict[str, Any]], folder: Path) -> None:
    run = folder / "other"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["epochs"] == 3 and "final_accuracy" not in summary["eval"]
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert (best["metric"], best["best"]) == ("min loss", summary["rounds"]) and best["value"] < 0


def test_a_run_whose_model_cannot_be_saved_leaves_the_rest(ranks: list[dict[str, Any]], folder: Path) -> None:
    run = folder / "unsaved"
    assert json.loads((run / "summary.json").read_text())["epochs"] == 2
    assert Store(run).latest() is not None, "checkpoints ask the model for nothing but its tensors"


def test_the_process_is_as_it_was(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        begin = found.pop("begin")
        for name, call in found.items():
            assert call["facts"] == begin, name
            assert call["draws as before"] or name == "loop", "a loop's random numbers are its program's own"
            assert call["running"] == ["MainThread"], name
        assert found["last"]["files"] <= found["first"]["files"], "no file is left open"


def test_new_folders_are_named_after_what_is_given() -> None:
    """Not after the built-in data and model, which it takes the place of."""
    config, net = load((), {}, algorithms.method), nn.Sequential(nn.Linear(2, 2))
    for given, wanted in (
        (None, "biased_local_sgd-digits-mlp-"),
        (UserObjects(model=lambda: net), "biased_local_sgd-digits-Sequential-"),
        (UserObjects(net, train_data=[(1.0, 2)]), "biased_local_sgd-Sequential-"),
    ):
        name = run_dir(config, given, net).name
        assert name.startswith(wanted) and name[len(wanted)].isdigit()
