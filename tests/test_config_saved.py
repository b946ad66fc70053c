"""A saved configuration reads back the same, and configs/default.yaml is the schema with its built-in values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from hvd_hetero import algorithms
from hvd_hetero.config import Config, device_classes, load

DEFAULT = Path(__file__).parent.parent / "configs" / "default.yaml"

FULL: dict[str, Any] = {
    "run.dir": "some: where # odd", "run.name": "1e3", "run.seed": 5, "data.root": "yes",
    "data.args": {"train_limit": 9},
    "cluster.classes": {"a": {"device": "cuda", "hosts": "n*", "slots": "0-1", "threads": 2}, "b": {"ranks": [0, 3]}},
    "train.tau": {"a": 32, "b": 4}, "train.lr": 1e-7, "train.scheduler": "MultiStepLR",
    "train.scheduler_args": {"milestones": [1, 2]}, "model.args": {"hidden": [], "deep": {"x": None, "y": "null"}},
}


@pytest.mark.parametrize("overrides", [{}, FULL, {"cluster.classes": "auto"}])
def test_a_saved_configuration_reads_back_the_same(tmp_path: Path, overrides: dict[str, Any]) -> None:
    config = load((), overrides, algorithms.method)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    again = load([file], (), algorithms.method)
    assert again == config
    assert again.digest() == config.digest()


def test_digest_is_of_what_decides_the_run() -> None:
    base = load()
    assert load(overrides={"run.dir": "elsewhere", "run.overwrite": True}).digest() == base.digest()
    for override in ("run.seed=1", "train.lr=0.2", "cluster.classes.slow.slowdown=9", "train.tau=31"):
        assert load(overrides=[override]).digest() != base.digest(), override


def test_default_yaml_names_every_key_with_its_built_in_value() -> None:
    written = yaml.safe_load(DEFAULT.read_text())
    schema = {group.name: getattr(Config(), group.name) for group in dataclasses.fields(Config)}
    assert set(written) == set(schema)
    for name, section in schema.items():
        assert written[name] == dataclasses.asdict(section), name
    assert load([DEFAULT], (), algorithms.method) == load((), (), algorithms.method)


def test_every_key_of_default_yaml_is_explained() -> None:
    """A comment on its line; sections and the keys inside the example classes aside."""
    groups = [getattr(Config(), group.name) for group in dataclasses.fields(Config)]
    keys = {item.name for group in groups for item in dataclasses.fields(group)}
    lines = [line for line in DEFAULT.read_text().splitlines() if line.startswith("  ") and line[2] not in " #"]
    assert {line.split(":")[0].strip() for line in lines} == keys
    assert [line for line in lines if "#" not in line] == []


RUNS = sorted(path for path in DEFAULT.parent.glob("**/*.yaml") if path.parent.name != "compare")


@pytest.mark.parametrize("file", RUNS, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    config = load([file], (), algorithms.method)
    assert device_classes(config.cluster.classes)


def test_device_classes_have_defaults() -> None:
    read = device_classes({"a": {"ranks": [0]}, "b": {"hosts": "n*", "slots": 0, "device": "cuda", "slowdown": 2}})
    assert (read["a"].device, read["a"].slowdown, read["a"].threads) == ("cpu", 1.0, None)
    assert (read["b"].device, read["b"].slowdown, read["b"].hosts, read["b"].slots) == ("cuda", 2.0, "n*", 0)
