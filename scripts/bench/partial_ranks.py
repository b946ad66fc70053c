"""Every rank runs this: ``partial_ranks.py FOLDER MODE SIZE STEPS SYNC_EVERY MS...`` takes part in partial allreduces.

MS is each rank's mean time of a step, in ms; ``random`` before it makes the times exponential. An epoch ends for a rank
after STEPS rounds. Writes ``FOLDER/rank{N}.json``: seconds from each contribution to its result, and its counts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.comm.partial.allreduce import PartialAllreduce
from hvd_hetero.config.schema import ClassConfig


def main(folder: Path, mode: str, size: int, steps: int, sync_every: int, *speeds: str) -> None:
    torch.set_num_threads(1)
    env = job_env()
    facts = [RankFacts(rank, "localhost", rank, (), "cpu", (0,)) for rank in range(env.size)]
    comm = Comm(assign({"all": ClassConfig(ranks=list(range(env.size)))}, facts), env.rank)
    partial = PartialAllreduce(
        comm, size, torch.float32, mode, rank_groups=[(rank,) for rank in range(env.size)],
        sync_every=sync_every, max_lag=64,
    )
    rng = np.random.default_rng(env.rank)
    mean_sec = float(speeds[-env.size :][env.rank]) / 1e3
    vector, waits = torch.randn(size), list[float]()
    comm.barrier("begin")
    while partial.version < steps:
        time.sleep(float(rng.exponential(mean_sec)) if speeds[0] == "random" else mean_sec)
        partial.contribute(vector)
        begin = time.perf_counter()
        results = partial.pop()
        waits.append(time.perf_counter() - begin)
        partial.release(results)
    for results in partial.finish():
        partial.release(results)
    counts = partial.pop_counts()
    found = {"waits": waits, "fresh": counts.fresh, "late": counts.late, "empty": counts.empty}
    (folder / f"rank{env.rank}.json").write_text(json.dumps(found))
    comm.barrier("end")
    partial.close()
    comm.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]), *sys.argv[6:])
