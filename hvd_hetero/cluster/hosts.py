"""Read lists of hosts, and say how a command is run on one of them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from hvd_hetero.errors import ConfigError

Host = tuple[str, int]
"""A host and its slots."""
HOST, COMMAND = "{host}", "{command}"
SSH = ("ssh -o PasswordAuthentication=no -o StrictHostKeyChecking=no -o BatchMode=yes -o ConnectTimeout=5 "
       "{host} {command}")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
ITEM = re.compile(r"(\S+?)(?::([0-9]+)|\s+slots\s*=\s*([0-9]+)(?:\s+max_slots\s*=\s*[0-9]+)?)?")
SCRIPT_SEC = 60.0
"""What a script that names hosts may take."""
FORMS = "write for example node1:2,node2:4, or in a host file node1 slots=2"


def parse_hosts(text: str, key: str = "cluster.hosts") -> list[Host]:
    """Return hosts and their slots, in the order in which they are first named.

    Between commas stand ``host:slots`` as for horovodrun's -H, ``host slots=N`` as in Open MPI's host files, or
    ``host`` (one slot). A name may have brackets, see :func:`expand`; slots of one that is named again add up.

    Args:
        key: where the text is from.

    Raises:
        ConfigError: an item that is none of this.
    """
    hosts: list[Host] = []
    for item in split(text):
        match = ITEM.fullmatch(item.strip())
        names = expand(match[1]) if match is not None else []
        slots = int(match[2] or match[3] or 1) if match is not None else 0
        if slots == 0 or not names or not all(NAME.fullmatch(name) for name in names):
            raise ConfigError(key, text, f"{item.strip()!r} is not host:slots", FORMS)
        hosts += [(name, slots) for name in names]
    return merged(hosts)


def read_host_file(path: Path, key: str) -> list[Host]:
    """Return what the lines of a host file name, each as :func:`parse_hosts` has it; what follows # is a comment.

    Args:
        key: where the path is from.

    Raises:
        ConfigError: naming the line, or the file, if it cannot be read or names no host.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(key, str(path), f"cannot be read: {error}", "give a host file") from error
    return _hosts_of(lines, path, key)


def run_host_script(path: Path, key: str) -> list[Host]:
    """Return what a script prints, in the lines of a host file.

    Raises:
        ConfigError: as :func:`read_host_file`; or the script fails, or takes too long.
    """
    try:
        done = subprocess.run([path], stdin=subprocess.DEVNULL, capture_output=True, timeout=SCRIPT_SEC, check=True)
        lines = done.stdout.decode().splitlines()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        output = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        problem = f"fails: {output[-1] if output else error}"
        raise ConfigError(key, str(path), problem, "let it print a line host:slots for each host") from error
    return _hosts_of(lines, path, key)


def is_script(path: Path) -> bool:
    """Whether a file is for running: it may be, and begins as scripts do."""
    try:
        with path.open("rb") as file:
            return os.access(path, os.X_OK) and file.read(2) == b"#!"
    except OSError:
        return False


def _hosts_of(lines: Iterable[str], path: Path, key: str) -> list[Host]:
    contents = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    hosts = [host for n, content in contents if content for host in parse_hosts(content, f"{path} line {n}")]
    if not hosts:
        raise ConfigError(key, str(path), "names no host", FORMS)
    return merged(hosts)


def merged(hosts: Iterable[Host]) -> list[Host]:
    """Return every host once, with all its slots."""
    slots: dict[str, int] = {}
    for name, number in hosts:
        slots[name] = slots.get(name, 0) + number
    return list(slots.items())


def listed(hosts: Iterable[Host]) -> str:
    """Return hosts as :func:`parse_hosts` reads them."""
    return ",".join(f"{host}:{slots}" for host, slots in hosts)


def expand(text: str) -> list[str]:
    """Return the names that a host list stands for, as Slurm and pdsh write it; [] if it is none.

    ``gpu[1-2],n[08-10]x[1,3]`` is gpu1, gpu2, n08x1, n08x3, n09x1 ... Numbers are padded with zeros as the first one of
    a range is. Brackets may hold names with brackets.
    """
    try:
        return [name for item in split(text) for name in _product(item)]
    except ValueError:
        return []


def split(text: str) -> list[str]:
    """Take a list apart at its commas, but for those within brackets."""
    items, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return items


def _product(item: str) -> list[str]:
    """All names of one item; a ValueError where it has none."""
    head, bracket, rest = item.partition("[")
    if not bracket:
        if not item or "]" in item:
            raise ValueError
        return [item]
    depths = [0]
    for character in rest:
        depths.append(depths[-1] + (character == "[") - (character == "]"))
    end = depths.index(-1) - 1  # a ValueError if the bracket is never closed
    inner = [name for part in split(rest[:end]) for name in _range(part)]
    tails = _product(rest[end + 1:]) if rest[end + 1:] else [""]
    return [f"{head}{name}{tail}" for name in inner for tail in tails]


def _range(part: str) -> list[str]:
    match = re.fullmatch(r"([0-9]+)-([0-9]+)", part)
    if match is None:
        return _product(part)
    if int(match[2]) < int(match[1]):
        raise ValueError
    return [str(number).zfill(len(match[1])) for number in range(int(match[1]), int(match[2]) + 1)]


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ``0-3,6``."""
    parts = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        parts.append(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return ",".join(parts)


def remote_command(shell: str, host: str, command: str) -> list[str]:
    """Return the words by which a shell's command is run on another host.

    Args:
        shell: a command line (``cluster.remote_shell``) in which {host} stands for the host, and {command} for a word
            that is the command; what it does not name is added at its end, as rsh takes it.
    """
    words = shlex.split(shell) + [each for each in (HOST, COMMAND) if each not in shell]
    return [command if word == COMMAND else word.replace(HOST, host) for word in words]
