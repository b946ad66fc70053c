"""One checkpoint on its way to the disk, written by threads beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hvd_hetero.comm.rendezvous import JobEnv, exchange
from hvd_hetero.store import ShardInfo, Store, join, split

TIMEOUT_SEC = 1800.0
"""What a rank may take to write its shard."""
SHARD, PROBLEM = "shard", "problem"


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
        made_with: see :meth:`hvd_hetero.store.Store.commit`.
        state: makes what this rank saves, at once.
        best: if it is the best one so far.

    Attributes:
        number: its round.
        problem: why it is not on the disk, as far as this rank knows; empty if it is.
    """

    def __init__(
        self, store: Store, env: JobEnv, number: int, passes: int, made_with: Mapping[str, Any],
        state: Callable[[], Any], best: Best | None,
    ) -> None:  # fmt: skip
        self._store, self._env, self.number, self._passes, self._made_with = store, env, number, passes, made_with
        self._best, self.problem = best, ""
        content = self._try(state)
        self._thread = threading.Thread(
            target=self._try, args=(lambda: self._run(content),), name="hvd_hetero.checkpoint", daemon=True
        )
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
        said = self._tell({PROBLEM: self.problem} if info is None else {SHARD: info})
        if self._env.rank == 0:
            self._try(lambda: self._commit(said))
        outcome = self._tell({PROBLEM: self.problem})[0]
        self.problem = self.problem or outcome[PROBLEM]

    def _tell(self, content: dict[str, Any]) -> list[dict[str, Any]]:
        return exchange(self._env, "checkpoint", content, TIMEOUT_SEC)

    def _commit(self, said: list[dict[str, Any]]) -> None:
        problems = [other[PROBLEM] for other in said if SHARD not in other]
        try:
            if problems:
                raise RuntimeError(problems[0])
            infos = [ShardInfo.from_json(other[SHARD]) for other in said]
            self._store.commit(self.number, infos, passes=self._passes, made_with=self._made_with)
        except Exception:
            with suppress(Exception):  # what failed first is to be told
                self._store.discard(self.number)  # all ranks are done with it, and a full disk is not to be kept full
            raise
        if self._best is not None:
            self._store.mark_best(self.number, self._best.value, self._best.metric)


def copied(state: Any) -> Any:
    """The same content in memory of its own, on the host.

    Raises:
        CheckpointError: a part of it could only be saved by pickle.
    """
    return join(*split(state))
