"""Checkpoints and what goes wrong: full disks, power cuts, killed writers."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from store_helpers import NEW, OLD, save_round, some_state, whole

from hvd_hetero.checkpoint import CheckpointError, Files, Store


class Faulty(Files):
    """Fails at one operation: that one only, or it and all after it, as for a process that died there.

    Args:
        at: which operation, counted from 0.
        number: the system's error number.
        dead: everything after it fails as well.
        half: a write that fails has taken half of its bytes.
    """

    def __init__(self, at: int, number: int = errno.EIO, dead: bool = False, half: bool = False) -> None:
        self.at, self.number, self.dead, self.half = at, number, dead, half
        self.log: list[tuple[str, str]] = []

    def _step(self, what: str, path: Any = "") -> None:
        count = len(self.log)
        self.log.append((what, getattr(path, "name", "")))
        if count == self.at or (self.dead and count > self.at):
            raise OSError(self.number, os.strerror(self.number))

    def make_folder(self, path: Path) -> None:
        self._step("make_folder", path)
        super().make_folder(path)

    def open(self, path: Path) -> int:
        self._step("open", path)
        return super().open(path)

    def write(self, file: int, data: bytes | memoryview) -> int:
        try:
            self._step("write")
        except OSError:
            if self.half:
                super().write(file, data[: len(data) // 2])
            raise
        return super().write(file, data)

    def sync(self, file: int) -> None:
        self._step("sync")
        super().sync(file)

    def close(self, file: int) -> None:
        super().close(file)  # the descriptor is gone whatever close says
        self._step("close")

    def rename(self, old: Path, new: Path) -> None:
        self._step("rename", new)
        super().rename(old, new)

    def sync_folder(self, path: Path) -> None:
        self._step("sync_folder", path)
        super().sync_folder(path)

    def remove(self, path: Path) -> None:
        self._step("remove", path)
        super().remove(path)

    def remove_folder(self, path: Path) -> None:
        self._step("remove_folder", path)
        super().remove_folder(path)


class Unsynced(Files):
    """For writes that no test cuts short: a disk takes its time to sync."""

    def sync(self, file: int) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass


def old_run(path: Path) -> Path:
    """A run with a checkpoint, a second one of it that is due to go, and what an interrupted write left."""
    path.mkdir()
    store = Store(path, keep=1)
    save_round(store, OLD - 5, [some_state(1), some_state(2)])
    store.mark_best(OLD - 5, 0.1, "accuracy")
    save_round(store, OLD, [some_state(3), some_state(4)])
    (store.folder / "best.json").unlink()
    store.write_shard(OLD + 5, 0, some_state(5))
    return path


def operations(tmp_path: Path) -> list[tuple[str, str]]:
    files = Faulty(-1)
    save_round(Store(old_run(tmp_path / "count"), 1, files), NEW, [some_state(6), some_state(7)])
    return files.log


@pytest.mark.parametrize(
    "fault",
    [{}, {"number": errno.ENOSPC, "half": True}, {"dead": True}, {"dead": True, "half": True}],
    ids=["one", "disk full", "dead", "dead in a write"],
)
def test_a_fault_at_any_operation_leaves_the_old_one_or_the_new_one(tmp_path: Path, fault: dict[str, Any]) -> None:
    log = operations(tmp_path)
    committed = log.index(("rename", "manifest.json"))
    assert {what for what, _ in log} == {name for name in vars(Files) if not name.startswith("_")}, "all are tried"
    assert ("remove", "manifest.json") in log[committed:] and ("remove_folder", "000015") in log[committed:]
    source = old_run(tmp_path / "old")
    for at in range(len(log)):
        run = tmp_path / str(at)
        shutil.copytree(source, run)
        files = Faulty(at, **fault)
        # from here on the new one counts: with its manifest's name, whether or not the disk has said so
        counts = OLD if at <= committed else NEW
        if at <= committed + 1:
            with pytest.raises(CheckpointError, match=rf"cannot be written: .*round {counts} is whole"):
                save_round(Store(run, 1, files), NEW, [some_state(6), some_state(7)])
        else:
            with pytest.warns(RuntimeWarning, match="old checkpoints cannot be removed"):
                save_round(Store(run, 1, files), NEW, [some_state(6), some_state(7)])
        store = Store(run, 1)
        assert whole(store) == counts, log[at]
        if not fault.get("dead"):
            assert at > committed or not list(store.folder.rglob(".*")), "a full disk is not kept full"
        # and the run can go on, after which nothing is left of it
        save_round(Store(run, 1, Unsynced()), NEW + 10, [some_state(8), some_state(9)])
        assert whole(store) == NEW + 10
        assert [path.name for path in store.folder.iterdir()] == ["000030"] and not list(store.folder.rglob(".*"))
        shutil.rmtree(run)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
@pytest.mark.parametrize("what", ["sync", "sync_folder"])
def test_what_cannot_be_synced_is_saved_all_the_same(tmp_path: Path, number: int, what: str) -> None:
    """Network file systems and FUSE sync no folders; whether a sync that can be done has failed is another thing."""

    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    files = Files()
    setattr(files, what, refuse)
    save_round(Store(old_run(tmp_path / "run"), 1, files), NEW, [some_state(6), some_state(7)])
    assert whole(Store(tmp_path / "run")) == NEW


def test_room_is_asked_for_where_there_is_none(tmp_path: Path) -> None:
    for number, asked in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False), (errno.EROFS, False)):
        with pytest.raises(CheckpointError) as caught:
            Store(tmp_path, files=Faulty(2, number)).write_shard(NEW, 0, some_state())
        assert ("make room" in caught.value.remedy) == asked and "choose another run.dir" in caught.value.remedy


def test_short_writes_are_gone_on_with(tmp_path: Path) -> None:
    class Short(Files):
        def write(self, file: int, data: bytes | memoryview) -> int:
            return super().write(file, data[: random.randint(1, 700)])

    class Stuck(Files):
        def write(self, file: int, data: bytes | memoryview) -> int:
            return 0

    save_round(Store(tmp_path, files=Short()), NEW, [some_state(6), some_state(7)])
    assert whole(Store(tmp_path)) == NEW
    with pytest.raises(CheckpointError, match="takes no more bytes"):
        Store(tmp_path, files=Stuck()).write_shard(NEW + 1, 0, 1)


class PowerCut(Faulty):
    """Loses what was not synced when the power goes: what is in files, and with ``names`` what folders were told."""

    def __init__(self, at: int, names: bool) -> None:
        super().__init__(at, dead=True)
        self.names = names
        self._open: dict[int, Path] = {}
        self._unsynced: set[Path] = set()
        self._undo: list[tuple[Path, Callable[[], Any]]] = []

    def open(self, path: Path) -> int:
        file = super().open(path)
        self._open[file] = path
        self._unsynced.add(path)
        return file

    def sync(self, file: int) -> None:
        super().sync(file)
        self._unsynced.discard(self._open[file])

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self._undo.append((new.parent, lambda: new.replace(old)))
        if old in self._unsynced:
            self._unsynced.add(new)

    def remove(self, path: Path) -> None:
        content = path.read_bytes() if path.exists() else None
        super().remove(path)
        if content is not None:
            self._undo.append((path.parent, lambda: path.write_bytes(content)))

    def make_folder(self, path: Path) -> None:
        new = not path.exists()
        super().make_folder(path)
        if new:
            self._undo.append((path.parent, lambda: shutil.rmtree(path)))

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self._undo.append((path.parent, path.mkdir))

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self._undo = [(folder, undo) for folder, undo in self._undo if folder != path]

    def cut(self) -> None:
        for path in self._unsynced:
            if path.exists():
                os.truncate(path, path.stat().st_size // 2)
        for _, undo in reversed(self._undo if self.names else []):
            undo()


@pytest.mark.parametrize("names", [False, True])
def test_a_power_cut_at_any_operation_leaves_the_old_one_or_the_new_one(tmp_path: Path, names: bool) -> None:
    log = operations(tmp_path)
    synced = log.index(("sync_folder", "000020"), log.index(("rename", "manifest.json")))
    source = old_run(tmp_path / "old")
    for at in range(len(log) + 1):
        run = tmp_path / str(at)
        shutil.copytree(source, run)
        files = PowerCut(at, names)
        try:
            with pytest.warns(RuntimeWarning):
                save_round(Store(run, 1, files), NEW, [some_state(6), some_state(7)])
        except (CheckpointError, pytest.fail.Exception):
            assert at <= synced or at == len(log)
        files.cut()
        found = whole(Store(run, 1))
        assert found == NEW if at > synced else found in (OLD, NEW), log[at : at + 1]
        shutil.rmtree(run)


NURSERY = """
import os, sys, torch
from hvd_hetero.checkpoint import Store

