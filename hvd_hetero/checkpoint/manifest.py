"""The manifest, which makes a folder of shards a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hvd_hetero.checkpoint.durable_files import FileInfo
from hvd_hetero.checkpoint.errors import CheckpointError

MANIFEST = "manifest.json"
KIND = "hvd-hetero checkpoint"
FORMAT = 6
"""Goes up when older versions of the package could not read what is written."""


@dataclass(frozen=True)
class Meta:
    """What a checkpoint is of.

    Attributes:
        round: rounds done.
        epochs: epochs done.
        world_size: ranks, each of which has a shard.
        made_with: settings and the like by name, as JSON has them; the caller's own.
        version: of the package that wrote it.
        time: when, as in ``2026-01-31T12:00:00+0000``.
        lost: those of them that have none: they were lost, and the others saved what they had.
    """

    round: int
    epochs: int
    world_size: int
    made_with: Mapping[str, Any]
    version: str
    time: str
    lost: tuple[int, ...] = ()

    @property
    def ranks(self) -> list[int]:
        """Those that have a shard."""
        return [rank for rank in range(self.world_size) if rank not in self.lost]


def to_text(meta: Meta, files: Mapping[str, FileInfo]) -> str:
    content = {
        "kind": KIND,
        "format": FORMAT,
        "version": meta.version,
        "round": meta.round,
        "epoch": meta.epochs,
        "world_size": meta.world_size,
        "made_with": meta.made_with,
        "time": meta.time,
        "files": {name: asdict(info) for name, info in sorted(files.items())},
    }
    if meta.lost:
        content["lost"] = list(meta.lost)
    return _dump({**content, "sha256": _digest(content)})


def read_manifest(path: Path) -> tuple[Meta, dict[str, FileInfo]]:
    """Reads and checks a manifest.

    Raises:
        CheckpointError: it is damaged, of another format, or not ours. The remedy may be left to the caller.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(path, "is missing, the checkpoint was never finished", "") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}", "") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, "is damaged: not JSON", "") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise CheckpointError(path, "is not a manifest of hvd-hetero", "")
    if content.get("format") != FORMAT:
        problem = f"has format {content.get('format')}, this version reads {FORMAT}"
        raise CheckpointError(path, problem, f"use hvd-hetero {content.get('version')}, which wrote it")
    digest = content.pop("sha256", None)
    # the very bytes, so that no change goes unseen, not even one between two words
    if digest != _digest(content) or _dump({**content, "sha256": digest}).encode() != text:
        raise CheckpointError(path, "is damaged: its checksum differs", "")
    names = ("round", "epoch", "world_size", "made_with", "version", "time")
    try:
        files = {name: FileInfo(int(info["bytes"]), str(info["sha256"])) for name, info in content["files"].items()}
        meta = replace(Meta(*(content[name] for name in names)), lost=tuple(content.get("lost", ())))
        if len(files) != 2 * len(meta.ranks):
            raise ValueError(f"{len(files)} files of {len(meta.ranks)} ranks")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(path, f"is not a manifest of this version: {error}", "") from error
    return meta, files


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(content).encode()).hexdigest()
