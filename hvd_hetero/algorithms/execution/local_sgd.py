"""Execute local SGD: local steps, then the average of all models, by one of three strategies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from warnings import warn

from hvd_hetero.algorithms.averaging.blocking import Averaging, BlockingAveraging
from hvd_hetero.algorithms.averaging.delayed import DelayedAveraging
from hvd_hetero.algorithms.averaging.partial import PartialAveraging
from hvd_hetero.algorithms.execution.base import Executor
from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.comm.averaging import average_untrained
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.planning.local_steps import LEAVE_OUT, SHRINK, WAIT_AVOIDING
from hvd_hetero.planning.plan import Plan
from hvd_hetero.telemetry.staleness import Counts
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker

EFFECT = {
    SHRINK: "its batch is smaller, so that it finishes a step in a round (cluster.too_slow=shrink_batch)",
    WAIT_AVOIDING: "nobody waits for it, aggregation.mode is solo (cluster.too_slow=wait_avoiding)",
    LEAVE_OUT: "it is left out (cluster.too_slow=leave_out)",
}


class LocalSGDExecutor(Executor):
    """Take tau_g(i) local steps from x to x_i, average to x = sum_i w_i x_i, and take the outer step, if any."""

    policy: LocalSGD
    averaging: Averaging

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        super().start(plan, worker, comm)
        for name, times in self.policy.late.items():
            warn(f"class {name} is {times:.1f} times slower: {EFFECT[self.policy.too_slow]}", stacklevel=2)
        self.averaging = self._strategy(self.policy, worker, comm)

    @property
    def _strategy(self) -> type[Averaging]:
        if self.policy.is_partial:
            return PartialAveraging
        return DelayedAveraging if self.policy.aggregation.delayed else BlockingAveraging

    def run_segment(self, segment: Segment) -> None:
        self.averaging.run_segment(segment, self.class_plan)

    def end_epoch(self) -> None:
        weight = self.policy.weight_of(self.class_plan)
        average_untrained(self.comm, self.worker.state, weight, only_new=not self.policy.is_partial)

    def counts(self) -> Counts | None:
        return self.averaging.counts()

    def close(self) -> None:
        if "averaging" in vars(self):  # else it was never started
            self.averaging.close()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "averaging": self.averaging.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if type(self.averaging) is not self._strategy:  # the speeds at the job's start have decided, and that stays
            self.close()
            self.averaging = self._strategy(self.policy, self.worker, self.comm)
        self.averaging.load_state_dict(state["averaging"])

    def carry_over(self, state: Mapping[str, Any]) -> None:
        self.averaging.outer.load_state_dict(state.get("averaging", {}))
