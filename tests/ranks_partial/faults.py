"""Every rank runs this: ``faults.py FOLDER MODE FAILS`` contributes to a partial allreduce until somebody ends the job.

Rank 1 raises after a while where FAILS is 1. Each rank makes ``FOLDER/rank{N}.there`` as soon as rounds have come; the
first one writes the port of its hub to ``FOLDER/port``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.comm.partial.allreduce import PartialAllreduce
from hvd_hetero.config.schema import ClassConfig
from hvd_hetero.training.api import exit_on_error

SIZE, ROUNDS = 1000, 20


def main(folder: Path, mode: str, fails: bool) -> None:
    env = job_env()
    facts = [RankFacts(rank, "localhost", rank, (), "cpu", (0,)) for rank in range(env.size)]
    comm = Comm(assign({"all": ClassConfig(ranks=list(range(env.size)))}, facts), env.rank)
    partial = PartialAllreduce(comm, SIZE, torch.float64, mode, units=[(rank,) for rank in range(env.size)])
    if partial._hub is not None:
        (folder / "port").write_text(str(partial._hub.address[1]))
    while True:
        time.sleep(0.002)
        partial.contribute(torch.ones(SIZE, dtype=torch.float64))
        partial.release(partial.pop())
        if partial.version > ROUNDS:
            (folder / f"rank{env.rank}.there").touch()
        if fails and env.rank == 1 and partial.version > 10 * ROUNDS:
            raise RuntimeError("the disk of rank 1 is on fire")


if __name__ == "__main__":
    exit_on_error(lambda: main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1"))
