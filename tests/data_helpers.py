"""What the tests of named datasets share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_hetero.data import Dataset, load

REAL = os.environ.get("HVD_HETERO_DATA")
real_data = pytest.mark.skipif(not REAL, reason="HVD_HETERO_DATA does not name a folder with real data")
RNG = np.random.default_rng(0)


def get(name: str, root: Path | str | None, workers: int = 0, **args: object) -> Dataset:
    """Load a named dataset."""
    return load(name, None if root is None else str(root), None, args, workers=workers, seed=0)


def everything(source: Any) -> tuple[Any, torch.Tensor]:
    """Inputs and targets of a source in memory."""
    return source.inputs, source.targets


def first_batch(source: Any, rows: list[int], seed: int = 0) -> tuple[Any, torch.Tensor]:
    """One batch."""
    return next(source.batches(np.array([rows]), torch.Generator().manual_seed(seed)))
