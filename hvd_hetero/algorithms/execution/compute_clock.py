"""The clock of DropCompute: when the parts of a round end on this rank, and after which time no more is begun."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from hvd_hetero.algorithms.drop_compute import ThresholdOptions
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.config.schema import AUTO
from hvd_hetero.log import LOGGER
from hvd_hetero.planning.compute_threshold import best_threshold


class ComputeClock:
    """Time the parts of a round, micro-batches or local steps, and choose the threshold from what all ranks measure.

    Args:
        warmup: first rounds, in which nothing is left out nor measured, and ``measured`` ones, for ``auto``.
        pause: books what was computed so far, and waits until it is.

    Attributes:
        threshold: seconds; None: nothing is left out, or not yet.
        times: at which the parts of this round have ended, from its begin.
    """

    def __init__(self, options: ThresholdOptions, warmup: int, measured: int, pause: Callable[[], None]) -> None:
        self._options, self._warmup, self._measured, self._pause = options, warmup, measured, pause
        self.reset()

    def reset(self) -> None:
        """Begin anew, where rounds have become others."""
        threshold = self._options.threshold
        self._is_open = threshold == AUTO
        self.threshold: float | None = None if self._is_open else threshold
        self._rounds, self._ended, self._seconds = 0, list[list[float]](), list[float]()
        self.times: list[float] = []

    def begin(self) -> None:
        """Begin a round."""
        self._begin, self.times = time.perf_counter(), []

    def is_over(self) -> bool:
        """Note the end of a part; tell whether no more is to be begun."""
        self._pause()
        self.times.append(time.perf_counter() - self._begin)
        limit = self.threshold if self._rounds >= self._warmup else None
        return limit is not None and self.times[-1] > limit

    def end(self, comm: Comm, ranks: tuple[int, ...] | None = None) -> None:
        """End a round, with all that these ranks, or all, did together; all of them call it, idle ones too."""
        self._rounds += 1
        if not self._is_open or self._rounds <= self._warmup:
            return
        self._ended.append(self.times)
        self._seconds.append(time.perf_counter() - self._begin)
        if len(self._ended) == self._measured:
            self._choose(comm, ranks)

    def _choose(self, comm: Comm, ranks: tuple[int, ...] | None) -> None:
        """Choose the threshold from what all ranks have measured; the same on all of them."""
        count = len(self._ended)
        measured = torch.tensor([sum(self._seconds) / count, *np.ravel(self._ended)], dtype=torch.float64)
        sizes = [int(size) for size in comm.gather(torch.tensor([len(measured)]), "threshold.sizes", ranks=ranks)]
        times = [part.numpy() for part in comm.gather(measured, "threshold.times", sizes, ranks) if len(part) > 1]
        round_sec, ended = float(np.mean([part[0] for part in times])), [part[1:].reshape(count, -1) for part in times]
        found = best_threshold(ended, round_sec, self._options.max_dropped)
        self._is_open, self._ended, self._seconds = False, [], []
        if found is None:
            LOGGER.info("algorithm.threshold: none, as leaving steps out would not make training faster")
            return
        self.threshold, gain, dropped = found
        LOGGER.info("algorithm.threshold: %.4g s, which leaves out %.1f %% of all work; %.1f %% more is done a second",
                    self.threshold, 100 * dropped, 100 * gain)  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "is_open": self._is_open, "steps": self._rounds, "ended": self._ended,
                "seconds": self._seconds}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.threshold, self._is_open, self._rounds = state["threshold"], state["is_open"], state["steps"]
        self._ended, self._seconds = [list(step) for step in state["ended"]], list(state["seconds"])
