"""Average models without waiting: a class that is late for a round is left out, and merged at the next one it makes.

Beyond both papers; it joins the rounds of biased local SGD with the partial collectives of eager-SGD. Every rank i
holds the global model x of the rounds it has had the results of, and its own progress D_i since it was last merged::

    y_i = x + D_i                                  # what the rank trains
    repeat: tau_i local steps on y_i
    at round k, with P_k the ranks that have progress to give when it starts:
        x   = x + sum_{i in P_k} v_i D_i / sum_{i in P_k} v_i
        D_i = 0 for i in P_k

v_i is the number of steps in D_i, or 1 with uniform weights. Running statistics are states and not progress: theirs
are averaged, with the same weights, over the ranks in P_k, and each rank continues from the average. If no rank is
late, P_k are all ranks, D_i = x_i - x, and x becomes sum_i w_i x_i: the blocking average. A round starts when
the first class is there (solo), the class of a rank drawn for this round (majority), or a quorum of ranks (quorum). All
ranks apply all results in the same order, so x is the same on all of them, to the last bit. An outer optimizer, where
there is one, takes the average that a round proposes, as it always does.

No rank waits for a round for longer than ``aggregation.patience_sec``: one that has taken its tau steps and has no
result continues from y_i, and what it does is merged a round later. Only one that is ``aggregation.max_lag`` rounds
ahead waits. In every ``aggregation.sync_every``-th round all classes take part. An epoch ends when one class has had
all its samples; the others stop after the step that they are in.

Mode quorum is STSyn (Zhu et al., TSP 2024): a round ends when K ranks have taken their tau steps, and every rank that
has taken one takes part with all it has taken; those that are through go on meanwhile. So a rank contributes after each
step, and is there after tau of them. What it does after a round has begun goes with the next one: nothing is lost.

Progress that holds NaN or Inf is not contributed: the rank goes back to y_i as it was when it last contributed, and its
optimizer's state is cleared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_hetero.algorithms.averaging.blocking import Averaging
from hvd_hetero.algorithms.execution.resumable import PartialResumable
from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.comm.averaging import check_partial
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.flat_params import concat, split_like
from hvd_hetero.comm.nonfinite import all_finite
from hvd_hetero.comm.partial.allreduce import PartialAllreduce
from hvd_hetero.comm.partial.rounds import Round
from hvd_hetero.planning.plan import ClassPlan
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker


class PartialAveraging(PartialResumable, Averaging):
    """Take local steps, and contribute their progress to partial averages; all ranks make it together."""

    def __init__(self, policy: LocalSGD, worker: Worker, comm: Comm) -> None:
        super().__init__(policy, worker, comm)
        self._params, self._buffers = worker.state.parameters(), worker.state.buffers()
        self._in_flight: Tensor | None = None
        """``[P]`` on the host: progress that was contributed and has not come back in a result; None: nothing."""
        self._unmerged = self._averages = 0
        self._open(0)

    def _open(self, first: int) -> None:
        spec, flat = self.spec, concat([*self._params, *self._buffers])
        self._global_model, self._kept = concat(self._params).clone(), [buffers.clone() for buffers in self._buffers]
        self.partial = PartialAllreduce(
            self.comm, flat.numel(), flat.dtype, self.policy.mode, state_elements=sum(b.numel() for b in self._buffers),
            rank_groups=[c.ranks for c in self.policy.cluster.classes], seed=self.policy.seed,
            sync_every=spec.sync_every, max_lag=spec.max_lag, quorum=self.policy.quorum(),
            weight_of=float if spec.weights == "steps" else lambda steps: 1.0, first_round=first,
            hosts=len({fact.host for fact in self.policy.cluster.facts}),
        )  # fmt: skip

    def run_segment(self, segment: Segment, class_plan: ClassPlan) -> None:
        """Run rounds of tau local steps until a class has had all its samples; then merge all ranks.

        With a quorum, steps are contributed one by one, and a rank goes on until a round begins.
        """
        by_step = self.policy.quorum() is not None
        at_once, most = (1, self.spec.max_lag * class_plan.tau) if by_step else (class_plan.tau, self.spec.max_lag)
        part = class_plan.batch_size / self.policy.batch_size[class_plan.name]  # of a step, where the batch is shrunk
        partial, batches = self.partial, segment.batches()
        first, self._averages, since = partial.version, 0, 0
        for _ in range(segment.rounds * class_plan.tau // at_once):
            number = partial.version - first
            if since == 0:
                segment.start_round(number)
            steps = self.worker.local_steps(batches, at_once, lambda: partial.closing or segment.is_stopping())
            segment.record(steps, number)
            since += steps
            patience: float | None = 0.0  # others may be waiting for this rank to contribute
            # one that is as far ahead as it may be waits, and who waits is there
            arrived = not by_step or since >= class_plan.tau or self._unmerged + 1 >= most
            if self._contribute(steps * part, arrived):
                if self._unmerged >= most:
                    patience = None
                elif not by_step or partial.has_started:
                    patience = self.spec.patience_sec
            rounds = partial.pop(patience)
            self._merge(rounds)
            if rounds or not by_step:
                segment.finish_round()
                since = 0
            if partial.closing or segment.is_stopping():
                break
        for rounds in partial.finish():
            self._merge(rounds)
        check_partial(self.comm, self._params, self._averages)
        segment.averages = self._averages

    @torch.no_grad()
    def _contribute(self, steps: float, arrived: bool) -> bool:
        """Contribute the progress since the last time; return False, and go back, if it is non-finite."""
        self.worker.state.refresh()
        if not all_finite([*self._params, *self._buffers]):
            self._reset()
            for vector, kept in zip(self._buffers, self._kept, strict=True):
                vector.copy_(kept)
            self.worker.optimizer.state.clear()
            self.comm.excluded.record()
            return False
        progress = (concat(self._params) - self._global_model).to("cpu")
        fresh = progress if self._in_flight is None else progress - self._in_flight
        vector = concat([fresh, *(b.to("cpu") for b in self._buffers)])
        self.partial.contribute(vector, steps, arrived=arrived)
        self._in_flight = progress
        self._unmerged += 1
        return True

    @torch.no_grad()
    def _merge(self, rounds: Sequence[Round]) -> None:
        """Add results to the global model, and put the progress of this rank that is in flight on top of it."""
        if not rounds:
            return
        self._write(self._global_model)
        count = self._global_model.numel()
        for item in rounds:
            if item.own is not None:
                assert self._in_flight is not None
                self._in_flight -= item.own[:count]
                self._unmerged -= item.contributions
            if item.weight:
                self.outer.snapshot()
                # divided here, then added: two plain operations, which round alike on every kind of processor
                mean = item.total.div_(item.weight)
                for vector, part in zip(self._params, split_like(mean[:count], self._params), strict=True):
                    vector.add_(part.to(vector))
                for vector, part in zip(self._buffers, split_like(mean[count:], self._buffers), strict=True):
                    vector.copy_(part)
                self.outer.step()
                self._averages += 1
                self.comm.excluded.since = 0
        self.partial.release(rounds)
        self._global_model.copy_(concat(self._params))
        self._kept = [buffers.clone() for buffers in self._buffers]
        if not self._unmerged:
            self._in_flight = None  # what rounding has left of it is no progress
            if self.spec.optimizer_state == "reset":
                self.worker.optimizer.state.clear()
        elif self._in_flight is not None:
            self._reset()

    def _reset(self) -> None:
        """Set the model to the global one, with this rank's progress in flight on top."""
        flat = self._global_model
        self._write(flat if self._in_flight is None else flat + self._in_flight.to(flat))

    def _write(self, flat: Tensor) -> None:
        for vector, part in zip(self._params, split_like(flat, self._params), strict=True):
            vector.copy_(part)
