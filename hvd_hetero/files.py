"""Write files: whole or not at all, through no link, writable by the user alone."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hvd_hetero.errors import ConfigError


def restrict_umask() -> None:
    """What this process writes from now on can be changed by its user alone, however generous the umask is."""
    os.umask(os.umask(0o077) | 0o022)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole: a reader sees the old one or the new one. A link in its place is replaced, not followed.

    Raises:
        OSError: it could not be written.
    """
    part = path.with_name(f".{path.name}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(part, flags, 0o644), "w", encoding="utf-8") as file:
        file.write(text)
    part.replace(path)


def check_writable(key: str, folder: Path) -> None:
    """Makes sure that a folder is there or can be made, and that something can be made in it; leaves nothing behind.

    Raises:
        ConfigError: naming the key.
    """
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".hvd-hetero-", dir=there))
    except OSError as error:
        problem = f"cannot be written: {there}: {error.strerror}"
        raise ConfigError(key, str(folder), problem, "choose another folder") from error


def check_no_links(key: str, folder: Path, names: tuple[str, ...]) -> None:
    """Makes sure that what is written into a folder stays there.

    Raises:
        ConfigError: one of the names is a link in it.
    """
    for name in names:
        if (folder / name).is_symlink():
            problem = f"{name} in it is a link to {os.readlink(folder / name)}, which leads out of it"
            raise ConfigError(key, str(folder), problem, "remove the link, or choose another folder")
