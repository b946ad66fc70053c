"""The configuration: how its layers are merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from hvd_hetero import Loop, train
from hvd_hetero.config.instantiate import call
from hvd_hetero.config.load import load
from hvd_hetero.config.schema import AlgorithmConfig, Config
from hvd_hetero.errors import ConfigError, UserError

DEFAULT = Path(__file__).parents[2] / "configs" / "default.yaml"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---- layers ---------------------------------------------------------------------------------------------------------


def test_later_layers_win_key_by_key(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "train: {epochs: 3, lr: 0.5}\nrun: {seed: 7}")
    second = write(tmp_path / "b.yaml", "train: {epochs: 4, batch_size: 5}")
    config = load([first, second], ["train.batch_size=6", "train.batch_size=8"])
    assert (config.train.epochs, config.train.lr, config.train.batch_size, config.run.seed) == (4, 0.5, 8, 7)
    assert config.train.optimizer == Config().train.optimizer


def test_base_is_the_layer_below_its_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "root.yaml", "train: {epochs: 1, lr: 0.1, warmup_rounds: 1}")
    write(tmp_path / "sub" / "middle.yaml", "base: ../root.yaml\ntrain: {epochs: 2, lr: 0.2}")
    top = write(tmp_path / "top.yaml", "base: sub/middle.yaml\ntrain: {epochs: 3}")
    train = load([top]).train
    assert (train.epochs, train.lr, train.warmup_rounds) == (3, 0.2, 1)


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
    def method(name: str) -> Any:
        def defaults(settings: Mapping[str, Any]) -> dict[str, str]:
            scheme = "unified" if settings["train"]["tau"] == 8 else "uniform"
            return {"sampling.scheme": scheme, "aggregation.weights": "uniform"}

        return AlgorithmConfig, defaults

    config = load(overrides=["aggregation.weights=steps", "train.tau=8"], method=method)
    assert (config.sampling.scheme, config.aggregation.weights) == ("unified", "steps")


def test_a_methods_own_options_are_keys(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Options(AlgorithmConfig):
        sync_every: int = dataclasses.field(default=32, metadata={"at_least": 1})

    def method(name: str) -> Any:
        return Options if name == "mine" else AlgorithmConfig, lambda settings: {}

    file = write(tmp_path / "mine.yaml", "algorithm: {name: mine, sync_every: 4}")
    assert load([file], method=method).algorithm == Options("mine", None, 4)
    with pytest.raises(ConfigError, match="algorithm.sync_every=0"):
        load([file], ["algorithm.sync_every=0"], method=method)
    with pytest.raises(ConfigError, match="algorithm.sync_every=4: is not a known key"):
        load([file], ["algorithm.name=other"], method=method)


def test_arguments_belong_to_what_they_are_for(tmp_path: Path) -> None:
    """Naming another optimizer must not hand it SGD's momentum; naming the same one again changes nothing."""
    assert load(overrides=["train.optimizer=Adam"]).train.optimizer_args == {}
    assert load(overrides=["train.optimizer_args={eps: 1}", "train.optimizer=Adam"]).train.optimizer_args == {"eps": 1}
    assert load(overrides=["train.optimizer=SGD"]).train.optimizer_args == {"momentum": 0.9}
    assert load(overrides=["train.loss=mse_loss", "train.loss_args.beta=2"]).train.loss_args["beta"] == 2
    file = tmp_path / "own.yaml"
    file.write_text("train: {loss: mse_loss}")
    assert load([file]).train.loss_args == {}


@pytest.mark.parametrize("target", ["model.target=own:net", "data.target=own:data"])
def test_a_loss_beside_the_users_own_is_smoothed_only_where_asked_for(target: str, tmp_path: Path) -> None:
    smoothed = {"label_smoothing": 0.1}
    assert load().train.loss_args == load(overrides=["model.name=cnn"]).train.loss_args == smoothed
    assert load(overrides=[target]).train.loss_args == load(user_objects=True).train.loss_args == {}
    assert load(overrides=[target, "train.loss_args.weight=[1, 2]"]).train.loss_args == {"weight": [1, 2]}
    output = write(tmp_path / "said.yaml", "train: {loss_args: {label_smoothing: 0.1}}")
    assert load([output], [target]).train.loss_args == load([output], user_objects=True).train.loss_args == smoothed
    saved = write(tmp_path / "saved.yaml", load([output], [target]).to_yaml())
    assert load([saved]).train.loss_args == smoothed, "a run goes on as it began"
    own = write(tmp_path / "own.yaml", "data: {target: 'own:data'}\nmodel: {target: 'own:net'}")
    assert load([own], ["data.name=digits", "model.name=mlp"]).train.loss_args == smoothed


X, Y = torch.zeros(24, 8), torch.zeros(24, dtype=torch.int64)


@pytest.mark.parametrize("begin", [
    lambda: train(model=nn.Linear(8, 3)), lambda: train(train_data=(X, Y)), lambda: train(test_data=(X, Y)),
    lambda: Loop(nn.Linear(8, 3), (X, Y)),
])  # fmt: skip
def test_a_loss_beside_what_a_program_gives_is_not_smoothed(
    begin: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(config: Config, given: Any) -> None:
        raise UserError(f"built with {config.train.loss_args}")

    monkeypatch.setattr("hvd_hetero.training.dry_run.build", build)
    monkeypatch.setattr("hvd_hetero.training.loop.build", build)
    with pytest.raises(UserError, match="built with {}"):
        begin()


def test_that_arguments_of_a_former_target_are_not_kept_is_told(tmp_path: Path) -> None:
    def other(path: str) -> None: ...

    file = write(tmp_path / "own.yaml", "data: {target: 'own:data', args: {path: here}}")
    call("data.args", other, load([file]).data.args)
    with pytest.raises(ConfigError, match="argument 'path' is missing.*former target are not kept"):
        call("data.args", other, load([file], ["data.target=own:other"]).data.args)


def test_a_name_in_a_higher_layer_wins_over_a_target_in_a_lower_one(tmp_path: Path) -> None:
    """Else data.name=digits on a command line would mean nothing; named both at once, the target counts."""
    file = write(tmp_path / "own.yaml", "data: {target: 'own:data', args: {n: 3}}\nmodel: {target: 'own:net'}")
    config = load([file], ["data.name=digits"])
    assert (config.data.target, config.data.args, config.model.target) == (None, {}, "own:net")
    for words in (["model.name=mlp", "model.target=own:net"], ["model.target=own:net", "model.name=mlp"]):
        assert load((), words).model.target == "own:net"
    assert load([file], ["data.name=null"]).data.target == "own:data"
    assert load((), {"data.target": "own:data", "data.name": "digits", "data.args": {"n": 3}}).data.args == {"n": 3}
    again = write(tmp_path / "again.yaml", load([file]).to_yaml())
    assert load([again]).data.target == "own:data", "a saved one names both"
