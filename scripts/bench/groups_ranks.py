"""One rank of scripts/bench/groups: FOLDER SETS."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from itertools import chain, combinations, islice
from pathlib import Path

import torch

from hvd_hetero.comm.communicator import hvd


def main(folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    size = int(os.environ["HOROVOD_SIZE"])
    subsets = chain.from_iterable(combinations(range(size), members) for members in range(2, size))
    sets = [hvd.ProcessSet(list(ranks)) for ranks in islice(subsets, count)]
    begin, cpu = time.perf_counter(), time.process_time()
    hvd.init(process_sets=sets)
    found = {"sets": len(sets), "init_sec": time.perf_counter() - begin, "init_cpu_sec": time.process_time() - cpu}
    vector, took = torch.zeros(1000), []
    for _ in range(100):
        start = time.perf_counter()
        hvd.allreduce_(vector, name="sum")
        took.append(1e3 * (time.perf_counter() - start))
    found["sum_ms"] = statistics.median(took[10:])
    start, cpu = time.perf_counter(), time.process_time()
    time.sleep(2)
    found["idle"] = (time.process_time() - cpu) / (time.perf_counter() - start)
    (folder / f"rank{hvd.rank()}.json").write_text(json.dumps(found))
    hvd.barrier()
    hvd.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
