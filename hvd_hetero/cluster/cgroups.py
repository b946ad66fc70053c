"""Limits that a container or a scheduler sets by cgroups, version 1 or 2: CPUs at once, and memory.

They hold for all processes of a group together, and those of every group above it hold as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limit:
    """What may be had at most, in CPUs or bytes, and the file that says so."""

    value: float
    file: Path


def cpu_limit(root: Path = Path("/")) -> Limit | None:
    """Return how many CPUs this process and what runs beside it may have at once, 0.5 for instance; None: no limit.

    Args:
        root: below which ``proc`` and ``sys`` lie.
    """

    def quota(folder: Path) -> Limit | None:
        if (file := folder / "cpu.max").exists():
            quota_us, period = file.read_text().split()
        else:
            file = folder / "cpu.cfs_quota_us"
            quota_us, period = file.read_text(), (folder / "cpu.cfs_period_us").read_text()
        return Limit(int(quota_us) / int(period), file) if quota_us != "max" and int(quota_us) > 0 else None

    return _smallest(root, "cpu", quota)


def memory_limit(root: Path = Path("/")) -> Limit | None:
    """Return how many bytes this process and what runs beside it may have; None: as many as the machine has.

    Args:
        root: as of :func:`cpu_limit`.
    """
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def limit(folder: Path) -> Limit | None:
        file = folder / ("memory.max" if (folder / "memory.max").exists() else "memory.limit_in_bytes")
        text = file.read_text().strip()
        return Limit(int(text), file) if text != "max" and int(text) < most else None

    return _smallest(root, "memory", limit)


def _smallest(root: Path, controller: str, read: Callable[[Path], Limit | None]) -> Limit | None:
    found = []
    for folder in _folders(root, controller):
        with suppress(OSError, ValueError, ZeroDivisionError):  # most folders have no such file, or are not there
            found.append(read(folder))
    return min(filter(None, found), key=lambda limit: limit.value, default=None)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Where the groups of this process may be mounted: in a container its own group is the root of what it sees."""
    mount, lines = root / "sys" / "fs" / "cgroup", []
    with suppress(OSError):
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    for _, controllers, path in (line.split(":", 2) for line in ["0::/", *lines]):
        if not controllers:
            mounted = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            mounted = [mount / controllers, mount / controller]
        else:
            continue
        names = path.strip("/").split("/")
        yield from (base.joinpath(*names[:depth]) for base in mounted for depth in range(len(names) + 1))
