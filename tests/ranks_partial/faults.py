"""Every rank runs this: ``faults.py FOLDER MODE FAILS`` contributes to a partial allreduce, or pushes to a server,
until somebody ends the job.

Rank 1 raises after a while where FAILS is 1. Each rank makes ``FOLDER/rank{N}.there`` as soon as rounds have come; the
first one writes the port of its hub to ``FOLDER/port``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.comm.model_server import ModelLink
from hvd_hetero.comm.partial.allreduce import PartialAllreduce
from hvd_hetero.comm.partial.control_channel import ControlServer
from hvd_hetero.config.schema import ClassConfig
from hvd_hetero.planning.quorum import QUORUM, Quorum
from hvd_hetero.training.api import exit_on_error

SIZE, ROUNDS = 1000, 20


def contributes(comm: Comm, mode: str) -> tuple[Callable[[], int], ControlServer | None]:
    """A round of a partial allreduce, which returns how many there were; and rank 0's hub."""
    units = [(rank,) for rank in range(comm.size)]
    quorum = Quorum.of(2, [1.0] * comm.size) if mode == QUORUM else None
    partial = PartialAllreduce(comm, SIZE, torch.float64, mode, rank_groups=units, quorum=quorum)

    def meet() -> int:
        partial.contribute(torch.ones(SIZE, dtype=torch.float64))
        partial.release(partial.pop())
        return partial.version

    return meet, partial._hub


def pushes(comm: Comm) -> tuple[Callable[[], int], ControlServer | None]:
    """The same for a push to a server."""
    vector = torch.ones(SIZE, dtype=torch.float64)
    link = ModelLink(comm, Adds() if comm.rank == 0 else None, vector, [(rank,) for rank in range(comm.size)])
    return lambda: link.exchange(vector).version, link._server


class Adds:
    """A model that only counts."""

    def __init__(self) -> None:
        self.version, self._total = 0, torch.zeros(SIZE, dtype=torch.float64)

    def arrive(self, rank: int, vector: torch.Tensor) -> tuple[int, bool]:
        self.version += 1
        self._total += vector
        return 0, True

    def skip(self, rank: int) -> None:
        pass

    def give(self, rank: int) -> torch.Tensor:
        return self._total

    def finish(self) -> None:
        pass


def main(folder: Path, mode: str, fails: bool) -> None:
    env = job_env()
    facts = [RankFacts(rank, "localhost", rank, (), "cpu", (0,)) for rank in range(env.size)]
    comm = Comm(assign({"all": ClassConfig(ranks=list(range(env.size)))}, facts), env.rank)
    meet, hub = pushes(comm) if mode == "server" else contributes(comm, mode)
    if hub is not None:
        (folder / "port").write_text(str(hub.address[1]))
    while True:
        time.sleep(0.002)
        version = meet()
        if version > ROUNDS:
            (folder / f"rank{env.rank}.there").touch()
        if fails and env.rank == 1 and version > 10 * ROUNDS:
            raise RuntimeError("the disk of rank 1 is on fire")


if __name__ == "__main__":
    exit_on_error(lambda: main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1"))
