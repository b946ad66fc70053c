"""A model that hangs on one rank, as a user's might: in a lock, on a dead disk, in a write that nobody reads."""

from __future__ import annotations

import os

from torch import Tensor, nn

RANK = int(os.environ.get("HOROVOD_RANK", "0"))


class writer(nn.Linear):  # noqa: N801 (called like a function)
    """Writes on rank 1, at a step in mid-run, what nobody reads."""

    def __init__(self, at: int) -> None:
        super().__init__(64, 10)
        self.at, self.calls = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if RANK == 1 and self.calls == self.at:
            _, pipe = os.pipe()
            while True:
                os.write(pipe, bytes(4096))
        return super().forward(x.flatten(1))
