"""Saving a job at the ends of passes, and taking up one that was saved; all ranks take part in both."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from hvd_hetero.comm.horovod import Comm
from hvd_hetero.errors import UserError
from hvd_hetero.schema import CheckpointConfig
from hvd_hetero.store import CheckpointError, ShardInfo, Store

NONE = -1
PATH_BYTES = 4096


def find(run_dir: Path, digest: str, world_size: int) -> tuple[int, Any] | None:
    """Round and rank 0's state of the newest checkpoint of a run, if there is one; older ones where it is damaged.

    Raises:
        CheckpointError: there are checkpoints, but none that this run can go on from.
    """
    first: CheckpointError | None = None
    for candidate in Store(run_dir).candidates(digest, world_size):
        try:
            if candidate.checkpoint is not None:
                candidate.checkpoint.verify()
                return candidate.round, candidate.checkpoint.load(0)
        except CheckpointError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            first = first or error
            continue
        first = first or candidate.error
    if first is not None:
        raise first
    return None


class Saver:
    """The checkpoints of one run.

    Args:
        run_dir: on rank 0, which tells the others.
        digest: of the configuration, without what says how long the run goes on.
    """

    def __init__(self, run_dir: str | Path, spec: CheckpointConfig, digest: str, comm: Comm) -> None:
        self._spec, self._digest, self._comm = spec, digest, comm
        path = str(Path(run_dir).resolve()).encode().ljust(PATH_BYTES) if comm.rank == 0 else bytes(PATH_BYTES)
        told = comm.broadcast(torch.tensor(list(path), dtype=torch.uint8), "checkpoint.path")
        self._store = Store(bytes(told.tolist()).decode().rstrip(), spec.keep)
        self._last = time.monotonic()

    def load(self, found: int | None) -> Any:
        """This rank's state in the checkpoint that rank 0 has found, or None where there is none.

        Raises:
            UserError: on all ranks, if one of them cannot read its part.
        """
        number = int(self._comm.broadcast(torch.tensor([NONE if found is None else found]), "checkpoint.round")[0])
        if number == NONE:
            if self._comm.rank == 0 and self._store.folder.exists():
                self._store.rewind(None)
            return None
        state, problem = None, ""
        try:
            state = self._store.at(number).load(self._comm.rank)
        except CheckpointError as error:
            problem = f"rank {self._comm.rank}: {error}"
            print(f"hvd-hetero: error: {problem}", file=sys.stderr, flush=True)
        if self._comm.max([float(bool(problem))], "checkpoint.loaded")[0]:
            raise UserError(problem or "a rank cannot read its part of the checkpoint, and has said why")
        if self._comm.rank == 0:
            self._store.rewind(number)
        return state

    def due(self, ends: bool) -> bool:
        """Whether to save now, as rank 0's clock says; the same on all ranks."""
        if self._spec.every_sec is None:
            return False
        late = ends or time.monotonic() - self._last >= self._spec.every_sec
        return bool(self._comm.broadcast(torch.tensor([int(late)]), "checkpoint.due")[0])

    def save(self, number: int, passes: int, state: Any) -> None:
        """Saves every rank's state; if that cannot be done, the run goes on without, and says so.

        Args:
            number: rounds so far.
        """
        text, problem = b"", ""
        try:
            text = self._store.write_shard(number, self._comm.rank, state).to_json().encode()
        except CheckpointError as error:
            problem = f"rank {self._comm.rank}: {error}"
        sizes = [int(size) for size in self._comm.gather(torch.tensor([len(text)]), "checkpoint.sizes")]
        shards = self._comm.gather(torch.tensor(list(text), dtype=torch.uint8), "checkpoint.shards", sizes)
        if self._comm.rank == 0 and all(sizes):
            infos = [ShardInfo.from_json(bytes(shard.tolist()).decode()) for shard in shards]
            try:
                self._store.commit(number, infos, passes=passes, config_digest=self._digest)
            except CheckpointError as error:
                problem = str(error)
        if problem or (self._comm.rank == 0 and not all(sizes)):
            print(f"no checkpoint at round {number}: {problem or 'a rank could not write its part'}", flush=True)
        self._last = time.monotonic()
