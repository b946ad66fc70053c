"""The configuration: layers, errors that name the nearest key, limits, and that a saved one can be read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from hvd_hetero.config import load, per_class
from hvd_hetero.errors import ConfigError
from hvd_hetero.schema import AlgorithmConfig, Config

DEFAULT = Path(__file__).parent.parent / "configs" / "default.yaml"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---- layers ---------------------------------------------------------------------------------------------------------


def test_later_layers_win_key_by_key(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "train: {passes: 3, lr: 0.5}\nrun: {seed: 7}")
    second = write(tmp_path / "b.yaml", "train: {passes: 4, batch_size: 5}")
    config = load([first, second], ["train.batch_size=6", "train.batch_size=8"])
    assert (config.train.passes, config.train.lr, config.train.batch_size, config.run.seed) == (4, 0.5, 8, 7)
    assert config.train.optimizer == Config().train.optimizer


def test_base_is_the_layer_below_its_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "root.yaml", "train: {passes: 1, lr: 0.1, warmup_rounds: 1}")
    write(tmp_path / "sub" / "middle.yaml", "base: ../root.yaml\ntrain: {passes: 2, lr: 0.2}")
    top = write(tmp_path / "top.yaml", "base: sub/middle.yaml\ntrain: {passes: 3}")
    train = load([top]).train
    assert (train.passes, train.lr, train.warmup_rounds) == (3, 0.2, 1)


def test_files_that_are_each_others_base(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml")
    write(tmp_path / "b.yaml", "base: a.yaml")
    with pytest.raises(ConfigError, match="circle"):
        load([tmp_path / "a.yaml"])


@pytest.mark.parametrize(("lower", "upper", "section", "key"), [
    ("cluster: {classes: {a: {ranks: 0}, b: {ranks: 1}}}", "cluster.classes={c: {ranks: 0-1}}", "cluster", "classes"),
    ("train: {tau: {a: 1, b: 2}}", "train.tau={a: 3}", "train", "tau"),
    ("model: {args: {width: 3, depth: 4}}", "model.args={depth: 5}", "model", "args"),
    ("train: {optimizer_args: {momentum: 0.5, nesterov: true}}", "train.optimizer_args={}", "train", "optimizer_args"),
])
def test_free_mappings_are_replaced_whole(tmp_path: Path, lower: str, upper: str, section: str, key: str) -> None:
    """By a file as by the command line: a leftover of the layer below would be a setting nobody wrote."""
    file = write(tmp_path / "lower.yaml", lower)
    value = yaml.safe_load(upper.partition("=")[2])
    other = write(tmp_path / "upper.yaml", yaml.safe_dump({section: {key: value}}))
    for config in (load([file], [upper]), load([file, other])):
        assert getattr(getattr(config, section), key) == value


def test_an_override_reaches_inside_a_free_mapping() -> None:
    config = load(overrides=["cluster.classes.slow.slowdown=4", "train.optimizer_args.nesterov=true"])
    assert config.cluster.classes["slow"] == {"device": "cpu", "ranks": [1], "slowdown": 4}
    assert config.cluster.classes["fast"] == Config().cluster.classes["fast"]
    assert config.train.optimizer_args == {"momentum": 0.9, "nesterov": True}
    assert Config().cluster.classes["slow"]["slowdown"] == 8.0, "the defaults themselves must not change"


def test_a_programs_own_mappings_are_left_alone() -> None:
    classes = {"only": {"ranks": [0]}}
    args = {"momentum": 0.1}
    config = load(overrides={
        "cluster.classes": classes, "cluster.classes.only.slowdown": 2.0,
        "train.optimizer_args": args, "train.optimizer_args.momentum": 0.2,
    })
    assert config.cluster.classes == {"only": {"ranks": [0], "slowdown": 2.0}}
    assert config.train.optimizer_args == {"momentum": 0.2}
    assert classes == {"only": {"ranks": [0]}} and args == {"momentum": 0.1}


def test_classes_as_a_list(tmp_path: Path) -> None:
    file = write(tmp_path / "list.yaml", "cluster: {classes: [{name: a, ranks: 0}, {name: b, ranks: 1-2}]}")
    assert load([file]).cluster.classes == {"a": {"ranks": 0}, "b": {"ranks": "1-2"}}
    config = load([file], ["cluster.classes.b.slowdown=3"])
    assert config.cluster.classes == {"a": {"ranks": 0}, "b": {"ranks": "1-2", "slowdown": 3}}


def test_overrides_are_yaml_or_python_values() -> None:
    texts = load(overrides=["train.tau={fast: 32, slow: 4}", "run.dir=x=y", "run.overwrite=true", "data.root="])
    values = load(overrides={"train.tau": {"fast": 32, "slow": 4}, "run.dir": "x=y", "run.overwrite": True})
    assert texts == values
    assert (texts.train.tau, texts.run.dir, texts.data.root) == ({"fast": 32, "slow": 4}, "x=y", None)


def test_a_files_reference_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FOLDER", "/some/where")
    file = write(tmp_path / "env.yaml", "data: {root: '${oc.env:SOME_FOLDER}'}")
    config = load([file])
    assert config.data.root == "/some/where"
    assert "/some/where" in config.to_yaml(), "what is saved no longer depends on the environment"


def test_a_method_fills_what_is_left_null() -> None:
    def method(name: str) -> tuple[type[AlgorithmConfig], dict[str, str]]:
        return AlgorithmConfig, {"sampling.scheme": "unified", "aggregation.weights": "uniform"}

    config = load(overrides=["aggregation.weights=steps"], method=method)
    assert (config.sampling.scheme, config.aggregation.weights) == ("unified", "steps")


def test_a_methods_own_options_are_keys(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Options(AlgorithmConfig):
        sync_every: int = dataclasses.field(default=32, metadata={"at_least": 1})

    def method(name: str) -> tuple[type[AlgorithmConfig], dict[str, str]]:
        return (Options, {}) if name == "mine" else (AlgorithmConfig, {})

    file = write(tmp_path / "mine.yaml", "algorithm: {name: mine, sync_every: 4}")
    assert load([file], method=method).algorithm == Options("mine", None, 4)
    with pytest.raises(ConfigError, match="algorithm.sync_every=0"):
        load([file], ["algorithm.sync_every=0"], method=method)
    with pytest.raises(ConfigError, match="algorithm.sync_every=4: is not a known key"):
        load([file], ["algorithm.name=other"], method=method)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("override", "key", "remedy"), [
    ("train.pases=3", "train.pases", "did you mean 'train.passes'?"),
    ("train.batchsize=3", "train.batchsize", "did you mean 'train.batch_size'?"),
    ("sampling.high_lossratio=0", "sampling.high_lossratio", "did you mean 'sampling.high_loss_ratio'?"),
    ("passes=3", "passes", "did you mean 'train.passes'?"),
    ("train.seed=3", "train.seed", "did you mean 'run.seed'?"),
    ("trian.passes=3", "trian.passes", "did you mean"),
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
    file = write(tmp_path / "a.yaml", "train: {pases: 3}")
    with pytest.raises(ConfigError, match=r"train.pases=3: .*'train.passes'"):
        load([file])


@pytest.mark.parametrize(("override", "key"), [
    ("train.passes=many", "train.passes"),
    ("train.passes=1.5", "train.passes"),
    ("train.passes=true", "train.passes"),
    ("train.passes=[3]", "train.passes"),
    ("train.passes=null", "train.passes"),
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
    ("train.passes=0", "1"),
    ("train.tau=0", "1"),
    ("train.tau={fast: 8, slow: 0}", "{fast: 8, slow: 1}"),
    ("train.batch_size=0", "1"),
    ("train.batch_size={fast: -3, slow: 1}", "{fast: 1, slow: 1}"),
    ("train.lr=0", "1e-9"),
    ("train.lr=.nan", "1e-9"),
    ("train.lr=.inf", "1e9"),
    ("train.warmup_rounds=-1", "0"),
    ("train.epoch=epoch", "fast_steps"),
    ("sampling.high_loss_ratio=-0.001", "0"),
    ("sampling.high_loss_ratio=1.001", "1"),
    ("sampling.high_loss_ratio=.nan", "0.5"),
    ("sampling.scheme=biased", "separate"),
    ("aggregation.weights=step", "steps"),
    ("aggregation.mode=sometimes", "blocking"),
    ("aggregation.path=round", "hierarchical"),
    ("data.workers=-1", "0"),
    ("eval.every_passes=0", "1"),
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
    if item.metadata
]


@pytest.mark.parametrize(("key", "limits"), LIMITED, ids=[key for key, _ in LIMITED])
def test_every_declared_limit_is_enforced(key: str, limits: dict[str, Any]) -> None:
    """Whatever key is added later."""
    outside = {"at_least": lambda x: x - 1, "at_most": lambda x: x + 1, "above": lambda x: x, "choices": lambda x: "?"}
    for kind, limit in limits.items():
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


def test_arguments_belong_to_what_they_are_for(tmp_path: Path) -> None:
    """Naming another optimizer must not hand it SGD's momentum; naming the same one again changes nothing."""
    assert load(overrides=["train.optimizer=Adam"]).train.optimizer_args == {}
    assert load(overrides=["train.optimizer_args={eps: 1}", "train.optimizer=Adam"]).train.optimizer_args == {"eps": 1}
    assert load(overrides=["train.optimizer=SGD"]).train.optimizer_args == {"momentum": 0.9}
    assert load(overrides=["train.loss=mse_loss", "train.loss_args.beta=2"]).train.loss_args["beta"] == 2
    file = tmp_path / "own.yaml"
    file.write_text("train: {loss: mse_loss}")
    assert load([file]).train.loss_args == {}
