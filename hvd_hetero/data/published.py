"""Published image datasets: torchvision reads them, compares their checksums and downloads them."""

from __future__ import annotations

import fcntl
import importlib
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvd_hetero.config.instantiate import cause
from hvd_hetero.data.files import reading
from hvd_hetero.errors import ConfigError

LOCK = ".download.lock"
"""In data.root. The lock ends with the process that has it; the file stays, and tells why a download failed."""
SILENCE_SEC = 60.0
"""A server that sends nothing for this long ends a download; torchvision itself sets no limit."""


def read_published(name: str, folder: str, root: Path, download: bool, *splits: Mapping[str, Any]) -> list[Any] | None:
    """Read splits of a dataset with torchvision.

    Args:
        name: class in ``torchvision.datasets``.
        folder: where that class has its files, below its root.
        root: holds ``folder``, or is it.
        download: whether files that are missing or corrupt are downloaded.
        splits: keyword arguments of the class, one mapping for each split.

    Returns:
        A dataset for each split; None if ``folder`` is not there.

    Raises:
        ConfigError: the files are not as published, or cannot be downloaded.
    """
    above = _above(root.absolute(), Path(folder).parts)
    if not download and not (above / folder).is_dir():
        return None
    kind = getattr(importlib.import_module("torchvision.datasets"), name)  # slow to import

    def read() -> list[Any]:
        remedy = "remove this folder and set data.download=true, or fetch the files again"
        with reading(above / folder, f"the published files of {name}", remedy):
            return [kind(above, **split) for split in splits]

    try:
        return read()
    except ConfigError:
        if not download:
            raise
        _download(kind, above)
        return read()


def _above(root: Path, parts: tuple[str, ...]) -> Path:
    """Return the folder that holds ``parts``, if ``root`` ends with the first of them; otherwise ``root``."""
    for count in range(len(parts), 0, -1):
        if root.parts[-count:] == parts[:count]:
            return root.parents[count - 1]
    return root


def _download(kind: Any, root: Path) -> None:
    """Download a dataset once a folder: the process that gets the lock does, the others wait and share its failure."""

    def failed(why: str) -> ConfigError:
        problem = f"{kind.__name__} cannot be downloaded into {root}: {why}"
        remedy = "check the network, its proxy variables and the disk; remove files that are damaged"
        return ConfigError("data.download", True, problem, remedy)

    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / LOCK).open("a+", encoding="utf8")
    except OSError as error:
        raise failed(cause(error)) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the download of {kind.__name__} into {root}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if why := lock.read():
                raise failed(why) from None
        lock.truncate(0)
        limit = socket.getdefaulttimeout()
        socket.setdefaulttimeout(SILENCE_SEC)
        try:
            print(f"downloading {kind.__name__} into {root}", file=sys.stderr, flush=True)
            kind(root, download=True)
        except Exception as error:  # of urllib, of the archive, of the disk
            why = cause(error)
            lock.write(why)
            raise failed(why) from error
        finally:
            socket.setdefaulttimeout(limit)
