"""What makes a run another one: which settings may differ from those that a checkpoint was made with."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from store_helpers import NEW, OLD, around, save_round

from hvd_hetero import algorithms
from hvd_hetero.checkpoint import Store
from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.config.load import device_classes, load
from hvd_hetero.config.schema import RESHAPE, Config
from hvd_hetero.data.alike import facts_of
from hvd_hetero.data.source import TensorSource
from hvd_hetero.errors import ConfigError, UserError
from hvd_hetero.planning.plan import ClassPlan, Plan, make_plan
from hvd_hetero.training.fingerprint import made_with
from hvd_hetero.training.resume import Found, check_data, check_places, find, known_plan, load_for, places, slots

pytestmark = pytest.mark.horovod

BASE = {"run.dir": "here", "data.args": {"when": "2024-01-01"},
        "train.optimizer_args": {"momentum": 0.9, "betas": (0.9, 0.99)}}  # fmt: skip


def configured(**overrides: Any) -> Config:
    return load((), BASE | {key.replace("__", "."): value for key, value in overrides.items()}, algorithms.method)


TWO = Plan((ClassPlan("fast", (0,), 1, 1, 0.5), ClassPlan("slow", (1,), 1, 1, 0.5)), 1)
LEAD = {"plan": TWO.to_dict(), "rank0": {}}
"""What the first rank's state has at least."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has saved twice."""
    folder = tmp_path_factory.mktemp("made") / "run"
    folder.mkdir()
    for number in (OLD, NEW):
        save_round(Store(folder), number, [{"n": number, **LEAD}, {}], made_with(configured()))
    return folder


@pytest.mark.parametrize(("key", "value"), [
    ("cluster.hosts", "127.0.0.1:2"), ("data.root", "/elsewhere"), ("data.workers", 3), ("train.epochs", 99),
    ("train.max_samples", 10**6), ("run.watchdog_sec", 5.0), ("cluster.gloo_timeout_sec", 9),
    ("cluster.affinity", False), ("cluster.network_interface", "lo"), ("eval.every_epochs", 7),
    ("eval.batch_size", 1), ("eval.metrics", {}),
    ("profile.seconds", 0.1), ("checkpoint.every_rounds", 3), ("checkpoint.every_sec", None), ("delays.sec", 0.1),
    ("cluster.classes.slow.slowdown", 2.0), ("cluster.classes.slow.threads", 3), ("run.trace_rounds", 0),
    ("aggregation.path", "hierarchical"), ("aggregation.nan", "stop"), ("run.name", "b"),
])  # fmt: skip
def test_what_does_not_decide_the_numbers_may_differ(source: Path, key: str, value: Any) -> None:
    found = find(source, configured(run__resume="auto", **{key: value}), 2)
    assert found is not None and (found.round, found.reshaped) == (NEW, False)


