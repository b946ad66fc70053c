"""Folders of checkpoints: their layout, which of them count, which are removed."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from store_helpers import MADE_WITH, same, save_round, some_state

from hvd_hetero.checkpoint import CheckpointError, Store


def test_the_layout_on_disk(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        store = Store(tmp_path)
        written = save_round(store, 123, [some_state(0), some_state(1)])
        store.mark_best(123, 0.5, "accuracy")
    finally:
        os.umask(mask)
    folder = tmp_path / "checkpoints" / "000123"
    names = ["manifest.json", "rank0000.json", "rank0000.safetensors", "rank0001.json", "rank0001.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for path in store.folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o755
    manifest = json.loads((folder / "manifest.json").read_text())
    known = {"kind", "format", "version", "round", "epoch", "world_size", "made_with", "time", "files", "sha256"}
    assert set(manifest) == known
    tensors = load_file(folder / "rank0001.safetensors")
    assert set(tensors) == {"model.w", "model.b"} and same(tensors["model.w"], some_state(1)["model"]["w"])
    latest = store.latest()
    assert latest == written and latest is not None
    meta = latest.meta
    assert (meta.round, meta.epochs, meta.world_size, meta.made_with) == (123, 12, 2, MADE_WITH)


def test_an_empty_run_has_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.latest() is None and store.best() is None and store.candidates() == []
    with pytest.raises(CheckpointError, match="is missing"):
        store.at(3)


def test_old_ones_go_and_the_best_one_stays(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine").mkdir()
    for number in range(1, 6):
        save_round(store, number, [some_state(number)])
        if number == 2:
            store.mark_best(2, 0.9, "accuracy")
    assert [c.round for c in store.candidates()] == [5, 4, 2]
    best = store.best()
    assert best is not None and best.load(0)["n"] == 2
    store.mark_best(5, 0.95, "accuracy")
    save_round(store, 6, [some_state(6)])
    assert [c.round for c in store.candidates()] == [6, 5]
    assert (tmp_path / "checkpoints" / "mine").is_dir()
    with pytest.raises(CheckpointError):
        store.mark_best(4, 1.0, "accuracy")


def test_nothing_goes_while_it_is_not_known_which_one_is_the_best(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    save_round(store, 1, [0])
    (store.folder / "best.json").write_text('{"best": ')
    save_round(store, 2, [0])
    assert [c.round for c in store.candidates()] == [2, 1] and store.best() is None
    store.mark_best(2, 1.0, "accuracy")
    save_round(store, 3, [0])
    assert [c.round for c in store.candidates()] == [3, 2]


def test_going_on_from_an_older_one_drops_what_came_after(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=9)
    for number in (1, 2, 3):
        save_round(store, number, [some_state(number)])
    store.mark_best(3, 0.9, "accuracy")
    store.write_shard(4, 0, some_state(4))
    with pytest.raises(CheckpointError, match="newer than round 0"):
        save_round(store, 0, [some_state(0)])
    with pytest.raises(CheckpointError, match="is finished"):
        store.write_shard(2, 0, some_state(9))
    store.rewind(1)
    assert [c.round for c in store.candidates()] == [1, 0] and store.best() is None
    assert store.latest() == store.at(1), "round 0 has shards and no manifest"
    save_round(store, 2, [some_state(20)])
    assert store.at(2).load(0)["n"] == 20
    with pytest.raises(CheckpointError):
        store.rewind(7)
    store.rewind(None)
    assert not store.folder.exists()


def test_leftovers_go_and_other_peoples_files_stay(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_shard(1, 0, some_state())  # never committed
    store.write_shard(2, 0, some_state())
    (store.folder / "000002" / "notes.txt").write_text("mine")
    store.write_shard(3, 2, some_state())  # of an earlier try with more ranks
    (store.folder / "000003" / ".rank0000.json.part").write_text("half")
    (store.folder / ".best.json.part").write_text("half")
    store.write_shard(4, 0, some_state())  # the next round, under way
    save_round(store, 3, [some_state()])
    left = {str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file()}
    shards = {f"{n}/rank0000.{end}" for n in ("000003", "000004") for end in ("json", "safetensors")}
    assert left == shards | {"000002/notes.txt", "000003/manifest.json"}


def test_commit_wants_every_rank_once_and_sees_their_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    infos = [store.write_shard(1, rank, rank) for rank in range(3)]
    for wrong in (infos[1:], [*infos, infos[0]]):
        with pytest.raises(ValueError, match="every rank"):
            store.commit(1, wrong, epochs=0, made_with={})
    (store.folder / "000001" / "rank0001.json").unlink()
    with pytest.raises(CheckpointError, match=r"rank0001.json: is missing.*share"):
        store.commit(1, infos, epochs=0, made_with={})
    assert store.latest() is None


def test_a_meta_device_is_not_needed_but_a_device_can_be_given(tmp_path: Path) -> None:
    checkpoint = save_round(Store(tmp_path), 1, [{"t": torch.ones(2), "a": np.ones(2)}])
    state = checkpoint.load(0, map_location=torch.device("meta"))
    assert state["t"].is_meta and same(state["a"], np.ones(2))
