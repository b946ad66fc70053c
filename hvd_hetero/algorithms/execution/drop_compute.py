"""Execute DropCompute: micro-batches until the time is up, then the sum of gradients."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_hetero.algorithms.drop_compute import DONE, DropCompute
from hvd_hetero.algorithms.execution.flat_gradients import FlatGradientExecutor
from hvd_hetero.comm.nonfinite import FLAG_SLOTS
from hvd_hetero.config.schema import AUTO
from hvd_hetero.data import Batch
from hvd_hetero.log import LOGGER
from hvd_hetero.planning.compute_threshold import best_threshold
from hvd_hetero.worker.losses import NOT_COUNTED


class DropComputeExecutor(FlatGradientExecutor):
    """Step along the gradient of what the ranks have done in time.

    Attributes:
        threshold: seconds; None: nothing is left out, or not yet.
    """

    policy: DropCompute

    def __init__(self, policy: DropCompute) -> None:
        super().__init__(policy)
        given = policy.options.threshold
        self._is_open = given == AUTO
        self.threshold: float | None = None if self._is_open else given
        self._steps, self._ended, self._seconds = 0, list[list[float]](), list[float]()
        self._dropped = 0

    def run_round(self, batches: Iterator[Batch]) -> None:
        self._begin, self._times = time.perf_counter(), list[float]()
        super().run_round(batches)
        self._steps += 1
        options = self.policy.options
        if self._is_open and self.mine.tau and self._steps > options.warmup_steps:
            self._ended.append(self._times)
            self._seconds.append(time.perf_counter() - self._begin)
            if len(self._ended) == options.measured_steps:
                self._choose()

    def compute(self, inputs: Any, targets: Any) -> float:
        losses = self.worker.gradient(inputs, targets, self.mine.weight, self._is_over)
        self._is_over()
        del self._times[: -self.worker.micro_batches]  # of a gradient in float16 that was computed once more
        left_out = int((losses == NOT_COUNTED).sum())
        self._dropped += left_out
        part = 1 - left_out / len(losses) if self.policy.options.normalise == DONE else 1
        return self.mine.weight * part

    def take_dropped(self) -> int:
        taken, self._dropped = self._dropped, 0
        return taken

    def _is_over(self) -> bool:
        """Note the end of a micro-batch; tell whether no more is to be begun."""
        self.worker.pace.pause()
        self._times.append(time.perf_counter() - self._begin)
        limit = self.threshold if self._steps >= self.policy.options.warmup_steps else None
        return limit is not None and self._times[-1] > limit

    def sum_(self, sums: Sequence[Tensor], good: bool, share: float) -> None:
        super().sum_(sums, good, share)
        if self.policy.options.normalise == DONE:
            for total in sums:  # by the share of the joined batch that was taken, the same on all ranks
                total.mul_(1 / float(total[-FLAG_SLOTS]))

    def _choose(self) -> None:
        """Choose the threshold from what all ranks have measured; the same on all of them."""
        count, ranks = len(self._ended), self.policy.ranks
        own = torch.tensor([sum(self._seconds) / count, *np.ravel(self._ended)], dtype=torch.float64)
        sizes = [int(size) for size in self.comm.gather(torch.tensor([len(own)]), "threshold.sizes", ranks=ranks)]
        said = [part.numpy() for part in self.comm.gather(own, "threshold.times", sizes, ranks)]
        step_sec, ended = float(np.mean([part[0] for part in said])), [part[1:].reshape(count, -1) for part in said]
        found = best_threshold(ended, step_sec, self.policy.options.max_dropped)
        self._is_open, self._ended, self._seconds = False, [], []
        if found is None:
            LOGGER.info("algorithm.threshold: no micro-batch is worth leaving out")
            return
        self.threshold, gain, dropped = found
        LOGGER.info("algorithm.threshold: %.4g s, which leaves out %.1f %% of micro-batches, for %.1f %% more a second",
                    self.threshold, 100 * dropped, 100 * gain)  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        names = ("threshold", "_is_open", "_steps", "_ended", "_seconds", "_dropped")
        return {**super().state_dict(), **{name.lstrip("_"): getattr(self, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.threshold, self._is_open, self._steps = state["threshold"], state["is_open"], state["steps"]
        self._ended, self._seconds = [list(step) for step in state["ended"]], list(state["seconds"])
        self._dropped = state["dropped"]
