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

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, final

from hvd_hetero.algorithms.synchronous import FAST, Lockstep, LockstepOptions
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import finite, summable, write_validity_flags
from hvd_hetero.comm.parameter_server import Servers
from hvd_hetero.comm.weighted_sums import renormalize
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.data import Batch
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import SERVER, Plan
from hvd_hetero.worker.worker import Worker


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
    """Synchronous SGD on the fast class, gradients summed by the other ranks."""

    Options: ClassVar[type[AlgorithmConfig]] = BytePSOptions
    others: ClassVar[str] = SERVER
    flat_gradients: ClassVar[bool] = True

    def check(self) -> None:
        if len(self.ranks) == self.cluster.size:
            names = ", ".join(c.name for c in self.cluster.classes)
            problem = f"there is no rank left to be a summation server (classes: {names})"
            raise ConfigError("algorithm.name", self.options.name, problem, "add a second class, or use sync_sgd")
        super().check()

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        assert isinstance(self.options, BytePSOptions)
        self.servers = Servers(comm, self.ranks, self.options.partition_bytes)
        self.gradients = worker.flat_gradients()
        self.vectors = worker.state.padded_gradients  # a server's only tell how long they are

    def run_round(self, worker: Worker, batches: Iterator[Batch], comm: Comm) -> None:
        sums = [summable(vector) for vector in self.vectors]
        if self.mine.role == SERVER:
            self.servers.sum_(sums, "gradient")
            return
        for inputs, targets in worker.pace.steps(batches, 1):
            self.keep_buffers(worker)
            worker.gradient(inputs, targets, self.mine.weight)
            good = finite(self.gradients)
            sums = [summable(vector) for vector in self.vectors]
            write_validity_flags(sums, good, share=self.mine.weight)
            worker.pace.pause()
            self.servers.sum_(sums, "gradient")
            renormalize(comm, sums, good, "gradient", self.ranks)
            for gradient, total in zip(self.vectors, sums, strict=True):
                if gradient is not total:
                    gradient.copy_(total)
            if not good:
                self.leave_out(worker, comm)
            worker.apply()
