"""Predict what the number of ranks costs: seconds from ``launch`` to the first step, and a round's bookkeeping.

Pure. The constants are CPU seconds of one core of an AMD EPYC, as docs/performance.md has them from
``scripts/bench/startup``: a small model on little data. Ranks of a host take turns on its cores. The job's key-value
store is one Python process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hvd_hetero.analysis.predict.link import Link
from hvd_hetero.cluster.device_classes import Cluster

TRY_SEC = 3.0
"""Of ``launch`` before it starts a rank: imports, data and model, a step on two samples."""
RUN_SEC, PROCESS_SEC = 0.5, 0.15
"""Of horovodrun, and of its own process for each rank, which imports no torch."""
PREPARE_SEC = 2.2
"""Of a rank: imports, data, model, optimizer."""
STORE_SEC, ASK_SEC = 0.21e-3, 0.30e-3
"""Of a request to the store there, and of who asks."""
REQUESTS_OF_INIT, BYTES_OF_INIT = 13.0, 1170.0
"""Gloo connects each rank with all others: requests over n squared, and bytes over n cubed."""
TOLD_BYTES = 15.0
"""Of the facts that rank 0 tells each rank, for each rank of the job."""
ROUND_SEC, ROUND_SEC_OF_RANK = 0.15e-3, 0.075e-3
"""Of a rank in a round besides its steps: in all, and for each rank of the job, as Gloo's rings go around."""
INIT = "hvd.init"
PROJECTED = (1_000, 10_000)


@dataclass(frozen=True)
class Start:
    """What so many ranks cost, on so many hosts that have so many cores each.

    Attributes:
        phases: seconds by name, one after another.
        bookkeeping_sec: of a round, besides its steps and the transfer of the average.
        fastest: the phase that grows fastest with the ranks, and as which ``power`` of them.
        projected: its seconds with other numbers of ranks, on as many more hosts.
    """

    ranks: int
    hosts: int
    cores: int
    phases: Mapping[str, float]
    bookkeeping_sec: float
    fastest: str
    power: float
    projected: Mapping[int, float]

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def sentences(self, round_sec: float) -> list[str]:
        """Return the start and the bookkeeping in a sentence each.

        Args:
            round_sec: what a round takes in all.
        """
        hosts = f"{self.hosts} host{'s' * (self.hosts != 1)} of {self.cores} core{'s' * (self.cores != 1)}"
        parts = ", ".join(f"{name} {_duration(sec)}" for name, sec in self.phases.items())
        later = ", ".join(f"{_duration(sec)} with {ranks} ranks" for ranks, sec in self.projected.items())
        return [
            f"Start: about {_duration(self.seconds)} from launch to the first step of {self.ranks} ranks on {hosts} "
            f"({parts}), and what your own data and model take. {self.fastest} grows fastest, with the ranks to the "
            f"power of {self.power:.1f}: {later}.",
            f"A round's bookkeeping takes about {1e3 * self.bookkeeping_sec:.2g} ms, "
            f"{self.bookkeeping_sec / round_sec:.1%} of a round at the recommended tau.",
        ]  # fmt: skip


def start_of(cluster: Cluster, cores: int, link: Link, model_bytes: float) -> Start:
    """Predict the start of a cluster's ranks, of which as many are on each host as on the fullest.

    Args:
        cores: of each host.
    """
    counts: dict[str, int] = {}
    for fact in cluster.facts:
        counts[fact.host] = counts.get(fact.host, 0) + 1
    ranks, most = len(cluster.facts), max(counts.values())

    def phases(of: int) -> dict[str, float]:
        return _phases(of, min(of, most), cores, link, model_bytes)

    now, twice = phases(ranks), phases(2 * ranks)
    powers = {name: math.log2(twice[name] / sec) for name, sec in now.items() if sec > 0}
    fastest = max(powers, key=lambda name: powers[name])
    work_sec = (ROUND_SEC + ROUND_SEC_OF_RANK * ranks) * max(1.0, most / cores)
    return Start(ranks, len(counts), cores, now, work_sec + link.sum_sec(ranks, 0.0), fastest, powers[fastest],
                 {other: phases(other)[fastest] for other in PROJECTED})  # fmt: skip


def _phases(ranks: int, of_host: int, cores: int, link: Link, model_bytes: float) -> dict[str, float]:
    turns = max(1.0, of_host / cores)
    asked = REQUESTS_OF_INIT * ranks  # by each rank
    return {
        "launch tries it out": TRY_SEC,
        "horovodrun": RUN_SEC + PROCESS_SEC * max(1.0, ranks / cores),
        "imports, data, model": PREPARE_SEC * turns,
        "facts of all ranks": (STORE_SEC + ASK_SEC) * ranks + TOLD_BYTES * ranks**2 / link.bytes_per_sec,
        INIT: asked * (STORE_SEC * ranks + ASK_SEC * turns) + BYTES_OF_INIT * ranks**3 / link.bytes_per_sec,
        "model to all": link.sum_sec(ranks, model_bytes),
    }


def _duration(seconds: float) -> str:
    """Return seconds as people say them."""
    for limit, unit, name in ((120.0, 1.0, "s"), (7200.0, 60.0, "min"), (172800.0, 3600.0, "h")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {name}" if seconds < 9.95 * unit else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} days"
