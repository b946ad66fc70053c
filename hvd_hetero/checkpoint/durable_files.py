"""The operations on files that a checkpoint is made of, and a file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 22
"""Bytes written and hashed at a time: hashing finds them in the cache."""
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM, errno.EBADF,
           errno.EISDIR, errno.EROFS)  # fmt: skip
"""How a file system says that it does not sync such a thing: network file systems and FUSE do so of folders."""


class Files:
    """Everything that changes the disk. Tests put one in its place that fails, or that loses what was not synced."""

    def make_folder(self, path: Path) -> None:
        """A folder that may be there already; the umask may take more away."""
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o755)
        if path.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "is a link, and would lead out of the run's folder", str(path))

    def open(self, path: Path) -> int:
        """A file descriptor to write to; the umask may take more away. A link in its place is not followed."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)

    def write(self, file: int, data: bytes | memoryview) -> int:
        """How many bytes were taken, maybe fewer than there are."""
        return os.write(file, data)

    def sync(self, file: int) -> None:
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def rename(self, old: Path, new: Path) -> None:
        old.replace(new)

    def sync_folder(self, path: Path) -> None:
        """What was renamed or removed in it stays so."""
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        path.rmdir()


@dataclass(frozen=True)
class FileInfo:
    """What a file was when it was written.

    SHA-256, since anybody can check it with ``sha256sum``, and it cannot be had by chance. CRC-32 and BLAKE2 are no
    faster where the CPU has instructions for it, and hashes that are would be one more dependency.
    """

    bytes: int
    sha256: str


def write_whole(files: Files, path: Path, pieces: Iterable[bytes | memoryview]) -> FileInfo:
    """Writes a file such that the old one is there or the new one, whole, whatever happens meanwhile.

    Raises:
        OSError: it could not be written.
    """
    part = path.with_name(f".{path.name}.part")
    digest, size = hashlib.sha256(), 0
    try:
        file = files.open(part)
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while len(rest):
                    taken = files.write(file, rest[:CHUNK])
                    if taken <= 0:
                        raise OSError(errno.EIO, "the file system takes no more bytes, and does not say why")
                    digest.update(rest[:taken])
                    size += taken
                    rest = rest[taken:]
            with if_it_can():
                files.sync(file)
        finally:
            files.close(file)
        files.rename(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk is not to be kept full; but what failed first is to be told
            files.remove(part)
        raise
    sync_folder(files, path.parent)
    return FileInfo(size, digest.hexdigest())


def sync_folder(files: Files, path: Path) -> None:
    """Syncs a folder where that can be done; elsewhere the file system alone says when a name is on the disk.

    Raises:
        OSError: it can be done, and failed.
    """
    with if_it_can():
        files.sync_folder(path)


@contextlib.contextmanager
def if_it_can() -> Iterator[None]:
    """Pass over that something cannot be synced, but not that the sync failed."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def read_info(path: Path) -> FileInfo:
    """What a file is now; reads it once, a chunk at a time."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(CHUNK))
        size = 0
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileInfo(size, digest.hexdigest())
