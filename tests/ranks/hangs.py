"""A model that hangs on one rank, as a user's might: in a lock, a read from a dead disk, a loop without an end."""

from __future__ import annotations

import os
import time

from torch import Tensor, nn

RANK = int(os.environ.get("HOROVOD_RANK", "0"))


class sleeper(nn.Linear):  # noqa: N801 (called like a function)
    """Sleeps for good on rank 1, at a step in mid-run."""

    def __init__(self, at: int) -> None:
        super().__init__(64, 10)
        self.at, self.calls = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if RANK == 1 and self.calls == self.at:
            time.sleep(3600)
        return super().forward(x.flatten(1))
