"""Ranks that help (``cluster.classes.NAME.role``): with the newest average, while the others train and never wait."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hvd_hetero.config.load import load
from hvd_hetero.training.saved_model import load_weights

SCRIPT = Path(__file__).parents[1] / "ranks" / "helper_cases.py"
X = torch.randn(240, 6, generator=torch.Generator().manual_seed(1))
Y = (X.sum(1) > 0).long()
ROUNDS = 7  # of an epoch: 240 samples, 8 steps of 4 in a round


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, horovodrun: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("helpers")
    done = horovodrun(3, [sys.executable, SCRIPT, "all", folder], cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def output(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "said.json").read_text())
    return content


def losses(run: Path, round: int, indices: Any) -> torch.Tensor:
    """Losses of samples by the model of a checkpoint."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    load_weights(run, str(round), model, load([run / "config.yaml"]))
    with torch.no_grad():
        return nn.functional.cross_entropy(model(X[indices]), Y[indices], reduction="none")


def rows(folder: Path, run: str, file: str = "evaluations.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run / file).read_text().splitlines()]


def test_evaluations_are_of_the_models_of_their_rounds(folder: Path, output: dict[str, Any]) -> None:
    found = rows(folder, "stopped")
    assert len(found) >= 5  # an epoch's end was put off until there was one more, but for the last
    for row in found:
        by_checkpoint = float(losses(folder / "stopped", row["round"], range(100)).mean())
        assert row["eval_loss"] == pytest.approx(by_checkpoint, rel=1e-5)
        assert row["epoch"] == -(-row["round"] // ROUNDS)
        assert row["samples_seen"] == 32 * row["round"]
    numbers = [row["round"] for row in found]
    assert numbers == sorted(set(numbers))


def test_those_who_train_evaluate_the_last_model_alone(folder: Path, output: dict[str, Any]) -> None:
    """At the end of a run that was stopped and resumed; hooks hear of both kinds of evaluations."""
    epochs = rows(folder, "stopped", "metrics.jsonl")
    assert [row["epoch"] for row in epochs] == list(range(1, 7))
    assert ["eval_loss" in row for row in epochs] == [False] * 5 + [True]
    heard = output["stopped"]["evaluated"] + output["resumed"]["evaluated"]
    assert set(heard) == {row["round"] for row in rows(folder, "stopped")} | {6 * ROUNDS}
    statuses = [[(folder / f"{run}.status{rank}").read_text() for rank in range(3)] for run in ("stopped", "resumed")]
    assert statuses == [["3"] * 3, ["0"] * 3]
    summary = output["resumed"]["summary"]
    assert summary["world_size"] == 2 and [c["name"] for c in summary["classes"]] == ["fast", "slow"]
    assert summary["helpers"] == [{"name": "aide", "device": "cpu", "ranks": [2], "role": "evaluate"}]


def test_nobody_waits_for_a_helper_that_is_not_done_when_all_are_trained(folder: Path, output: dict[str, Any]) -> None:
    """It was at its first evaluation all the time; what it was at is dropped."""
    assert len(rows(folder, "stuck", "metrics.jsonl")) == 6
    assert not (folder / "stuck" / "evaluations.jsonl").exists()
    assert output["stuck"]["evaluated"] == [6 * ROUNDS]


def test_scores_are_losses_by_the_models_of_their_rounds(folder: Path, output: dict[str, Any]) -> None:
    epochs = output["scored"]["epochs"]
    assert len(epochs) == 6 and sum(bool(scored) for scored in epochs) >= 4
    taken = 0
    for number, scored in enumerate(epochs):
        for one in scored:
            assert len(one["indices"]) == len(one["losses"]) > 0
            if one["rounds"]:
                assert 1 <= one["rounds"] <= ROUNDS
                expected = losses(folder / "scored", number * ROUNDS + one["rounds"], one["indices"])
                assert np.allclose(one["losses"], expected, rtol=1e-4, atol=1e-6)
            taken += sum(a == b for a, b in zip(one["losses"], one["table"], strict=True))
    assert taken > 0  # of samples that were not trained on since


def test_a_helper_of_ranks_that_push_to_a_server(folder: Path) -> None:
    found = rows(folder, "served")
    assert found and all(row["eval_loss"] > 0 and 1 <= row["epoch"] <= 6 for row in found)
    assert len(rows(folder, "served", "metrics.jsonl")) == 6


def test_weights_by_steps_become_uniform_round_by_round(folder: Path) -> None:
    """tau 6 and 2: 3/4 and 1/4, until half of the 42 rounds are done; by the middle of each round."""
    fast, slow = (json.loads((folder / f"annealed.weights{rank}").read_text()) for rank in (0, 1))
    shares = [(number + 0.5) / (6 * ROUNDS) for number in range(6 * ROUNDS)]
    expected = [0.75 - 0.25 * max(0.0, (share - 0.5) / 0.5) for share in shares]
    assert fast == pytest.approx(expected) and slow == pytest.approx([1 - weight for weight in expected])


def test_a_helper_that_dies_ends_the_job_by_name(tmp_path: Path, horovodrun: Callable[..., Any]) -> None:
    done = horovodrun(3, [sys.executable, SCRIPT, "dies", tmp_path], cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert "rank 2" in done.stdout + done.stderr or "[2]" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_helper_of_ranks_that_meet_in_groups(tmp_path: Path, horovodrun: Callable[..., Any]) -> None:
    done = horovodrun(5, [sys.executable, SCRIPT, "groups", tmp_path], cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(tmp_path, "groups")
