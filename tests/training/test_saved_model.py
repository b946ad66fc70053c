"""What becomes of a run's model afterwards: ``hvd-hetero evaluate`` and ``hvd-hetero export``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

OWN = """
import os

import torch
from torch import nn

import hvd_hetero

class WhileTraining(hvd_hetero.Callback):
    def __init__(self):
        assert not os.path.exists("run/config.yaml")

class Net(nn.Sequential):
    def save_pretrained(self, folder):
        folder.mkdir()
        torch.save(self.state_dict(), folder / "weights.pt")

def model(width=8):
    return Net(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))
"""
ALONE = ["cluster.classes={a: {ranks: [0], threads: 1}}", "train.tau={a: 16}", "train.epochs=3",
         "train.micro_batches={a: 2}", "run.callbacks=[own_net:WhileTraining]", "model.target=own_net:model",
         "checkpoint.every_sec=null", "checkpoint.every_rounds=22", "checkpoint.keep=9",
         "run.dir=run"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, hvd_hetero: Callable[..., Any]) -> Path:
    """A run's folder is ``run`` in it."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "own_net.py").write_text(OWN)
    done = hvd_hetero(["train", *ALONE], cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def own_model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def test_evaluate_finds_what_the_run_found(folder: Path, hvd_hetero: Callable[..., Any]) -> None:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    done = hvd_hetero(["evaluate", "run"], cwd=folder)
    assert done.returncode == 0, done.stderr
    wanted = {name: rows[-1][name] for name in ("eval_loss", "eval_accuracy")}
    assert json.loads(done.stdout) == pytest.approx(wanted, rel=1e-6)
    first = hvd_hetero(["evaluate", "run", "--checkpoint", str(rows[0]["round"]), "eval.metrics={}"], cwd=folder)
    assert json.loads(first.stdout) == pytest.approx({"eval_loss": rows[0]["eval_loss"]}, rel=1e-6)


def test_exported_weights_load_with_a_line_of_plain_pytorch(folder: Path, hvd_hetero: Callable[..., Any]) -> None:
    run = folder / "run"
    output = [hvd_hetero(["export", "run", "--to", name, *more], cwd=folder) for name, more in (
        ("last.safetensors", []), ("last.pt", []), ("best.safetensors", ["--checkpoint", "best"]), ("pretrained", []),
    )]  # fmt: skip
    assert [done.returncode for done in output] == [0] * 4, output
    trained = torch.load(run / "checkpoint" / "model.pt", weights_only=True)
    model = own_model()
    model.load_state_dict(safetensors.torch.load_file(folder / "last.safetensors"))
    for file in (folder / "last.pt", folder / "pretrained" / "weights.pt"):
        weights = torch.load(file, weights_only=True)
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items()), file
        assert weights.keys() == trained.keys()
    assert all(torch.equal(trained[name], value) for name, value in model.state_dict().items())
    best = safetensors.torch.load_file(folder / "best.safetensors")
    number = json.loads((run / "checkpoints" / "best.json").read_text())["best"]
    shard = safetensors.torch.load_file(run / "checkpoints" / f"{number:06d}" / "rank0000.safetensors")
    vector = next(value for name, value in shard.items() if "vectors" in name)
    assert torch.equal(best["1.weight"].reshape(-1), vector[: 8 * 64])


@pytest.mark.slow
def test_a_best_evaluation_without_a_checkpoint_is_told(
    folder: Path, hvd_hetero: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    shutil.copy(folder / "own_net.py", tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best, saved = rows[1], json.loads((run / "checkpoints" / "best.json").read_text())
    words = ["evaluate", "run", "--checkpoint", "best"]
    before = hvd_hetero(words, cwd=tmp_path)
    assert before.returncode == 0 and "has no checkpoint" not in before.stderr
    best["eval_accuracy"] = 1.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = hvd_hetero(words, cwd=tmp_path)
    epoch = next(row["epoch"] for row in rows if row["round"] == saved["best"])
    assert "the best evaluation, accuracy 1 after epoch 2, has no checkpoint" in done.stderr
    assert f"{saved['value']:.4g} after epoch {epoch}" in done.stderr and json.loads(done.stdout)


@pytest.mark.parametrize(("words", "output"), [
    (["evaluate", "."], "RUN='.': is not the folder of a run"),
    (["evaluate", "run", "run"], "RUN=run run: is not one folder"),
    (["evaluate", "run", "--checkpoint", "first"], "--checkpoint='first': is none; give last, best"),
    (["evaluate", "run", "--checkpoint", "7"], "run/checkpoints/000007: is missing"),
    (["evaluate", "run", "model.args={width: 9}"], "model='own_net:model': is not the model of run"),
    (["evaluate", "run", "--checkpoint", "best", "model.args={width: 9}"], "model='own_net:model': is not the model"),
    (["export", "run", "--to", "a.bin"], "--to='a.bin': is of no known kind"),
    (["export", "run", "--to", "/dev/null/a.pt"], "--to='/dev/null': cannot be written"),
    (["export", "run", "--to", "a.pt", "--checkpoint", "averaged"], "--checkpoint='averaged': run/checkpoint/averaged"),
])  # fmt: skip
def test_what_is_refused(
    folder: Path, words: list[str], output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hvd_hetero.cli import main

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"hvd-hetero: error: {output}")
