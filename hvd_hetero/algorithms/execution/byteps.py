"""Execute BytePS-like SGD: workers push gradients to the servers and pull the sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from hvd_hetero.algorithms.byteps import BytePS
from hvd_hetero.algorithms.execution.flat_gradients import FlatGradientExecutor
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import summable, write_validity_flags
from hvd_hetero.comm.parameter_server import Servers
from hvd_hetero.comm.weighted_sums import renormalize
from hvd_hetero.data import Batch
from hvd_hetero.planning.plan import SERVER, Plan
from hvd_hetero.worker.worker import Worker


class BytePSExecutor(FlatGradientExecutor):
    """Step along the gradient of the joined batch, summed by the servers."""

    policy: BytePS

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)  # a server's vectors only tell how long gradients are
        self.servers = Servers(comm, self.policy.ranks, self.policy.options.partition_bytes)

    def run_round(self, batches: Iterator[Batch]) -> None:
        if self.class_plan.role == SERVER:
            self.servers.sum_([summable(vector) for vector in self.vectors], "gradient")
        else:
            super().run_round(batches)

    def sum_(self, sums: Sequence[Tensor], is_finite: bool, prescaled_weight: float) -> None:
        write_validity_flags(sums, is_finite, prescaled_weight)
        self.servers.sum_(sums, "gradient")
        renormalize(self.comm, sums, is_finite, "gradient", self.policy.ranks)
