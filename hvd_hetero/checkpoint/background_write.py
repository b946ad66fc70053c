"""Write one checkpoint in threads while the ranks train."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hvd_hetero.checkpoint import CheckpointError, ShardInfo, Store, join, split
from hvd_hetero.comm.kv_store import JobEnv, collect

TIMEOUT_SEC = 1800.0
"""What a rank may take to write its shard."""
SHARD, PROBLEM = "shard", "problem"
_numbers = itertools.count()
"""Of the checkpoints that this process has begun, in whichever run: by it ranks know of which one they tell."""


@dataclass(frozen=True)
class Best:
    """That a checkpoint is the best so far, by this value of this metric."""

    value: float
    metric: str


class Write:
    """One checkpoint on its way to the disk: every rank writes its shard, then rank 0 the manifest.

    A thread does it on each rank. They tell each other through the job's key-value store what has become of it, so that
    no rank's own thread has a part in it: a job that fails in the next round has its checkpoint all the same. All ranks
    make a Write for the same round at the same place.

    Args:
        made_with: see :meth:`hvd_hetero.checkpoint.Store.commit`.
        state: makes what this rank saves, at once.
        best: if it is the best one so far.

    Attributes:
        number: its round.
        problem: why it is not on the disk, as far as this rank knows; empty if it is.
    """

    def __init__(
        self, store: Store, env: JobEnv, number: int, epochs: int, made_with: Mapping[str, Any],
        state: Callable[[], Any], best: Best | None,
    ) -> None:  # fmt: skip
        self._store, self._env, self.number, self._epochs, self._made_with = store, env, number, epochs, made_with
        self._best, self.problem, self._name = best, "", f"checkpoint.{next(_numbers)}"
        content = self._try(state)
        self._thread = threading.Thread(target=self._run, args=(content,), name="hvd_hetero.checkpoint", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_sec: float | None = None) -> None:
        self._thread.join(timeout_sec)

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever it is, the training goes on
            self.problem = self.problem or f"rank {self._env.rank}: {error}"

    def _run(self, content: Any) -> None:
        info = None if self.problem else self._try(
            lambda: self._store.write_shard(self.number, self._env.rank, content).to_json()
        )
        message = {PROBLEM: self.problem} if info is None else {SHARD: info}
        outcome = self._try(lambda: collect(self._env, self._name, message, TIMEOUT_SEC, self._commit))
        self.problem = self.problem or outcome or ""

    def _commit(self, messages: list[dict[str, Any]]) -> str:
        """Write the manifest on rank 0, once all shards are there; return what stands in the way, if anything does."""
        self.problem = next((other[PROBLEM] for other in messages if SHARD not in other), "")
        if not self.problem:
            self._try(lambda: self._store.commit(
                self.number, [ShardInfo.from_json(other[SHARD]) for other in messages],
                epochs=self._epochs, made_with=self._made_with,
            ))  # fmt: skip
        try:
            if self.problem:  # all ranks are done with it, and a full disk is not to be kept full
                self._store.discard(self.number)
            elif self._best is not None:
                self._store.mark_best(self.number, self._best.value, self._best.metric)
        except CheckpointError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        return self.problem


def copied(state: Any) -> Any:
    """The same content in memory of its own, on the host.

    Raises:
        CheckpointError: a part of it could only be saved by pickle.
    """
    return join(*split(state))
