"""Your own model and data, named in own_target.yaml. From this folder: hvd-hetero launch own_target.yaml"""

import torch
from sklearn.datasets import load_wine
from torch import Tensor, nn


def model(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(13, width), nn.Tanh(), nn.Linear(width, 3))


def data(train: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    x, y = load_wine(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor((x - x.mean(0)) / x.std(0)).float()[order], torch.tensor(y)[order]
    return (x[:train], y[:train]), (x[train:], y[train:])