def write(number):
    store = Store(sys.argv[1], keep=2)
    while True:
        states = [{"n": number, "t": torch.full((200_000,), number + rank)} for rank in (0, 1)]
        infos = [store.write_shard(number, rank, state) for rank, state in enumerate(states)]
        store.commit(number, infos, epochs=0, made_with={})
        print(number, flush=True)
        number += 1

torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()  # torch is imported once
    if not child:
        write(int(line))
    print(f"child {child}", flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


def test_killed_writers_leave_the_last_one_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    start, unfinished = 1, 0
    command = [sys.executable, "-c", NURSERY, str(tmp_path)]
    with subprocess.Popen(command, text=True, stdin=PIPE, stdout=PIPE) as nursery:
        assert nursery.stdin is not None and nursery.stdout is not None
        for _ in range(12):
            print(start, file=nursery.stdin, flush=True)
            lines = [nursery.stdout.readline(), nursery.stdout.readline()]  # of the child and its first round
            begin = time.perf_counter()
            lines.append(nursery.stdout.readline())
            time.sleep(random.random() * (time.perf_counter() - begin))  # somewhere in a round
            child = next(int(line.split()[1]) for line in lines if line.startswith("child"))
            os.kill(child, signal.SIGKILL)
            lines += iter(nursery.stdout.readline, "gone\n")
            told = max(int(line) for line in lines if line.strip().isdecimal())
            latest = store.latest(deep=True)
            assert latest is not None and told <= latest.meta.round <= told + 1
            for rank in range(2):
                state = latest.load(rank)
                assert state["n"] == latest.meta.round and (state["t"] == latest.meta.round + rank).all()
            unfinished += any(c.round > latest.meta.round for c in store.candidates())
            store.rewind(latest.meta.round)
            start = latest.meta.round + 1
        nursery.stdin.close()
    assert unfinished, "none was killed in the middle of it: the test has seen nothing"
