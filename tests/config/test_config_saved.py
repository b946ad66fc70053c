"""A saved configuration reads back the same, and configs/default.yaml is the schema with its built-in values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from hvd_hetero import algorithms
from hvd_hetero.config.load import Config, device_classes, load
from hvd_hetero.config.schema import COURSE, FIGURES, LENGTH, NOTHING, NUMBERS, Decides

DEFAULT = Path(__file__).parents[2] / "configs" / "default.yaml"

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


def test_digest_is_of_what_decides_the_run_and_its_figures() -> None:
    base = load()
    for override in ("run.dir=elsewhere", "run.overwrite=true", "checkpoint.keep=9", "data.root=/else"):
        assert load(overrides=[override]).digest() == base.digest(), override
    for override in ("run.seed=1", "train.lr=0.2", "cluster.classes.slow.slowdown=9", "train.tau=31", "train.epochs=3",
                     "eval.metrics={}", "delays.sec=9"):
        assert load(overrides=[override]).digest() != base.digest(), override


DECIDES = {
    NUMBERS: """
        run.seed cluster.too_slow data.name data.target data.args model.name model.target model.args train.batch_size
        train.micro_batches train.epoch_length train.tau train.tau_overhead train.tau_margin train.adapt_tau train.loss
        train.loss_args train.optimizer train.lr train.optimizer_args train.groups train.scheduler train.scheduler_args
        train.scheduler_unit train.warmup_rounds train.clip_norm
        train.autocast train.matmul_precision train.channels_last sampling.scheme sampling.high_loss_ratio
        sampling.bias_to sampling.until sampling.anneal sampling.selection sampling.smoothing sampling.prune_ratio
        sampling.sample_weights sampling.block
        aggregation.weights aggregation.max_extrapolation aggregation.anneal_from aggregation.mode aggregation.quorum
        algorithm.quorum
        algorithm.noise algorithm.adaptive algorithm.max_delay algorithm.gradients algorithm.harmonic_mean
        algorithm.buffer algorithm.activation algorithm.micro_batches aggregation.sync_every aggregation.max_lag
        aggregation.patience_sec aggregation.optimizer_state aggregation.outer_lr aggregation.outer_momentum
        aggregation.outer_nesterov aggregation.delayed aggregation.delay_steps aggregation.own_weight
        aggregation.state aggregation.wire algorithm.name algorithm.mode
        algorithm.participants algorithm.global_batch algorithm.min_local_batch
        algorithm.max_local_batch algorithm.deadband algorithm.threshold algorithm.normalise
        algorithm.max_dropped
        algorithm.warmup_rounds algorithm.measured_rounds algorithm.ordered_momentum algorithm.anchor_batches
        algorithm.stage_rounds
        algorithm.warmup_steps algorithm.measured_steps algorithm.growth algorithm.max_growth
        algorithm.group_size algorithm.max_global_skips algorithm.warmup_epochs algorithm.cooldown_epochs
        algorithm.stability_level algorithm.patience algorithm.topology
        algorithm.partition_bytes algorithm.activation algorithm.adaptive algorithm.buffer algorithm.gradients
        algorithm.harmonic_mean algorithm.max_delay""",
    LENGTH: "train.epochs train.max_fast_steps train.max_samples train.max_train_sec train.patience aggregation.nan",
    FIGURES: """
        cluster.hosts cluster.classes cluster.affinity cluster.gpu_cores cluster.share_gpus cluster.network_interface
        cluster.cycle_time_ms
        data.workers train.compile aggregation.path aggregation.chunk_mb profile.seconds profile.warmup_steps
        profile.reuse profile.file eval.every_epochs eval.batch_size eval.metrics eval.best eval.average eval.half_life
        eval.last delays.distribution delays.seed
        delays.sec delays.ranks delays.sigma""",
    COURSE: """
        run.trace_rounds run.watchdog_sec run.callbacks cluster.start_timeout_sec cluster.gloo_timeout_sec
        checkpoint.every_sec checkpoint.every_rounds checkpoint.memory_sec checkpoint.keep""",
    NOTHING: """
        run.dir run.overwrite run.resume run.name run.trackers launch.environment launch.discovery_sec
        cluster.remote_shell data.root data.download""",
}
"""A new key has to be thought of here: who resumes with another value of it gets another model, or not."""


def test_what_every_key_decides_is_said() -> None:
    found: dict[str, Decides] = {}
    for name in algorithms.REGISTRY:
        config = load((), {"algorithm.name": name}, algorithms.method)
        for level in reversed(Decides):
            found |= dict.fromkeys(config.settings(level), level)
    output = {key: level for level, keys in DECIDES.items() for key in keys.split()}
    assert found == output


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
