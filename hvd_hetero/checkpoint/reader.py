"""Which checkpoints there are, and reading one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvd_hetero.checkpoint.durable_files import FileInfo
from hvd_hetero.checkpoint.errors import CheckpointError
from hvd_hetero.checkpoint.manifest import MANIFEST, Meta, read_manifest
from hvd_hetero.checkpoint.shard import check_file, read_shard, shard_names


@dataclass(frozen=True)
class Checkpoint:
    """One that has a valid manifest and files of the right sizes; what is in them is checked when they are read."""

    path: Path
    meta: Meta
    files: Mapping[str, FileInfo]

    def load(self, rank: int, map_location: str | torch.device = "cpu") -> Any:
        """The state that a rank saved; reads and checks that rank's files only.

        Args:
            map_location: where tensors are to be. Generators of random numbers want their state in host memory.

        Raises:
            CheckpointError: a file is damaged; the message names the next older checkpoint.
        """
        self._check_rank(rank)
        try:
            return read_shard(self.path, rank, self.files, map_location)
        except CheckpointError as error:
            raise _offer(error, self._older()) from error

    def verify(self, rank: int | None = None) -> None:
        """Reads the files of a rank, or of all, and compares their checksums.

        Raises:
            CheckpointError: a file is damaged; the message names the next older checkpoint.
        """
        if rank is not None:
            self._check_rank(rank)
        try:
            self._compare(self.meta.ranks if rank is None else [rank])
        except CheckpointError as error:
            raise _offer(error, self._older()) from error

    def _compare(self, ranks: Iterable[int], by_content: bool = True) -> None:
        for rank in ranks:
            for name in shard_names(rank):
                if name not in self.files:
                    raise CheckpointError(self.path / MANIFEST, f"says nothing of {name}", "")
                check_file(self.path / name, self.files[name], by_content)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.meta.world_size:
            problem = f"holds ranks 0 to {self.meta.world_size - 1}, not rank {rank}"
            raise CheckpointError(self.path, problem, f"start {self.meta.world_size} ranks")
        if rank in self.meta.lost:
            problem = f"was saved without rank {rank}, which had been lost"
            raise CheckpointError(self.path, problem, "set run.resume=reshape")

    def _older(self) -> int | None:
        return next((c.round for c in candidates(self.path.parent) if c.checkpoint and c.round < self.meta.round), None)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint, or the reason why it is none: one of the two is None.

    Attributes:
        unfinished: it was never one: the job ended before all of it was written.
    """

    round: int
    checkpoint: Checkpoint | None
    error: CheckpointError | None
    unfinished: bool = False


def candidates(folder: Path, deep: bool = False) -> list[Candidate]:
    """All that is there, newest first.

    Args:
        deep: reads all files to check them; else goes by their sizes.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    found: list[Candidate] = []
    older: int | None = None
    for number in rounds(folder):
        try:
            checkpoint = _read(folder / folder_name(number), number)
            checkpoint._compare(checkpoint.meta.ranks, by_content=deep)
            found.append(Candidate(number, checkpoint, None))
            older = number
        except CheckpointError as error:
            unfinished = not (folder / folder_name(number) / MANIFEST).exists()
            found.append(Candidate(number, None, _offer(error, older), unfinished))
    return found[::-1]


def rounds(folder: Path) -> list[int]:
    """Rounds that have a folder, oldest first; whatever else is there is none of our business."""
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(folder, f"cannot be read: {error.strerror}", "give this user the right to") from error
    return sorted(int(name) for name in names if re.fullmatch("[0-9]+", name) and folder_name(int(name)) == name)


def folder_name(number: int) -> str:
    return f"{number:06d}"


def _read(path: Path, number: int) -> Checkpoint:
    manifest = path / MANIFEST
    meta, files = read_manifest(manifest)
    if meta.round != number:
        raise CheckpointError(manifest, f"is of round {meta.round}, and its folder of round {number}",
                              "give the folder its name back")
    return Checkpoint(path, meta, files)


def _offer(error: CheckpointError, older: int | None) -> CheckpointError:
    """Describe the problem, with the older checkpoints that can be resumed from."""
    other = "there is no older one: start anew" if older is None else f"go on from round {older}, the next older one"
    text = f"{error.remedy}, or {other}" if error.remedy and older is not None else error.remedy or other
    return CheckpointError(error.file, error.problem, text)
