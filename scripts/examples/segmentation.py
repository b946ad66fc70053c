"""A class for each pixel. On every rank: horovodrun -np 2 python scripts/examples/segmentation.py"""

import torch
from torch import Tensor, nn

import hvd_hetero

VOID = 255


def discs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images [N, 1, 24, 24] of a disc, and the class of each pixel [N, 24, 24]; nobody has labelled the frame."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, 1, 1, generator=generator) * 12 + 6
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    inside = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 < 25).long()
    images = inside + torch.randn(count, 24, 24, generator=generator)
    inside[:, [0, -1]] = VOID
    return images[:, None], inside


hvd_hetero.train(
    model=nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2), nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    ),
    train_data=discs(400, 0),
    test_data=discs(100, 1),
    overrides={
        "train.loss_args": {"ignore_index": VOID}, "train.optimizer": "Adam", "train.lr": 0.01, "train.epochs": 2,
        "train.batch_size": 4, "train.tau": {"fast": 16, "slow": 2}, "run.dir": "segmentation",
    },
)
