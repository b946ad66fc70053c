"""Averaging models without waiting: a class that is late for a round is left out, and merged at the next one it makes.

Beyond both papers; it joins the rounds of biased local SGD with the partial collectives of eager-SGD. Every rank i
holds the common model x of the rounds it has had the results of, and its own progress D_i since it was last merged::

    y_i = x + D_i                                  # what the rank trains
    repeat: tau_i local steps on y_i
    at round k, with P_k the ranks that have progress to give when it starts:
        x   = x + sum_{i in P_k} v_i D_i / sum_{i in P_k} v_i
        D_i = 0 for i in P_k

v_i is the number of steps in D_i, or 1 with uniform weights. Running statistics are states and not progress: theirs
are averaged, with the same weights, over the ranks in P_k, and whoever takes the result goes on from the average. If
nobody is late, P_k is everybody, D_i = x_i - x, and x becomes sum_i w_i x_i: the blocking average. A round starts when
the first class is there (solo), or the class of a rank drawn for this round (majority). All ranks apply all results in
the same order, so x is the same on all of them, to the last bit. An outer optimizer, where there is one, takes the
average that a round proposes, as it always does.

Nobody waits for a round for longer than ``aggregation.patience_sec``: a rank that has its tau steps behind it and no
result goes on from y_i, and what it does is merged a round later. Only one that is ``aggregation.max_lag`` rounds ahead
waits. In every ``aggregation.sync_every``-th round all classes take part. An epoch ends when one class has had all its
samples; the others stop after the step that they are in.

Progress that holds NaN or Inf is given to nobody: the rank goes back to y_i as it was when it last gave some, and its
optimizer's state is cleared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_hetero.algorithms.outer_optimizer import Outer
from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.comm.averaging import check_partial
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.flat_params import concat, parts_of
from hvd_hetero.comm.nonfinite import finite
from hvd_hetero.comm.partial.allreduce import PartialAllreduce
from hvd_hetero.comm.partial.rounds import Round
from hvd_hetero.config.schema import AggregationConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.telemetry.staleness import Counts
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker


def check_merging(spec: AggregationConfig, cluster: Cluster) -> None:
    """Refuses what cannot be done without waiting for everybody.

    Raises:
        ConfigError: naming the key.
    """
    if cluster.size == 1:
        remedy = "set aggregation.mode=blocking, or start more ranks"
        raise ConfigError("aggregation.mode", spec.mode, "one rank has nobody to be late for", remedy)
    if spec.optimizer_state == "average":
        problem = "without waiting (aggregation.mode, cluster.too_slow) there is no time at which all ranks are there"
        remedy = "set local or reset, or wait: aggregation.mode=blocking, another cluster.too_slow"
        raise ConfigError("aggregation.optimizer_state", spec.optimizer_state, problem, remedy)


class PartialModelAveraging:
    """One rank's rounds of partial averaging; all ranks make it together."""

    def __init__(
        self, worker: Worker, comm: Comm, cluster: Cluster, spec: AggregationConfig, outer: Outer, seed: int
    ) -> None:
        self._worker, self._comm, self._cluster, self._spec = worker, comm, cluster, spec
        self._outer, self._seed = outer, seed
        self._params, self._buffers = worker.state.parameters(), worker.state.buffers()
        self._common = concat(self._params).clone()
        self._ahead: Tensor | None = None
        """``[P]`` on the host: progress that was contributed and has not come back in a result; None: nothing."""
        self._unmerged = self._averages = 0
        self._open(0)

    def _open(self, first: int) -> None:
        spec, whole = self._spec, concat([*self._params, *self._buffers])
        self._kept = [buffers.clone() for buffers in self._buffers]
        self._partial = PartialAllreduce(
            self._comm,
            whole.numel(),
            whole.dtype,
            spec.mode,
            latest=sum(b.numel() for b in self._buffers),
            units=[c.ranks for c in self._cluster.classes],
            seed=self._seed,
            sync_every=spec.sync_every,
            max_lag=spec.max_lag,
            weigh=float if spec.weights == "steps" else lambda steps: 1.0,
            first=first,
            hosts=len({fact.host for fact in self._cluster.facts}),
        )

    @property
    def version(self) -> int:
        """Number of rounds so far."""
        return self._partial.version

    def go_on_from(self, number: int) -> None:
        """Numbers the rounds on from here, in a resumed run."""
        self._partial.close()
        self._common.copy_(concat(self._params))
        self._open(number)

    def run_segment(self, segment: Segment, worker: Worker, tau: int, part: float) -> None:
        """Rounds of tau local steps until a class has had all its samples; then everybody is merged.

        Args:
            part: how much of a step a step of this rank weighs.
        """
        partial, batches = self._partial, segment.batches()
        first, self._averages = partial.version, 0
        for _ in range(segment.rounds):
            number = partial.version - first
            segment.start_round(number)
            steps = worker.local_steps(batches, tau, lambda: partial.closing or segment.is_stopping())
            segment.note(steps, number)
            if self._contribute(steps * part):
                rounds = partial.take(None if self._unmerged >= self._spec.max_lag else self._spec.patience_sec)
            else:  # others may be waiting for this rank to contribute
                rounds = partial.take(patience_sec=0)
            self._merge(rounds)
            segment.finish_round()
            if partial.closing or segment.is_stopping():
                break
        for rounds in partial.finish():
            self._merge(rounds)
        check_partial(self._comm, self._params, self._averages)
        segment.averages = self._averages

    @torch.no_grad()
    def _contribute(self, steps: float) -> bool:
        """Gives what this rank has come to since it last did; False if its values are non-finite, and it goes back."""
        self._worker.state.refresh()
        if not finite([*self._params, *self._buffers]):
            self._set(self._common if self._ahead is None else self._common + self._ahead.to(self._common))
            for vector, kept in zip(self._buffers, self._kept, strict=True):
                vector.copy_(kept)
            self._worker.optimizer.state.clear()
            self._comm.excluded.note()
            return False
        progress = (concat(self._params) - self._common).to("cpu")
        fresh = progress if self._ahead is None else progress - self._ahead
        self._partial.contribute(concat([fresh, *(b.to("cpu") for b in self._buffers)]), steps)
        self._ahead = progress
        self._unmerged += 1
        return True

    @torch.no_grad()
    def _merge(self, rounds: Sequence[Round]) -> None:
        """Takes results into the common model, and puts what is left of this rank's progress on top of it."""
        if not rounds:
            return
        self._set(self._common)
        count = self._common.numel()
        for item in rounds:
            if item.own is not None:
                assert self._ahead is not None
                self._ahead -= item.own[:count]
                self._unmerged -= item.contributions
            if item.weight:
                self._outer.remember()
                # divided here, then added: two plain operations, which round alike on every kind of processor
                mean = item.total.div_(item.weight)
                for vector, part in zip(self._params, parts_of(mean[:count], self._params), strict=True):
                    vector.add_(part.to(vector))
                for vector, part in zip(self._buffers, parts_of(mean[count:], self._buffers), strict=True):
                    vector.copy_(part)
                self._outer.step()
                self._averages += 1
                self._comm.excluded.since = 0
        self._partial.done(rounds)
        self._common.copy_(concat(self._params))
        self._kept = [buffers.clone() for buffers in self._buffers]
        if not self._unmerged:
            self._ahead = None  # what rounding has left of it is nobody's progress
            if self._spec.optimizer_state == "reset":
                self._worker.optimizer.state.clear()
        elif self._ahead is not None:
            self._set(self._common + self._ahead.to(self._common))

    def _set(self, whole: Tensor) -> None:
        for vector, part in zip(self._params, parts_of(whole, self._params), strict=True):
            vector.copy_(part)

    def counts(self) -> Counts:
        """What this rank has sent since the last call."""
        return self._partial.take_counts()

    def close(self) -> None:
        self._partial.close()
