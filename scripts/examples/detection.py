"""Batches of lists of unequal size. On every rank: horovodrun -np 2 python scripts/examples/detection.py"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import hvd_hetero
from hvd_hetero.data import MapSource


class Boxes(Dataset[Any]):
    """Images of one to three bright boxes, and these as tensors [K, 4], from 0 to 1."""

    def __len__(self) -> int:
        return 320

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        corners = torch.randint(0, 10, (1 + index % 3, 2), generator=generator)
        image = torch.zeros(1, 16, 16)
        for row, column in corners.tolist():
            image[0, row : row + 6, column : column + 6] = 1
        return image, torch.cat([corners, corners + 6], 1) / 16


def nearest(outputs: Tensor, boxes: list[Tensor]) -> Tensor:
    """Each predicted box's way to the nearest true one, the mean of an image's: one number a sample."""
    pairs = zip(outputs, boxes, strict=True)
    return torch.stack([torch.cdist(own.view(3, 4), true, p=1).amin(1).mean() for own, true in pairs])


boxes = MapSource(Boxes(), collate=lambda items: (torch.stack([image for image, _ in items]), [b for _, b in items]))
hvd_hetero.train(
    model=nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 12)),
    train_data=boxes, test_data=boxes, loss=nearest, metrics={"distance": nearest},
    optimizer=lambda params: torch.optim.Adam(params, lr=0.003),
    overrides={"train.epochs": 4, "train.tau": {"fast": 16, "slow": 2}, "run.dir": "detection"},
)
