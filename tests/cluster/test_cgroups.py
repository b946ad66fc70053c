"""What a container may have at most, read from files as cgroups have them, and what ranks make of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hvd_hetero.cluster.cgroups import Limit, cpu_limit, memory_limit
from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts, limit_threads, local_facts, usable_cores
from hvd_hetero.cluster.placement import place
from hvd_hetero.config.load import device_classes
from hvd_hetero.launch import doctor

MOUNT = "sys/fs/cgroup"
GIB = 2**30


def tree(root: Path, own: str, **files: str) -> Path:
    """A machine with what this process's ``/proc/self/cgroup`` says, and files below the mounted groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    for name, content in files.items():
        file = root / MOUNT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return root


V1 = "4:memory:/a/b\n2:cpu,cpuacct:/a/b\n1:name=systemd:/x\n"
CPU = [
    ("a container's own group is the root", "0::/\n", {"cpu.max": "50000 100000"}, 0.5, "cpu.max"),
    ("no limit", "0::/\n", {"cpu.max": "max 100000"}, None, ""),
    ("nothing there", "", {}, None, ""),
    ("a group below", "0::/a/b\n", {"cpu.max": "max 100000", "a/b/cpu.max": "150000 100000"}, 1.5, "a/b/cpu.max"),
    ("the group above is stricter", "0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "300000 100000"}, 1.0,
     "a/cpu.max"),
    ("a group of others", "0::/a\n", {"c/cpu.max": "50000 100000"}, None, ""),
    ("the host's path, seen from inside", "0::/docker/1\n", {"cpu.max": "250000 100000"}, 2.5, "cpu.max"),
    ("version 1", V1, {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "15000", "cpu,cpuacct/a/b/cpu.cfs_period_us": "10000"}, 1.5,
     "cpu,cpuacct/a/b/cpu.cfs_quota_us"),
    ("version 1, by its short name", V1, {"cpu/cpu.cfs_quota_us": "20000", "cpu/cpu.cfs_period_us": "10000"}, 2.0,
     "cpu/cpu.cfs_quota_us"),
    ("version 1, no limit", V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, ""),
    ("both versions", V1 + "0::/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
                                      "unified/cpu.max": "50000 100000"}, 0.5, "unified/cpu.max"),
    ("groups above the root", "0::/../..\n", {"cpu.max": "50000 100000"}, 0.5, "cpu.max"),
    ("no numbers", "0::/\n", {"cpu.max": "some"}, None, ""),
]  # fmt: skip


@pytest.mark.parametrize(("own", "files", "cpus", "file"), [case[1:] for case in CPU], ids=[case[0] for case in CPU])
def test_cpus_at_once(tmp_path: Path, own: str, files: dict[str, str], cpus: float | None, file: str) -> None:
    root = tree(tmp_path, own, **files)
    assert cpu_limit(root) == (None if cpus is None else Limit(cpus, root / MOUNT / file))


@pytest.mark.parametrize(("own", "files", "size", "file"), [
    ("0::/a\n", {"memory.max": "max", "a/memory.max": str(GIB // 2)}, GIB // 2, "a/memory.max"),
    (V1, {"memory/a/memory.limit_in_bytes": str(GIB // 4), "memory/memory.limit_in_bytes": str(GIB // 2)}, GIB // 4,
     "memory/a/memory.limit_in_bytes"),
    (V1, {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, None, ""),
    ("0::/\n", {"memory.max": str(2**60)}, None, ""),
    ("", {}, None, ""),
])  # fmt: skip
def test_memory(tmp_path: Path, own: str, files: dict[str, str], size: int | None, file: str) -> None:
    root = tree(tmp_path, own, **files)
    assert memory_limit(root) == (None if size is None else Limit(size, root / MOUNT / file))


# ---- threads and cores of ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cpus", "threads", "bound"), [
    (None, [4, 4], True), (4.0, [2, 2], False), (5.9, [3, 2], False), (1.5, [1, 1], False), (0.5, [1, 1], False),
])
def test_ranks_of_a_host_share_what_they_may_have_at_once(
    cpus: float | None, threads: list[int], bound: bool
) -> None:
    """Unbound, since another container of the host would be bound to the same cores."""
    facts = [RankFacts(i, "here", i, (), "some cpu", tuple(range(8)), cpus) for i in range(2)]
    placed = [place(assign(device_classes({"all": {"ranks": "0-1"}}), facts), rank, 2, True) for rank in (0, 1)]
    assert [p.threads for p in placed] == threads
    assert all((p.cores is not None) == bound for p in placed)
    given = assign(device_classes({"all": {"ranks": "0-1", "threads": 6}}), facts)
    assert place(given, 0, 2, True).threads == 6, "whoever says so knows better"


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def limit(cpus: float) -> None:
        for module in (sys.modules[RankFacts.__module__], doctor):
            monkeypatch.setattr(module, "cpu_limit", lambda: Limit(cpus, Path("/sys/fs/cgroup/cpu.max")))

    return limit


def test_threads_of_this_process(limited: Callable[[float], None]) -> None:
    before, cores = torch.get_num_threads(), len(local_facts(0, "here", 0).cores)
    limited(cores + 1)
    limit_threads()
    assert torch.get_num_threads() == before and usable_cores() == cores and local_facts(0, "here", 0).cpus is None
    limited(0.5)
    try:
        limit_threads()
        assert torch.get_num_threads() == usable_cores() == 1 and local_facts(0, "here", 0).cpus == 0.5
    finally:
        torch.set_num_threads(before)


def test_the_doctor_names_the_limits(
    limited: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limited(0.5)
    monkeypatch.setattr(doctor, "memory_limit", lambda: Limit(GIB // 2, Path("/sys/fs/cgroup/memory.max")))
    monkeypatch.setenv("MY_SECRET", "hunter2")
    before = torch.get_num_threads()
    try:
        doctor.doctor((), ())
    finally:
        torch.set_num_threads(before)
    lines = {line[:16].strip(): line[17:] for line in capsys.readouterr().out.splitlines()}
    assert "; at most 0.5 at once (/sys/fs/cgroup/cpu.max), so 1 in use" in lines["cores"]
    assert lines["memory"].endswith(" GiB; at most 0.5 (/sys/fs/cgroup/memory.max)")
    assert lines["threads"].startswith("torch 1")
    assert "ranks get " in lines["environment"] and ", PATH, " in lines["environment"].split("not get")[0]
    assert "MY_SECRET" in lines["environment"].split("not get")[1] and "hunter2" not in lines["environment"]


def test_facts_go_to_other_ranks(tmp_path: Path) -> None:
    facts = replace(local_facts(0, "here", 0), cpus=1.5)
    assert RankFacts.from_dict(facts.to_dict()) == facts
