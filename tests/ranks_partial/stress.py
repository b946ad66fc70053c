"""Every rank runs this: ``stress.py FOLDER SEED STEPS MODE...`` sends random integers through a partial allreduce.

Nothing may be lost or sent twice: integers in float64 add up exactly. Writes ``FOLDER/rank{N}.json``, by mode.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.comm.partial.allreduce import PartialAllreduce
from hvd_hetero.config.schema import ClassConfig

SIZE = 1000


def main(folder: Path, seed: int, steps: int, modes: Sequence[str]) -> None:
    env = job_env()
    facts = [RankFacts(rank, "localhost", rank, (), "cpu", (0,)) for rank in range(env.size)]
    comm = Comm(assign({"all": ClassConfig(ranks=list(range(env.size)))}, facts), env.rank)
    found = {mode: stress(comm, mode, seed, steps) for mode in modes}
    (folder / f"rank{env.rank}.json").write_text(json.dumps(found))
    comm.close()


def stress(comm: Comm, mode: str, seed: int, steps: int) -> dict[str, Any]:
    """Contribute at random moments; return what became of it."""
    units = [(rank,) for rank in range(comm.size)]
    partial = PartialAllreduce(
        comm, SIZE, torch.float64, mode, rank_groups=units, seed=seed, sync_every=32, max_lag=8
    )
    rng = np.random.default_rng((seed, comm.rank))
    computed, received, digest = torch.zeros(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64), []
    weights, rounds, epochs = 0.0, 0, 2

    def enter(results: list) -> None:
        nonlocal weights, rounds
        for result in results:
            assert result.number == rounds, "in order, none skipped"
            rounds += 1
            received.add_(result.total)
            weights += result.weight
            digest.append(hashlib.sha256(result.total.numpy().tobytes()).hexdigest()[:8])
        partial.release(results)

    for _ in range(epochs):
        for _ in range(steps):
            time.sleep(float(rng.exponential(0.001 * (1 + 3 * comm.rank))) if rng.random() < 0.5 else 0.0)
            vector = torch.from_numpy(rng.integers(-1000, 1000, SIZE).astype(np.float64))
            computed.add_(vector)
            partial.contribute(vector)
            enter(partial.pop())
        for results in partial.finish():
            enter(results)
        comm.barrier("epoch")
    counts = partial.pop_counts()
    whole = torch.stack(comm.gather(computed, "computed")).sum(0)
    partial.close()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("hvd_hetero")]
    return {
        "exact": bool(torch.equal(whole, received)), "weights": weights, "rounds": rounds, "digests": digest,
        "fresh": counts.fresh, "late": counts.late, "empty": counts.empty, "oldest": max(counts.staleness),
        "sent": sum(counts.staleness.values()), "threads_left": left,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
