"""Your own model and data in a Python program. On every rank: horovodrun -np 2 python scripts/examples/own_model.py"""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import hvd_hetero

x, y = load_breast_cancer(return_X_y=True)
x, y = torch.tensor((x - x.mean(0)) / x.std(0)).float(), torch.tensor(y)
hvd_hetero.train(
    model=nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2)),
    train_data=(x[:469], y[:469]),
    test_data=(x[469:], y[469:]),
    optimizer=lambda params: torch.optim.AdamW(params, lr=0.003),
    overrides={
        "train.epochs": 20, "train.batch_size": 8, "train.tau": {"fast": 16, "slow": 2}, "train.loss_args": {},
        "cluster.classes": {"fast": {"ranks": [0]}, "slow": {"ranks": [1]}},
    },
)
