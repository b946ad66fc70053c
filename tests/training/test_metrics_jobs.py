"""Metrics of all kinds on three ranks: what they come to is what one process finds of the saved model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_hetero.checkpoint import Store

RANKS = Path(__file__).parents[1] / "ranks"
sys.path.insert(0, str(RANKS))


@pytest.fixture(scope="module")
def runs(horovodrun: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the runs, and what was said."""
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    folder = tmp_path_factory.mktemp("metrics")
    done = horovodrun(3, [sys.executable, RANKS / "metrics.py", folder])
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout + done.stderr


def summary_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())["eval"]
    return content


def found_alone(path: Path) -> dict[str, float]:
    """The figures of a saved model, by plain calls on the whole test set."""
    import metrics
    from torch import nn
    from torchmetrics.functional.classification import multiclass_auroc, multiclass_f1_score

    net = metrics.Net()
    net.load_state_dict(torch.load(path, weights_only=True))
    inputs, targets = metrics.TEST
    with torch.no_grad():
        outputs = net(inputs)
    logits = outputs["logits"]
    return {
        "loss": float(nn.functional.cross_entropy(logits, targets)),
        "right": float((logits.argmax(1) == targets).float().mean()),
        **{f"all_{name}": value for name, value in metrics.of_all(outputs, targets).items()},
        "f1": float(multiclass_f1_score(logits, targets, 3)),
        "auc": float(multiclass_auroc(logits.softmax(1), targets, 3)),
    }


@pytest.mark.parametrize("name", ["kinds", "idle"])
def test_figures_are_those_of_the_whole_test_set(runs: tuple[Path, str], name: str) -> None:
    """Also where rank 0 has no part in the evaluation."""
    folder = runs[0] / name
    expected, found = found_alone(folder / "checkpoint" / "model.pt"), summary_of(folder)
    assert {key: found[f"final_{key}"] for key in expected} == pytest.approx(expected, rel=1e-4)
    if name == "kinds":
        averaged = found_alone(folder / "checkpoint" / "averaged.pt")
        assert {key: found[f"averaged_{key}"] for key in averaged} == pytest.approx(averaged, rel=1e-4)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {key: last[f"eval_{key}"] for key in expected} == {key: found[f"final_{key}"] for key in expected}
    assert "  f1 " in runs[1] and "  auc " in runs[1], "in the progress line"


def test_the_best_checkpoint_is_that_of_the_chosen_metric(runs: tuple[Path, str]) -> None:
    folder = runs[0] / "kinds"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lowest = min(row["eval_all_logits"] for row in rows)
    best = json.loads((folder / "checkpoints" / "best.json").read_text())
    assert summary_of(folder)["best_all_logits"] == lowest == -best["value"] and best["metric"] == "min all_logits"
    checkpoint = Store(folder).best()
    assert checkpoint is not None and checkpoint.meta.round == best["best"]


def test_patience_ends_a_run_which_can_be_resumed_with_more(runs: tuple[Path, str]) -> None:
    """The first evaluation is the best; two later it ends, and with a patience of four after two more."""
    folder = runs[0] / "patience"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert runs[1].count("ended by train.patience: 2 evaluations were no better") == 1
    assert runs[1].count("ended by train.patience: 4 evaluations were no better") == 1
    assert "resumed after epoch 3" in runs[1]
