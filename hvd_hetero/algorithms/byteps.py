"""BytePS-like: slow ranks are summation servers (Jiang et al., "A Unified Architecture for Accelerating Distributed DNN
Training in Heterogeneous GPU/CPU Clusters", OSDI 2020).

A round is one step. Workers are the fast class, every other rank is a server; servers hold no data and take no step::

    worker i:  g_i = gradient of its batch at x, cut into partitions of ``algorithm.partition_bytes``
               push partition j to server j mod s        # for all j; then
               pull the sums back, x = x - lr * g
    server k:  for each of its partitions: receive one from every worker, add them up, send the sum to every worker

The mathematics is that of synchronous SGD on the fast class. What carries it is Horovod's alltoall over all ranks, in
which a rank sends each other rank a piece of its own choice: one for the push and one for the pull of every s
consecutive partitions, all of them on the way at once. So it is really the server that sums, in the order of the
workers, and per step a worker sends and receives each gradient element once; no ring of workers is involved. Unlike
BytePS itself, a push does not start before the whole backward pass is done, and workers do not share in the summing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from hvd_hetero.algorithms.policy import FLOAT32
from hvd_hetero.algorithms.synchronous import FAST, Lockstep, LockstepOptions
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import SERVER


@dataclass(frozen=True)
class BytePSOptions(LockstepOptions):
    """Options of BytePS.

    Attributes:
        participants: the class of the workers; all other ranks are servers.
        partition_bytes: size of the pieces that are spread over the servers.
    """

    participants: str = FAST
    partition_bytes: int = field(default=4096000, metadata={"at_least": 8})


@final
class BytePS(Lockstep):
    """Train the fast class alone, and let the other ranks sum its gradients."""

    executor: ClassVar[str] = "hvd_hetero.algorithms.execution.byteps.BytePSExecutor"
    options: BytePSOptions
    Options: ClassVar[type[AlgorithmConfig]] = BytePSOptions
    others: ClassVar[str] = SERVER
    flat_gradients: ClassVar[bool] = True
    unused: ClassVar[Mapping[str, Any]] = {**Lockstep.unused, "wire": FLOAT32}

    def check(self) -> None:
        if len(self.ranks) == self.cluster.size:
            names = ", ".join(c.name for c in self.cluster.classes)
            problem = f"there is no rank left to be a summation server (classes: {names})"
            raise ConfigError("algorithm.name", self.options.name, problem, "add a second class, or use sync_sgd")
        super().check()
