"""Execute BytePS-like SGD: workers push gradients to the servers and pull the sums."""

from __future__ import annotations

from collections.abc import Iterator

from hvd_hetero.algorithms.byteps import BytePS
from hvd_hetero.algorithms.execution.synchronous import SynchronousExecutor
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import finite, summable, write_validity_flags
from hvd_hetero.comm.parameter_server import Servers
from hvd_hetero.comm.weighted_sums import renormalize
from hvd_hetero.data import Batch
from hvd_hetero.planning.plan import SERVER, Plan
from hvd_hetero.worker.worker import Worker


class BytePSExecutor(SynchronousExecutor):
    """Step along the gradient of the joined batch, summed by the servers."""

    policy: BytePS

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        self.servers = Servers(comm, self.policy.ranks, self.policy.options.partition_bytes)
        self.gradients = worker.flat_gradients()
        self.vectors = worker.state.padded_gradients  # a server's only tell how long they are

    def run_round(self, batches: Iterator[Batch]) -> None:
        worker = self.worker
        sums = [summable(vector) for vector in self.vectors]
        if self.mine.role == SERVER:
            self.servers.sum_(sums, "gradient")
            return
        for inputs, targets in worker.pace.steps(batches, 1):
            self.keep_buffers()
            worker.gradient(inputs, targets, self.mine.weight)
            good = finite(self.gradients)
            sums = [summable(vector) for vector in self.vectors]
            write_validity_flags(sums, good, share=self.mine.weight)
            worker.pace.pause()
            self.servers.sum_(sums, "gradient")
            renormalize(self.comm, sums, good, "gradient", self.policy.ranks)
            for gradient, total in zip(self.vectors, sums, strict=True):
                if gradient is not total:
                    gradient.copy_(total)
            if not good:
                self.exclude_step()
            worker.apply()
