"""One rank's part of a checkpoint: a file of tensors and a file of everything else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hvd_hetero.checkpoint.durable_files import FileInfo, Files, read_info, write_whole
from hvd_hetero.checkpoint.encoding import join
from hvd_hetero.checkpoint.errors import CheckpointError
from hvd_hetero.checkpoint.tensor_file import to_pieces


@dataclass(frozen=True)
class ShardInfo:
    """What a rank tells rank 0 of the shard that it wrote; travels as text."""

    round: int
    rank: int
    files: Mapping[str, FileInfo]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ShardInfo:
        content = json.loads(text)
        return cls(content["round"], content["rank"], {k: FileInfo(**v) for k, v in content["files"].items()})


def shard_names(rank: int) -> tuple[str, str]:
    """Of the file of tensors, and of the one of everything else."""
    return f"rank{rank:04d}.safetensors", f"rank{rank:04d}.json"


def write_shard(
    files: Files, folder: Path, round: int, rank: int, tensors: Mapping[str, torch.Tensor], json_part: Any
) -> ShardInfo:
    """Writes both files, of a state that was split.

    Raises:
        OSError: a file could not be written.
    """
    text = json.dumps({"round": round, "rank": rank, "state": json_part}, allow_nan=False).encode() + b"\n"
    large, small = shard_names(rank)
    infos = {large: write_whole(files, folder / large, to_pieces(tensors))}
    infos[small] = write_whole(files, folder / small, [text])
    return ShardInfo(round, rank, infos)


def shard_on_disk(folder: Path, round: int, rank: int) -> ShardInfo | None:
    """Return what there is of a shard that no manifest tells of; None where it is not whole. Both files are read."""
    names = shard_names(rank)
    try:
        content = json.loads((folder / names[1]).read_bytes())
        if (content["round"], content["rank"]) != (round, rank):
            return None
        return ShardInfo(round, rank, {name: read_info(folder / name) for name in names})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_file(path: Path, expected: FileInfo, by_content: bool = True) -> None:
    """Checks that a file is what was saved.

    Args:
        by_content: reads it and compares the checksum; else its size only.

    Raises:
        CheckpointError: it is missing, of another size, or damaged. The remedy is left to the caller.
    """
    try:
        size = path.stat().st_size
        if size < expected.bytes:
            raise CheckpointError(path, f"is cut off, {size} of {expected.bytes} bytes are there", "")
        if size > expected.bytes:
            raise CheckpointError(path, f"is not the file that was saved: {size} bytes, not {expected.bytes}", "")
        if by_content and read_info(path) != expected:
            raise CheckpointError(path, "is damaged or not the file that was saved: its checksum differs", "")
    except FileNotFoundError as error:
        raise CheckpointError(path, "is missing", "") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}", "") from error


def read_shard(folder: Path, rank: int, infos: Mapping[str, FileInfo], device: str | torch.device) -> Any:
    """Reads a rank's state, after both files have been checked.

    Raises:
        CheckpointError: a file is not what was saved, or cannot be read.
    """
    large, small = (folder / name for name in shard_names(rank))
    for path in (large, small):
        check_file(path, infos[path.name])
    try:
        content = json.loads(small.read_bytes())
        # mapped, not read: the pages are still in memory from the checksum, and go from there to where they belong
        with safe_open(large, framework="pt", device="cpu") as file:
            return join({name: file.get_tensor(name) for name in file.keys()}, content["state"], device)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(large, f"does not hold a shard of this version: {error}", "") from error
