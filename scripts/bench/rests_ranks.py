"""One rank of scripts/bench/rests: FOLDER SECONDS."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from hvd_hetero.comm.communicator import hvd


def main(folder: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    hvd.init()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[hvd.rank() % len(cores)]})
    hvd.barrier()
    start = time.process_time()
    time.sleep(seconds)
    idle = (time.process_time() - start) / seconds
    matrix = torch.randn(128, 128)

    def products() -> int:
        done, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            matrix @ matrix
            done += 1
        return done

    hvd.barrier()
    beside = products()
    rank = hvd.rank()
    hvd.shutdown()
    time.sleep(0.5)  # the other rank's thread ends too
    (folder / f"rank{rank}.json").write_text(json.dumps({"idle": idle, "work": beside / products()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
