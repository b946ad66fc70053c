"""Several labels a sample. On every rank: horovodrun -np 2 python scripts/examples/multi_label.py"""

import torch
from sklearn.datasets import make_multilabel_classification
from torch import Tensor, nn

import hvd_hetero

x, y = make_multilabel_classification(1200, n_features=20, n_classes=5, random_state=0)
x, y = torch.tensor(x).float() / 10, torch.tensor(y).float()


def all_right(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs > 0) == (targets > 0)).float().mean(1)  # share of the labels


hvd_hetero.train(
    model=nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5)),
    train_data=(x[:1000], y[:1000]),
    test_data=(x[1000:], y[1000:]),
    metrics={"all_right": all_right},
    optimizer=lambda params: torch.optim.Adam(params, lr=0.005),
    overrides={
        "train.loss": "binary_cross_entropy_with_logits",  # of [B, 5]; its mean over the labels is a sample's
        "train.epochs": 8, "train.batch_size": 8, "train.tau": {"fast": 16, "slow": 2}, "run.dir": "multi_label",
    },
)
