"""Regression of a table of pandas or numpy. On every rank: horovodrun -np 2 python scripts/examples/regression.py"""

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import hvd_hetero

x, y = load_diabetes(return_X_y=True)
x, y = (20 * x).astype("float32"), ((y - y.mean()) / y.std()).astype("float32")[:, None]
order = np.random.default_rng(0).permutation(len(y))
train, test = order[:352], order[352:]


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().squeeze(1)  # one number a sample; of variance 1, so 1 - it is R^2


hvd_hetero.train(
    model=nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1)),
    train_data=(x[train], y[train]),
    test_data=(x[test], y[test]),
    loss=squared_error,
    metrics={"squared_error": squared_error},
    optimizer=lambda params: torch.optim.AdamW(params, lr=0.003, weight_decay=0.1),
    overrides={"train.epochs": 10, "train.batch_size": 8, "train.tau": {"fast": 8, "slow": 1}, "run.dir": "regression"},
)
