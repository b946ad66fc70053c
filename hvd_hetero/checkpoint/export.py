"""Saving a model so that other programs can load it: ``torch.load(path, weights_only=True)`` gives its state dict."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvd_hetero.checkpoint.durable_files import if_it_can

FOLDER = "checkpoint"
MODEL, AVERAGED = "model.pt", "averaged.pt"


def _is_plain(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` will read it."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) in (dict, OrderedDict):
        return all(_is_plain(part) for item in value.items() for part in item)
    return value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str, bytes)


def save_model(run_dir: Path, model: nn.Module, name: str = MODEL) -> Path:
    """Writes the model's weights under ``checkpoint/``; after a crash the old file is there or the new one, whole."""
    folder = run_dir / FOLDER
    part, path = folder / f".{name}.part", folder / name
    weights = {}
    for key, value in model.state_dict().items():
        # clone: a view into the flat vector would take the whole vector's storage along, once for each tensor
        value = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        if _is_plain(value):
            weights[key] = value
        else:  # what a module returns from get_extra_state
            problem = f"a {type(value).__name__}, which only pickle could save"
            warnings.warn(f"{path}: {key} is not in it: {problem}", RuntimeWarning, stacklevel=2)
    folder.mkdir(exist_ok=True)
    try:
        with part.open("wb") as file:
            torch.save(weights, file)
            file.flush()
            with if_it_can():
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # a full disk is not to be kept full, nor an empty folder left
            part.unlink(missing_ok=True)
            folder.rmdir()
        raise
    return path