@pytest.mark.parametrize(("key", "value", "before"), [
    ("train.lr", 0.5, "0.02"), ("run.seed", 1, "0"), ("train.tau", 31, "'auto'"), ("train.batch_size", 8, "4"),
    ("train.optimizer_args", {"momentum": 0.5}, "{'momentum': 0.9, 'betas': [0.9, 0.99]}"),
    ("data.args", {}, "{'when': '2024-01-01'}"), ("model.name", "cnn", "'mlp'"), ("data.target", "m:data", "None"),
    ("aggregation.outer_momentum", 0.5, "0.0"), ("train.channels_last", True, "False"),
])  # fmt: skip
def test_what_does_decide_is_named_with_both_values(source: Path, key: str, value: Any, before: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find(source, configured(run__resume="auto", **{key: value}), 2)
    assert caught.value.key == key and f"was made with {before}" in str(caught.value)
    assert f"round {NEW}" in str(caught.value) and "run.resume=reshape" in caught.value.remedy
    found = find(source, configured(run__resume="reshape", **{key: value}), 2)
    assert found is not None and found.reshaped


def test_the_launcher_finds_it_before_it_starts_anything(launched: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save_round(Store(run), OLD, [LEAD, {}], made_with(load((), {}, algorithms.method)))
    for setting, output in {
        "train.lr=0.5": "train.lr=0.5: the checkpoint of round 10 was made with 0.02",
        "cluster.classes.slow.ranks=[1, 2]": "was saved by 2 ranks, and this job has 3",
    }.items():
        status, _, error = launched(f"run.dir={run}", "run.resume=auto", setting)
        assert status == 2 and output in error and len(error.splitlines()) == 1


def test_another_method_is_named_as_such_and_the_rest_counted(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"algorithm.name='sync_sgd': .*'biased_local_sgd' \(.*sampling.scheme.*too"):
        find(source, configured(run__resume="auto", algorithm__name="sync_sgd"), 2)


def test_another_number_of_ranks_is_said(source: Path) -> None:
    with pytest.raises(UserError, match="000020: was saved by 2 ranks, and this job has 3; start 2 ranks, or"):
        find(source, configured(run__resume="auto"), 3)
    found = find(source, configured(run__resume="reshape"), 3)
    assert found is not None and found.reshaped


def test_a_key_that_a_checkpoint_does_not_know_had_its_built_in_value(tmp_path: Path) -> None:
    known = made_with(configured())
    del known["train.clip_norm"]
    save_round(Store(tmp_path), OLD, [LEAD, {}], known)
    assert find(tmp_path, configured(run__resume="auto"), 2)
    with pytest.raises(ConfigError, match="train.clip_norm=1.0: .*made with None"):
        find(tmp_path, configured(run__resume="auto", train__clip_norm=1.0), 2)


def test_what_is_damaged_is_passed_over_and_told(source: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(source, tmp_path / "run"))
    (run / "checkpoints" / "000020" / "rank0001.json").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="rank0001.json: is cut off"):
        found = find(run, configured(run__resume="auto"), 2)
    assert found is not None and found.round == OLD and found.state == {"n": OLD, **LEAD}
    (run / "checkpoints" / "000010" / "manifest.json").unlink()
    with pytest.raises(UserError, match="rank0001.json: is cut off"):
        find(run, configured(run__resume="auto"), 2)


def test_a_first_checkpoint_that_was_never_finished_is_none(tmp_path: Path) -> None:
    Store(tmp_path).write_shard(OLD, 0, LEAD)
    assert find(tmp_path, configured(run__resume="auto"), 2) is None


def test_files_of_the_users_own_that_have_changed_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, file = ModuleType("resumed_target"), tmp_path / "resumed_target.py"
    module.__file__ = str(file)
    monkeypatch.setitem(sys.modules, "resumed_target", module)
    file.write_text("a")
    settings = {"model__target": "resumed_target:model", "run__callbacks": ["resumed_target:Tells"],
                "sampling__sample_weights": "resumed_target:weights"}  # fmt: skip
    config = configured(run__resume="auto", **settings)
    save_round(Store(tmp_path), OLD, [LEAD, {}], made_with(config))
    find(tmp_path, config, 2)
    file.write_text("b")
    with pytest.warns(RuntimeWarning) as heard:
        assert find(tmp_path, config, 2)
    output = {str(warning.message).partition(" has changed since")[0] for warning in heard}
    assert output == {"source of model.target=resumed_target:model", "source of run.callbacks[0]=resumed_target:Tells",
                    "source of sampling.sample_weights=resumed_target:weights"}  # fmt: skip


@pytest.mark.parametrize("resume", ["auto", "reshape"])
def test_other_data_is_told_by_its_number_and_by_a_look_at_it(resume: str) -> None:
    def made(count: int = 64, shift: float = 0.0) -> TensorSource:
        return TensorSource(torch.arange(count * 2.0).reshape(count, 2) + shift, torch.arange(count))

    saved = {"data": around(facts_of(made())), "sampler": {"losses": np.zeros(64)}}
    found = Found(3, {"rank0": saved}, resume == RESHAPE)
    check_data(found, made())
    with pytest.raises(ConfigError, match=f"run.resume='{resume}': .* 64 training samples, and these are 65"):
        check_data(found, made(65))
    if found.reshaped:
        check_data(found, made(shift=9.0))
        return
    with pytest.raises(ConfigError, match="training data have other inputs of sample 0 than .*run.resume=reshape"):
        check_data(found, made(shift=9.0))


def test_other_weights_of_the_same_data_are_told() -> None:
    data, weights = TensorSource(torch.zeros(64, 2), torch.arange(64)), np.linspace(0, 2, 64, dtype=np.float32)
    found = Found(3, {"rank0": {"data": around(facts_of(data, weights)), "sampler": {"losses": np.zeros(64)}}})
    check_data(found, data, weights)
    for other in (weights[::-1], None):
        with pytest.raises(ConfigError, match="training data have other sample weights than .*run.resume=reshape"):
            check_data(found, data, other)


def test_the_same_ranks_in_the_same_classes_wherever_their_hosts_are() -> None:
    def cluster(spec: dict[str, Any], hosts: str) -> Any:
        facts = [RankFacts(rank, f"{hosts}{rank // 2}", rank % 2, ("a gpu",), "cpu", (0, 1)) for rank in range(4)]
        return assign(device_classes(spec), facts)

    by_host = {"big": {"device": "cuda", "hosts": "*", "slots": [0]}, "small": {"hosts": "*", "slots": [1]}}
    by_rank = {"big": {"device": "cuda", "ranks": [0, 2]}, "small": {"ranks": [1, 3], "slowdown": 3}}
    saved = {"classes": places(cluster(by_host, "old"))}
    check_places(saved, cluster(by_rank, "new"))
    for other in ({**by_rank, "big": {"ranks": [0, 2]}}, {"big": by_rank["small"], "small": by_rank["big"]}):
        with pytest.raises(ConfigError, match="cluster.classes=.*made with.*'big': 'cuda .0, 2.'.*reshape"):
            check_places(saved, cluster(other, "new"))


def test_a_plan_is_taken_over_only_where_its_settings_are_what_they_were(tmp_path: Path) -> None:
    cluster = assign(device_classes({"one": {"ranks": [0]}}), [RankFacts(0, "here", 0, (), "cpu", (0,))])
    plan = make_plan(cluster, 64, {"one": 4}, {"one": 2})
    state = {"plan": plan.to_dict(), "classes": places(cluster), "slots": slots(cluster), "worker": {}}
    save_round(Store(tmp_path), NEW, [state | {"rank0": {}}], made_with(configured(train__tau=4)))
    for tau, known in ((4, plan), (8, None)):
        config = configured(run__resume=RESHAPE, train__tau=tau)
        found = find(tmp_path, config, 1) if tau != 4 else None
        assert found is None or (found.reshaped and found.restores_ranks)
        assert known_plan(load_for(Store(tmp_path).at(NEW), config, cluster, 0, True), cluster) == known
