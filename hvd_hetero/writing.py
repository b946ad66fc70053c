"""One checkpoint on its way to the disk, written by threads beside the training."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hvd_hetero.comm.horovod import Comm
from hvd_hetero.store import ShardInfo, Store


class Write:
    """One checkpoint on its way to the disk: every rank writes its shard, then rank 0 the manifest.

    Attributes:
        number: its round.
        done: whether it is on the disk; the same on all ranks.
    """

    def __init__(
        self, store: Store, number: int, passes: int, digest: str, comm: Comm, state: Any, best: float | None
    ) -> None:
        self._store, self.number, self._passes, self._digest, self._comm = store, number, passes, digest, comm
        self._best, self.done = best, False
        self._text, self._problem = b"", ""
        self._committing = False
        self._start(lambda: self._shard(state))

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def go_on(self) -> bool:
        """The next thing to be done, once no rank is busy any more; False if that was all."""
        if self._committing:
            if self._problem:
                print(f"no checkpoint at round {self.number}: {self._problem}", flush=True)
            self.done = not self._comm.max([float(bool(self._problem))], "checkpoint.done")[0]
            return False
        self._committing = True
        sizes = [int(size) for size in self._comm.gather(torch.tensor([len(self._text)]), "checkpoint.sizes")]
        mine = torch.tensor(list(self._text), dtype=torch.uint8)
        shards = self._comm.gather(mine, "checkpoint.shards", sizes)
        if self._comm.rank == 0 and all(sizes):
            self._start(lambda: self._commit([bytes(shard.tolist()).decode() for shard in shards]))
        elif self._comm.rank == 0:
            self._problem = self._problem or "a rank could not write its part"
        return True

    def _start(self, call: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._told, args=(call,), name="hvd_hetero.checkpoint")
        self._thread.start()

    def _told(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, the training goes on
            self._problem = f"rank {self._comm.rank}: {error}"

    def _shard(self, state: Any) -> None:
        self._text = self._store.write_shard(self.number, self._comm.rank, state).to_json().encode()

    def _commit(self, shards: list[str]) -> None:
        infos = [ShardInfo.from_json(text) for text in shards]
        self._store.commit(self.number, infos, passes=self._passes, config_digest=self._digest)
        if self._best is not None:
            self._store.mark_best(self.number, self._best)


def copied(state: Any) -> Any:
    """The same content in memory of its own, on the host."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, np.ndarray):
        return state.copy()
    if isinstance(state, dict):
        own = copy.copy(state)  # of the same kind: a Counter is none of another
        for key, part in state.items():
            own[key] = copied(part)
        return own
    if type(state) in (list, tuple):
        return type(state)(copied(part) for part in state)
    return state
