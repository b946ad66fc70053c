"""What is wrong with a configuration: errors that name the key, or the nearest one, and limits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from hvd_hetero.config.load import load, per_class
from hvd_hetero.config.schema import Config
from hvd_hetero.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(("override", "key", "remedy"), [
    ("train.epohs=3", "train.epohs", "did you mean 'train.epochs'?"),
    ("train.batchsize=3", "train.batchsize", "did you mean 'train.batch_size'?"),
    ("sampling.high_lossratio=0", "sampling.high_lossratio", "did you mean 'sampling.high_loss_ratio'?"),
    ("epochs=3", "epochs", "did you mean 'train.epochs'?"),
    ("train.seed=3", "train.seed", "did you mean 'run.seed'?"),
    ("trian.epochs=3", "trian.epochs", "did you mean"),
    ("zzzzzz=3", "zzzzzz", "known are"),
    ("cluster.classes.slow.slowdwn=3", "cluster.classes.slow.slowdwn", "did you mean 'cluster.classes.slow.slowdown'?"),
    ("cluster.classes.slwo.slowdown=3", "cluster.classes.slwo.slowdown", "did you mean 'slow'?"),
    ("cluster.classes.slow.ranks.x=3", "cluster.classes.slow.ranks.x", "set cluster.classes.slow.ranks as a whole"),
    ("model.depth.x=3", "model.depth.x", "did you mean"),
])
def test_an_unknown_key_names_the_nearest(override: str, key: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(overrides=[override])
    assert caught.value.key == key
    assert str(caught.value.value) == "3" or caught.value.value in (0, 3)
    assert remedy in caught.value.remedy


def test_an_unknown_key_in_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "train: {epohs: 3}")
    with pytest.raises(ConfigError, match=r"train.epohs=3: .*'train.epochs'"):
        load([file])


@pytest.mark.parametrize(("override", "key"), [
    ("train.epochs=many", "train.epochs"),
    ("train.epochs=1.5", "train.epochs"),
    ("train.epochs=true", "train.epochs"),
    ("train.epochs=[3]", "train.epochs"),
    ("train.epochs=null", "train.epochs"),
    ("train.lr=quick", "train.lr"),
    ("run.overwrite=perhaps", "run.overwrite"),
    ("run.dir={a: 1}", "run.dir"),
    ("model.args=3", "model.args"),
    ("train.optimizer_args=[1]", "train.optimizer_args"),
    ("train.tau=1.5", "train.tau"),
    ("train.tau={fast: x, slow: 1}", "train.tau.fast"),
    ("train.tau=true", "train.tau"),
    ("train.tau={}", "train.tau"),
    ("train.batch_size=many", "train.batch_size"),
    ("train.batch_size={fast: 1, slow: 2.5}", "train.batch_size.slow"),
    ("train=3", "train"),
    ("algorithm=biased_local_sgd", "algorithm"),
    ("cluster.classes=3", "cluster.classes"),
    ("cluster.classes={a: 3}", "cluster.classes.a"),
    ("cluster.classes=[{ranks: 0}]", "cluster.classes"),
    ("cluster.classes=[{name: a, ranks: 0}, {name: a, ranks: 1}]", "cluster.classes"),
    ("cluster.classes.slow.slowdown=much", "cluster.classes.slow.slowdown"),
    ("cluster.classes.slow=3", "cluster.classes.slow"),
    ("cluster.affinity.on=3", "cluster.affinity.on"),
    ("data.root=${nothing.there}", "data.root"),
    ("train.lr={a: [", "train.lr"),
    ("train.lr", "argument"),
    ("=3", "argument"),
])
def test_a_wrong_type_names_its_key(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(overrides=[override])
    assert caught.value.key == key
    assert caught.value.remedy


@pytest.mark.parametrize(("override", "last_good"), [
    ("run.seed=-1", "0"),
    ("train.epochs=0", "1"),
    ("train.tau=0", "1"),
    ("train.tau={fast: 8, slow: 0}", "{fast: 8, slow: 1}"),
    ("train.batch_size=0", "1"),
    ("train.batch_size={fast: -3, slow: 1}", "{fast: 1, slow: 1}"),
    ("train.lr=0", "1e-9"),
    ("train.lr=.nan", "1e-9"),
    ("train.lr=.inf", "1e9"),
    ("train.warmup_rounds=-1", "0"),
    ("train.epoch_length=epoch", "fast_steps"),
    ("sampling.high_loss_ratio=-0.001", "0"),
    ("sampling.high_loss_ratio=1.001", "1"),
    ("sampling.high_loss_ratio=.nan", "0.5"),
    ("sampling.scheme=biased", "separate"),
    ("aggregation.weights=step", "steps"),
    ("aggregation.mode=sometimes", "blocking"),
    ("aggregation.path=round", "hierarchical"),
    ("data.workers=-1", "0"),
    ("eval.every_epochs=0", "1"),
    ("eval.batch_size=0", "1"),
    ("profile.seconds=0", "0.1"),
    ("profile.warmup_steps=-1", "0"),
    ("cluster.gpu_cores=0", "1"),
    ("cluster.start_timeout_sec=0", "1"),
    ("cluster.gloo_timeout_sec=0", "1"),
    ("cluster.cycle_time_ms=0", "0.1"),
    ("cluster.classes.slow.slowdown=0.99", "1"),
    ("cluster.classes.slow.threads=0", "1"),
    ("cluster.classes.slow.device=gpu", "cuda"),
])
def test_every_limit(override: str, last_good: str) -> None:
    """What is just outside is refused by its key and value, what is just inside is taken."""
    key = override.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        load(overrides=[override])
    assert caught.value.key.startswith(key)
    assert caught.value.problem and caught.value.remedy
    load(overrides=[f"{key}={last_good}"])


LIMITED = [
    (f"{group.name}.{item.name}", item.metadata)
    for group in dataclasses.fields(Config)
    for item in dataclasses.fields(getattr(Config(), group.name))
    if item.metadata.keys() - {"decides"}
]


@pytest.mark.parametrize(("key", "limits"), LIMITED, ids=[key for key, _ in LIMITED])
def test_every_declared_limit_is_enforced(key: str, limits: dict[str, Any]) -> None:
    """Whatever key is added later."""
    outside = {"at_least": lambda x: x - 1, "at_most": lambda x: x + 1, "above": lambda x: x, "choices": lambda x: "?"}
    for kind in limits.keys() - {"decides"}:
        limit = limits[kind]
        with pytest.raises(ConfigError) as caught:
            load(overrides={key: outside[kind](limit)})
        assert caught.value.key == key


@pytest.mark.parametrize("content", ["- a\n- b", "train: [", "just text", "\x00"])
def test_a_file_that_is_no_configuration(tmp_path: Path, content: str) -> None:
    file = write(tmp_path / "broken.yaml", content)
    with pytest.raises(ConfigError) as caught:
        load([file])
    assert str(file) in str(caught.value) or caught.value.key == content
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml.*does not exist"):
        load([tmp_path / "none.yaml"])


@pytest.mark.parametrize("section", ["data", "model"])
def test_neither_name_nor_target(section: str) -> None:
    with pytest.raises(ConfigError, match=f"set {section}.name or {section}.target"):
        load(overrides=[f"{section}.name=null"])
    assert load(overrides=[f"{section}.name=null", f"{section}.target=own:make"])


def test_per_class() -> None:
    names = ["a", "b"]
    assert per_class("train.tau", 3, names) == {"a": 3, "b": 3}
    assert per_class("train.tau", {"b": 2, "a": 1}, names) == {"a": 1, "b": 2}
    with pytest.raises(ConfigError, match="train.tau.bb=2: .*did you mean 'b'?"):
        per_class("train.tau", {"a": 1, "bb": 2}, names)
    with pytest.raises(ConfigError, match="nothing for class b"):
        per_class("train.tau", {"a": 1}, names)
    with pytest.raises(ConfigError, match="train.tau.b=0"):
        per_class("train.tau", {"a": 1, "b": 0}, names)
