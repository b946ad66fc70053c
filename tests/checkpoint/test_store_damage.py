"""Checkpoints that are damaged, cut off, foreign, or of another run: each is told, and an older one chosen."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_helpers import NEW, OLD, same, save_round, some_state, whole

from hvd_hetero.checkpoint import CheckpointError, ShardInfo, Store


def two_rounds(path: Path) -> Store:
    store = Store(path, keep=5)
    save_round(store, OLD, [some_state(3), some_state(4)])
    save_round(store, NEW, [some_state(6), some_state(7)])
    return store


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    store = two_rounds(tmp_path)
    files = sorted((store.folder / "000020").iterdir())
    for number in range(20):
        path = files[number % len(files)]
        data = bytearray(path.read_bytes())
        before, bit = bytes(data), random.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        deep = store.latest(deep=True)
        assert deep is not None and deep.meta.round == OLD, (path, bit)
        if path.name != "manifest.json":
            newest = store.at(NEW)
            hit = int("0001" in path.name)
            with pytest.raises(CheckpointError, match=rf"{path.name}: .*checksum differs; go on from round {OLD}"):
                newest.load(hit)
            assert same(newest.load(1 - hit), some_state(7 - hit)), "the other rank reads its own files only"
        path.write_bytes(before)
    assert whole(store) == NEW


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2) + "\n")


DAMAGE: list[tuple[str, str, Callable[[Path], Any], str]] = [
    ("cut", "rank0001.safetensors", lambda p: os.truncate(p, 99), r"is cut off, 99 of \d+ bytes are there; go on from"),
    ("empty", "rank0000.json", lambda p: os.truncate(p, 0), "is cut off, 0 of"),
    ("longer", "rank0000.json", lambda p: p.write_bytes(p.read_bytes() + b" "), "is not the file that was saved"),
    ("missing", "rank0001.json", Path.unlink, "is missing; go on from round 10, the next older one"),
    ("unfinished", "manifest.json", Path.unlink, "is missing, the checkpoint was never finished"),
    ("cut", "manifest.json", lambda p: os.truncate(p, 99), "is damaged: not JSON"),
    ("foreign", "manifest.json", lambda p: p.write_text('{"name": "my app"}'), "is not a manifest of hvd-hetero"),
    ("foreign", "manifest.json", lambda p: p.write_text("[1]"), "is not a manifest of hvd-hetero"),
    ("format", "manifest.json", lambda p: edit(p, format=3, version="9.9"),
     "has format 3, this version reads 6; use hvd-hetero 9.9, which wrote it, or go on from round 10"),
    ("edited", "manifest.json", lambda p: edit(p, made_with={}), "is damaged: its checksum differs"),
    ("spaced", "manifest.json", lambda p: p.write_text(p.read_text() + " "), "is damaged: its checksum differs"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "name", "damage", "output"), DAMAGE, ids=[f"{d[0]}-{d[1]}" for d in DAMAGE])
def test_damage_is_told_and_the_older_one_chosen(
    tmp_path: Path, what: str, name: str, damage: Callable[[Path], Any], output: str
) -> None:
    store = two_rounds(tmp_path)
    path = store.folder / "000020" / name
    damage(path)
    newest, older = store.candidates()
    assert newest.error is not None and newest.checkpoint is None and older.error is None
    assert newest.error.file == path
    with pytest.raises(CheckpointError, match=output):
        store.at(NEW)
    assert whole(store) == OLD
    shutil.rmtree(store.folder / "000010")
    error = store.candidates()[0].error
    assert error is not None and ("start anew" in error.remedy or what == "format") and store.latest() is None


def test_a_folder_of_another_name_and_files_of_another_round(tmp_path: Path) -> None:
    store = two_rounds(tmp_path)
    shutil.copytree(store.folder / "000010", store.folder / "000030")
    with pytest.raises(CheckpointError, match="is of round 10, and its folder of round 30"):
        store.at(30)
    swapped = store.folder / "000020" / "rank0001.safetensors"
    shutil.copy(store.folder / "000010" / swapped.name, swapped)
    with pytest.raises(CheckpointError, match="not the file that was saved"):
        store.at(NEW).load(1)
    assert whole_or_none(store) == OLD


def whole_or_none(store: Store) -> int | None:
    latest = store.latest(deep=True)
    return None if latest is None else latest.meta.round


def test_another_number_of_ranks(tmp_path: Path) -> None:
    store = two_rounds(tmp_path)
    save_round(store, NEW + 20, [some_state(0)] * 3)
    assert [c.round for c in store.candidates() if c.checkpoint] == [40, 20, 10]
    with pytest.raises(CheckpointError, match="holds ranks 0 to 1, not rank 2; start 2 ranks"):
        store.at(NEW).load(2)


def test_the_disks_own_errors_are_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match=r"cannot be written: Not a directory.*no checkpoint"):
        Store(tmp_path).write_shard(1, 0, 1)
    with pytest.raises(CheckpointError, match="No such file"):
        Store(tmp_path / "none").write_shard(1, 0, 1)


def test_infos_travel_as_text(tmp_path: Path) -> None:
    info = Store(tmp_path).write_shard(1, 0, some_state())
    assert ShardInfo.from_json(info.to_json()) == info
