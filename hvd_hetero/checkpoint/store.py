"""Writing checkpoints, and removing those that are no longer wanted."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import time
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hvd_hetero
from hvd_hetero.checkpoint.durable_files import Files, sync_folder, write_whole
from hvd_hetero.checkpoint.encoding import split
from hvd_hetero.checkpoint.errors import CheckpointError
from hvd_hetero.checkpoint.manifest import MANIFEST, Meta, to_text
from hvd_hetero.checkpoint.reader import Candidate, Checkpoint, candidates, folder_name, rounds
from hvd_hetero.checkpoint.shard import ShardInfo, check_file, read_shard, shard_on_disk, write_shard

FOLDER = "checkpoints"
BEST = "best.json"
NAME = r"(rank[0-9]{4,}\.(safetensors|json)|manifest\.json)"
OURS = re.compile(rf"{NAME}|\.{NAME}\.part")
"""Files of a checkpoint, and what an interrupted write leaves of them; nothing else is ever removed."""


class Store:
    """The checkpoints of a run, in a folder that all ranks' hosts share.

    Rank 0 alone calls what is not said to be for each rank.

    Args:
        run_dir: the run's folder, which is there.
        keep: how many of the newest to keep, besides the best one.
        files: what to change the disk with.
    """

    def __init__(self, run_dir: str | Path, keep: int = 2, files: Files | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one is always kept")
        self._run_dir = Path(run_dir)
        self.folder = self._run_dir / FOLDER
        self._keep, self._files = keep, files or Files()

    def write_shard(self, round: int, rank: int, state: Any) -> ShardInfo:
        """Writes a rank's state; each rank calls it. The state must not change meanwhile.

        Raises:
            CheckpointError: the state has parts that cannot be saved, the disk does not take it, or the round already
                has a checkpoint.
        """
        folder = self.folder / folder_name(round)
        if (folder / MANIFEST).exists():
            raise CheckpointError(folder, "is finished, and is not written to again", "rewind the checkpoints first")
        tensors, json_part = split(state)
        with self._as_user_error(folder):
            self._files.make_folder(self.folder)
            self._files.make_folder(folder)
            return write_shard(self._files, folder, round, rank, tensors, json_part)

    def commit(
        self, round: int, infos: Sequence[ShardInfo], *, epochs: int, made_with: Mapping[str, Any],
        lost: Sequence[int] = (),
    ) -> Checkpoint:  # fmt: skip
        """Makes the shards a checkpoint, and removes what is no longer wanted.

        Args:
            infos: of all ranks but the ``lost`` ones, in any order.
            made_with: settings and the like, as JSON has them; the caller's own.

        Raises:
            CheckpointError: the disk does not take the manifest, a shard cannot be seen, or there are newer
                checkpoints.
        """
        size = len(infos) + len(lost)
        if sorted([*(info.rank for info in infos), *lost]) != list(range(size)) or any(i.round != round for i in infos):
            raise ValueError(f"not one shard of round {round} from every rank: {[(i.round, i.rank) for i in infos]}")
        folder = self.folder / folder_name(round)
        newer = [number for number in rounds(self.folder) if number > round and self._finished(number)]
        if newer:
            problem = f"is newer than round {round}, and would be taken for the state of the run"
            raise CheckpointError(self.folder / folder_name(newer[-1]), problem, "rewind the checkpoints first")
        files = {name: info for shard in infos for name, info in shard.files.items()}
        for name, info in files.items():
            try:
                check_file(folder / name, info, by_content=False)
            except CheckpointError as error:
                remedy = "run.dir has to be on a file system that the hosts of all ranks share"
                raise CheckpointError(error.file, f"{error.problem}, as rank 0 sees it", remedy) from error
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        meta = Meta(round, epochs, size, made_with, hvd_hetero.__version__, now, tuple(sorted(lost)))
        with self._as_user_error(folder):
            for above in (self._run_dir, self.folder):  # the folders were made by whichever rank came first
                sync_folder(self._files, above)
            write_whole(self._files, folder / MANIFEST, [to_text(meta, files).encode()])
        try:
            self._tidy(round, files)
        except (OSError, CheckpointError) as error:  # no reason to end a run that has just been saved
            warnings.warn(f"{self.folder}: old checkpoints cannot be removed: {error}", RuntimeWarning, stacklevel=2)
        return Checkpoint(folder, meta, files)

    def discard(self, round: int) -> None:
        """Removes what was written of a round that has not become a checkpoint; no rank is at it any more.

        Raises:
            CheckpointError: the disk does not let go.
        """
        with self._as_user_error(self.folder):
            if round in rounds(self.folder) and not self._finished(round):
                self._remove(round)
            self._remove_if_empty(self.folder)

    def unfinished(self, size: int) -> dict[int, list[ShardInfo]]:
        """The shards of rounds that came to no checkpoint and are newer than all that did, newest first.

        Args:
            size: number of ranks.
        """
        found: dict[int, list[ShardInfo]] = {}
        for number in reversed(rounds(self.folder)):
            if self._finished(number):
                break
            folder = self.folder / folder_name(number)
            shards = (shard_on_disk(folder, number, rank) for rank in range(size))
            found[number] = [shard for shard in shards if shard is not None]
        return found

    def part(self, round: int, info: ShardInfo) -> Any:
        """The state in a shard that :meth:`unfinished` has found.

        Raises:
            CheckpointError: it is damaged.
        """
        return read_shard(self.folder / folder_name(round), info.rank, info.files, "cpu")

    def candidates(self, deep: bool = False) -> list[Candidate]:
        """All rounds that have a folder, newest first, with a checkpoint or the reason why there is none.

        Any rank may call it. ``deep`` reads all files to check them.
        """
        return candidates(self.folder, deep)

    def latest(self, deep: bool = False) -> Checkpoint | None:
        """The newest that is valid, if there is one; see :meth:`candidates`."""
        return next((c.checkpoint for c in self.candidates(deep) if c.checkpoint is not None), None)

    def at(self, round: int) -> Checkpoint:
        """The checkpoint of a round, for ranks that were told which.

        Raises:
            CheckpointError: there is none, or why it is not valid.
        """
        for candidate in self.candidates():
            if candidate.round == round and candidate.checkpoint is not None:
                return candidate.checkpoint
            if candidate.round == round and candidate.error is not None:
                raise candidate.error
        raise CheckpointError(self.folder / folder_name(round), "is missing", "name a round that has a checkpoint")

    def mark_best(self, round: int, value: float, metric: str) -> None:
        """Keeps a round's checkpoint until another is the best, by a value of this metric.

        Raises:
            CheckpointError: there is no such checkpoint, or the disk does not take it.
        """
        self.at(round)
        with self._as_user_error(self.folder / BEST):
            text = json.dumps({"best": round, "value": value, "metric": metric}) + "\n"
            write_whole(self._files, self.folder / BEST, [text.encode()])

    def best(self) -> Checkpoint | None:
        """The checkpoint marked as the best, if there is one and it is valid."""
        with contextlib.suppress(OSError, ValueError, CheckpointError):
            number = self._best()
            return None if number is None else self.at(number)
        return None

    def best_value(self, metric: str) -> float | None:
        """What was said of the checkpoint marked as the best, if there is one; a value of another metric is none."""
        if self.best() is None:
            return None
        content = json.loads((self.folder / BEST).read_bytes())
        value = content.get("value")
        return float(value) if content.get("metric", metric) == metric and isinstance(value, (int, float)) else None

    def rewind(self, round: int | None) -> None:
        """Remove everything newer than the checkpoint that a run resumes from, or everything if there is none.

        What the run had done after it is not part of the run any more, and must not be taken up later.

        Raises:
            CheckpointError: there is no such checkpoint, or the disk does not let go.
        """
        if round is not None:
            self.at(round)
        with self._as_user_error(self.folder):
            with contextlib.suppress(ValueError):
                best = self._best()
                if best is not None and (round is None or best > round):
                    self._files.remove(self.folder / BEST)
            for number in reversed(rounds(self.folder)):
                if round is None or number > round:
                    self._remove(number)
            self._remove_if_empty(self.folder)

    def _tidy(self, current: int, files: Container[str]) -> None:
        """Remove checkpoints beyond those to keep, and what interrupted writes left; newer rounds are left alone."""
        for path in self._ours(current):
            if path.name != MANIFEST and path.name not in files:
                self._files.remove(path)
        self._files.remove(self.folder / f".{BEST}.part")
        found = self.candidates()
        valid = [c.round for c in found if c.checkpoint is not None]
        keep = set(valid[: self._keep])
        try:
            best = self._best()
        except ValueError:
            return  # not to be read: any of them may be the best one
        for candidate in found:
            unfinished = not self._finished(candidate.round)
            unwanted = candidate.checkpoint is not None and candidate.round not in keep and candidate.round != best
            # those that have a manifest and are damaged stay: somebody may want to look at them
            if candidate.round < current and (unfinished or unwanted):
                self._remove(candidate.round)

    def _remove(self, number: int) -> None:
        folder = self.folder / folder_name(number)
        if self._finished(number):  # first, and for good: from here on it is no checkpoint
            self._files.remove(folder / MANIFEST)
            sync_folder(self._files, folder)
        for path in self._ours(number):
            self._files.remove(path)
        self._remove_if_empty(folder)

    def _remove_if_empty(self, folder: Path) -> None:
        if folder.exists() and not any(folder.iterdir()):
            self._files.remove_folder(folder)

    def _ours(self, number: int) -> list[Path]:
        return sorted(path for path in (self.folder / folder_name(number)).iterdir() if OURS.fullmatch(path.name))

    def _finished(self, number: int) -> bool:
        return (self.folder / folder_name(number) / MANIFEST).exists()

    def _best(self) -> int | None:
        """Raises ValueError if there is something else in the file."""
        try:
            number = json.loads((self.folder / BEST).read_bytes())["best"]
        except FileNotFoundError:
            return None
        except (KeyError, TypeError) as error:
            raise ValueError(f"{BEST} names no round") from error
        if type(number) is not int:
            raise ValueError(f"{BEST} names no round")
        return number

    @contextlib.contextmanager
    def _as_user_error(self, where: Path) -> Iterator[None]:
        """Says what the disk did not do, and which checkpoint there still is."""
        try:
            yield
        except OSError as error:
            latest = None
            with contextlib.suppress(CheckpointError):
                latest = self.latest()
            newest = "there is no checkpoint" if latest is None else f"round {latest.meta.round} is whole"
            room = "make room for it or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            remedy = f"{room}choose another run.dir; {newest}"
            raise CheckpointError(error.filename or where, f"cannot be written: {error.strerror}", remedy) from error
