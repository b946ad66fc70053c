"""Keys by their former names: they work, with one warning, in files and on command lines."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_hetero.config import renamed
from hvd_hetero.config.load import load
from hvd_hetero.config.renamed import KEYS, RenamedKeyWarning
from hvd_hetero.errors import ConfigError


def test_former_names_work_and_are_named_in_one_warning(tmp_path: Path) -> None:
    file = tmp_path / "former.yaml"
    file.write_text("train: {passes: 7, epoch: pass, lr: 0.3}\neval: {every_passes: 2}\n")
    renamed._warn.cache_clear()
    with pytest.warns(RenamedKeyWarning) as output:
        config = load([file], ["train.epoch=fast_steps"])
    assert len(output) == 1
    assert all(f"{key} is now {KEYS[key]}" in str(output[0].message)
               for key in ("train.passes", "train.epoch", "eval.every_passes"))
    assert (config.train.epochs, config.train.epoch_length, config.eval.every_epochs) == (7, "fast_steps", 2)
    assert config.train.lr == 0.3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_former_value_is_todays(tmp_path: Path) -> None:
    assert load(None, ["eval.metric=none"]).eval.metrics == {}
    assert load(None, ["eval.metric=accuracy"]).eval.metrics == {"accuracy": "accuracy"}
    assert load(None, {"eval.metric": "a:b"}).eval.metrics == {"metric": "a:b"}
    assert load(None, ["train.epoch=pass"]).train.epoch_length == "dataset"
    assert load(None, {"train.epoch": "pass"}).train.epoch_length == "dataset"


def test_a_former_value_of_a_key_of_today(tmp_path: Path) -> None:
    file = tmp_path / "former.yaml"
    file.write_text("train: {autocast: false}\n")
    for given in ({"files": [file]}, *({"overrides": [f"train.autocast={no}"]} for no in ("false", "False"))):
        renamed._warn.cache_clear()
        with pytest.warns(RenamedKeyWarning, match="train.autocast=[Ff]alse is now train.autocast=null:") as output:
            assert load(**given).train.autocast is None
        assert len(output) == 1


def test_both_names_in_a_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "both.yaml"
    file.write_text("train: {passes: 7, epochs: 8}\n")
    with pytest.raises(ConfigError, match="train.passes=7: is train.epochs by its former name"):
        load([file])


def test_todays_names_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(None, ["train.epochs=3", "train.epoch_length=dataset"])


@pytest.mark.slow
def test_a_job_says_it_once(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    done = hvd_hetero(["launch", "train.passes=1", f"run.dir={tmp_path / 'run'}"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train.passes is now train.epochs") == 1
