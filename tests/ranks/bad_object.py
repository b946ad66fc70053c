"""A user's program that gives a loss which is not per sample."""

from __future__ import annotations

import sys

import torch
from torch import nn

import hvd_hetero

if __name__ == "__main__":
    data = torch.randn(64, 4), torch.arange(64) % 3
    hvd_hetero.train(None, {"train.tau": {"fast": 2, "slow": 1}, "run.dir": sys.argv[1]}, model=nn.Linear(4, 3),
                     train_data=data, test_data=data, loss=nn.CrossEntropyLoss(reduction="sum"))
