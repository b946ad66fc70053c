"""Every rank runs this: ``scripted.py FOLDER CASE...``: the ranks compute in a given order, whatever their real speed.

A rank that is about to work waits for its turn; when it comes back for more, what it did has had all its effects, and
it is the next one's turn. So who is late for which round is known beforehand. Writes ``FOLDER/rank{N}.pt``, by case.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from ranks_methods.problem import data, model  # noqa: E402
from ranks_partial.schedules import CASES, Schedule, facts  # noqa: E402

from hvd_hetero import algorithms  # noqa: E402
from hvd_hetero.cluster.device_classes import assign  # noqa: E402
from hvd_hetero.cluster.placement import Placement  # noqa: E402
from hvd_hetero.comm.kv_store import JobEnv, job_env  # noqa: E402
from hvd_hetero.comm.model_server import ModelLink  # noqa: E402
from hvd_hetero.comm.partial.allreduce import PartialAllreduce  # noqa: E402
from hvd_hetero.config.load import device_classes, load  # noqa: E402
from hvd_hetero.training import startup, trainer
from hvd_hetero.training.watchdog import Watchdog  # noqa: E402
from hvd_hetero.worker import components, epoch
from hvd_hetero.worker.components import UserObjects  # noqa: E402
from hvd_hetero.worker.index_feed import Feed  # noqa: E402


class Turns:
    """The fake clock: a file with the number of turns and of rounds so far, which the rank whose turn it is writes.

    Attributes:
        rounds: says how many results have reached this rank.
    """

    rounds: Callable[[], int]

    def __init__(self, folder: Path, order: list[int], rank: int) -> None:
        self._folder, self._order, self._rank = folder, order, rank
        self._mine, self._lock = False, threading.Lock()

    def _now(self) -> tuple[int, int]:
        path = self._folder / "turn"
        turn, rounds = path.read_text().split() if path.exists() else (0, 0)
        return int(turn), int(rounds)

    def meet(self) -> None:
        """Nobody begins before all ranks are about to: a server gives whoever comes later a later model."""
        (self._folder / f"there{self._rank}").touch()
        while not all((self._folder / f"there{rank}").exists() for rank in self._order):
            time.sleep(0.001)

    def wait(self) -> None:
        self.release()
        while True:
            turn, rounds = self._now()
            # what another rank has had in its turn may still be on its way to this one
            if self._order[turn % len(self._order)] == self._rank and self.rounds() >= rounds:
                break
            time.sleep(0.001)
        self._mine = True

    def release(self) -> None:
        with self._lock:  # a rank that ends its epoch may wait for others at that very moment
            if self._mine:
                turn = self._now()[0] + 1
                while (self._folder / f"done{self._order[turn % len(self._order)]}").exists():
                    turn += 1
                    if turn > 10_000:  # everybody is done
                        break
                part = self._folder / f"turn.{self._rank}"
                part.write_text(f"{turn} {self.rounds()}")
                part.replace(self._folder / "turn")
            self._mine = False

    def finish(self) -> None:
        (self._folder / f"done{self._rank}").touch()
        with self._lock:  # whoever did not know yet may have passed the turn to this rank meanwhile
            self._mine = self._mine or self._order[self._now()[0] % len(self._order)] == self._rank
        self.release()


def main(folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    env = job_env()
    found = {}
    for number, name in enumerate(names):
        own = folder / str(number)
        own.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            found[name] = run(own, CASES[name], env, patch)
    torch.save(found, folder / f"rank{env.rank}.pt")


def run(folder: Path, case: Schedule, env: JobEnv, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Train one case; return what this rank found."""
    turns = Turns(folder, case.order, env.rank)
    worked: list[Any] = []

    def arrived() -> int:
        algorithm = this.algorithm
        if case.rule is not None:
            return 0  # nothing comes to a rank that has not asked
        partial = (algorithm if case.has_partial else algorithm.averaging).partial
        return int(partial.version + len(partial._rounds))

    turns.rounds = arrived

    def read(source: Any, rows: Any, generator: Any, start: int = 0) -> Iterator[Any]:
        for i, batch in enumerate(source.batches(rows, generator)):
            turns.meet()
            if i % case.steps_a_turn(env.rank) == 0:
                turns.wait()
            yield batch

    def finish_served(self: Any) -> Any:
        threading.Timer(0.3, turns.finish).start()
        return ended(self)

    def finish(self: Any) -> Any:
        threading.Timer(0.3, turns.finish).start()  # by then the others have been told
        yield from finished(self)

    def collect(self: Any, indices: Any, at: Any, *results: Any) -> None:
        worked.append((torch.from_numpy(indices.copy()).long(), torch.from_numpy(at.copy()).long()))
        collected(self, indices, at, *results)

    def pop(self: Any, patience_sec: float | None = None, max_rounds: int | None = None) -> Any:
        taken = popped(self, 0.3 if case.waits and patience_sec is None else patience_sec, max_rounds)
        if taken or patience_sec is not None:
            return taken
        turns.release()  # it is others whom this rank waits for
        return popped(self, None, max_rounds)

    def has_started(self: Any) -> bool:
        time.sleep(0.1)  # by then this rank has been told
        return bool(started.fget(self))

    popped, started = PartialAllreduce.pop, PartialAllreduce.has_started
    patch.setattr(PartialAllreduce, "pop", pop)
    patch.setattr(PartialAllreduce, "has_started", property(has_started))
    ended = ModelLink.finish
    patch.setattr(ModelLink, "finish", finish_served)
    finished, collected = PartialAllreduce.finish, Feed.collect
    patch.setattr(epoch, "read", read)
    patch.setattr(PartialAllreduce, "finish", finish)
    patch.setattr(Feed, "collect", collect)
    # nobody comes to rest within an epoch in order to save
    config = load((), case.overrides() | {"checkpoint.every_sec": None}, algorithms.method)
    given = UserObjects(model=lambda: model(case.model), train_data=data(), test_data=data())
    parts = components.build(config, given)
    cluster = assign(device_classes(config.cluster.classes), facts(env.size))
    startup.check(config, parts, cluster)
    this_job = startup.Job(env, config, parts, cluster, Placement("cpu", 1, None), Watchdog(env))
    this = trainer.Trainer(this_job, folder / "run")
    this.prepare()
    summary = this.run()
    table = this.feed.sampler.losses if env.rank == 0 else None
    this.close()
    return {"model": this.worker.model.state_dict(), "worked": worked, "summary": summary, "losses": table}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
