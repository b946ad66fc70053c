"""Hosts that are not alike are found when a job starts, and named; so are hosts without the data."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from hvd_hetero.config.load import load
from hvd_hetero.errors import ConfigError
from hvd_hetero.training.fingerprint import PACKAGE, check_same, digest_of, fingerprint, shapes

pytestmark = pytest.mark.horovod

UNLIKE = Path(__file__).parents[1] / "ranks" / "unlike.py"
PREFIX = "hvd-hetero: error: "


def said_once(done: subprocess.CompletedProcess[str]) -> str:
    """The one message of a job that ended as bad input does."""
    text = done.stdout + done.stderr
    messages = [line.partition(PREFIX)[2] for line in text.splitlines() if PREFIX in line]
    assert len(messages) == 1, text
    assert not [line for line in text.splitlines() if line.startswith("[") and "Traceback" in line], text
    assert "Exit code: 2" in done.stderr, text
    return messages[0]


@pytest.mark.parametrize(("unlike", "words", "begins", "remedy"), [
    ("package", [], "source of hvd-hetero=", "up to date"),
    pytest.param("module", ["model.target=mine:norm_net"], "source of model.target=mine:norm_net=", "bring its file on",
                 marks=pytest.mark.slow),
    pytest.param(
        "train.lr=0.3", [],
        "train.lr=0.3: so it is for rank 1 on localhost, for rank 0 on localhost it is 0.02", "same",
        marks=pytest.mark.slow,
    ),
    ("run.name=x", ["model.target=own_parts:of_any_width"], "tensors of the model's 1=", "make the same model"),
])
def test_ranks_that_are_not_alike(
    horovodrun: Callable[..., Any], tmp_path: Path, unlike: str, words: list[str], begins: str, remedy: str
) -> None:
    done = horovodrun(2, [sys.executable, UNLIKE, unlike, tmp_path, "train", *words, f"run.dir={tmp_path / 'run'}"],
                      env={"PYTHONPATH": os.pathsep.join([str(UNLIKE.parent), os.environ.get("PYTHONPATH", "")])})
    message = said_once(done)
    assert message.startswith(begins) and "for rank 1 on localhost" in message and remedy in message
    assert not (tmp_path / "run").exists()


def test_a_host_without_the_data_is_named(horovodrun: Callable[..., Any], tmp_path: Path) -> None:
    """All ranks end at once, with the message of the one that has none."""
    (tmp_path / "0").mkdir()
    images = {f"x_{split}_coded": np.zeros((20, 3, 32, 32), np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "0" / "cifar10-1k.npz", **images, y_train=[0] * 20, y_test=[0] * 20)
    file = tmp_path / "a.yaml"
    file.write_text(f"data: {{name: cifar10, root: '{tmp_path}/${{oc.env:HOROVOD_RANK}}'}}\nmodel: {{name: resnet20}}")
    done = horovodrun(2, [sys.executable, "-m", "hvd_hetero", "train", file, f"run.dir={tmp_path / 'run'}"])
    expected = f"rank 1: data.root='{tmp_path}/1': is not a folder; set data.download=true, put there cifar-10-batches"
    assert said_once(done).startswith(expected)


def test_no_clock_is_compared_with_that_of_another_host() -> None:
    """Intervals are measured with clocks that nobody sets; the date is only written down."""
    source = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    clock = re.compile(r"time\.time\b|from time import|datetime|st_[amc]time|\.getmtime")
    assert not [path for path, text in source.items() if clock.search(text)]


def test_what_is_compared() -> None:
    found = fingerprint(load((), {"train.loss": "json:dumps"}), nn.Sequential(nn.Linear(2, 1)))
    assert found["tensors of the model's 0"].startswith("2 (")
    for what in ("version of hvd-hetero", "source of hvd-hetero", "version of Python", "version of torch",
                 "version of Horovod", "source of train.loss=json:dumps", "train.lr", "cluster.classes", "run.seed"):
        assert found[what]
    assert found["checkpoint.every_rounds"] == "null", "ranks meet by it"
    assert "run.dir" not in found and "data.root" not in found, "hosts may have things where they like"


def test_models_are_compared_by_their_parts() -> None:
    def made(width: int, freeze: bool = False) -> dict[str, str]:
        return shapes(nn.ModuleDict({"body": nn.Linear(2, 4), "head": nn.Linear(4, width).requires_grad_(not freeze)}))

    assert made(3) == made(3) and made(3).keys() == {"tensors of the model's body", "tensors of the model's head"}
    for other in (made(2), made(3, freeze=True)):
        with pytest.raises(ConfigError, match="head=.*for rank 1 on b.*make the same model"):
            check_same([made(3), other], ["a", "b"])


def test_the_first_difference_is_told_with_rank_host_and_both_values() -> None:
    alike = {"version of torch": "2.1", "train.lr": "0.1"}
    check_same([alike, alike, dict(alike)], ["a", "a", "b"])
    with pytest.raises(ConfigError) as caught:
        check_same([alike, alike, {"version of torch": "2.0", "train.lr": "0.2"}], ["a", "a", "b"])
    assert str(caught.value) == ("version of torch=2.0: so it is for rank 2 on b, for rank 0 on a it is 2.1; "
                                 "install the same torch on b as on a")
    with pytest.raises(ConfigError, match="x=3: .* it is nothing"):
        check_same([alike, {**alike, "x": "3"}], ["a", "b"])


def test_a_digest_sees_names_and_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("a")
    two.write_text("b")
    whole = digest_of(tmp_path, [one, two])
    assert whole == digest_of(tmp_path, [two, one])
    two.write_text("c")
    assert digest_of(tmp_path, [one, two]) != whole
    two.write_text("b")
    two.rename(tmp_path / "three.py")
    assert digest_of(tmp_path, [one, tmp_path / "three.py"]) != whole
