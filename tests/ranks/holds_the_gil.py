"""A rank whose first step never ends, and lets no other Python thread run meanwhile."""

from __future__ import annotations

import ctypes
import os

import torch
from torch import nn

import hvd_hetero


class Hangs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if os.environ["HOROVOD_RANK"] == "1" and self.training and self.calls > 20:
            ctypes.PyDLL(None).sleep(300)  # as compiled code may: PyDLL keeps the lock
        return self.layer(x)


torch.manual_seed(0)
data = torch.randn(256, 2), torch.randint(2, (256,))
hvd_hetero.train(None, {"train.tau": {"fast": 4, "slow": 4}, "run.watchdog_sec": 6.0, "train.epochs": 20,
                        "train.loss_args": {}, "cluster.classes": {"fast": {"ranks": [0]}, "slow": {"ranks": [1]}}},
                 model=Hangs(), train_data=data, test_data=data)  # fmt: skip
