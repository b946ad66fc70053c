"""Saving a model so that other programs can load it: ``torch.load(path, weights_only=True)`` gives its state dict."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

FOLDER = "checkpoint"
MODEL = "model.pt"


def save_model(run_dir: Path, model: nn.Module) -> Path:
    """Writes the model's weights under ``checkpoint/``; after a crash the old file is there or the new one, whole."""
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    part, path = folder / f".{MODEL}.part", folder / MODEL
    # clone: a view into the flat vector would take the whole vector's storage along, once for each tensor
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    with part.open("wb") as file:
        torch.save(weights, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return path
