"""Saving a model so that other programs can load it: ``torch.load(path, weights_only=True)`` gives its state dict."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hvd_hetero.checkpoint.durable_files import if_it_can
from hvd_hetero.errors import ConfigError

FOLDER = "checkpoint"
MODEL, AVERAGED = "model.pt", "averaged.pt"
SAFETENSORS = ".safetensors"


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
    path = folder / name
    weights = weights_of(model, str(path))
    folder.mkdir(exist_ok=True)
    try:
        write_weights(path, weights)
    except BaseException:
        with suppress(OSError):  # nor is an empty folder to be left
            folder.rmdir()
        raise
    return path


def weights_of(model: nn.Module, place: str) -> dict[str, Any]:
    """Return a model's state dict on the host, without what only pickle could save; that is warned of.

    Args:
        place: where it goes, for the warning.
    """
    weights = {}
    for key, value in model.state_dict().items():
        # clone: a view into the flat vector would take the whole vector's storage along, once for each tensor
        value = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        if _is_plain(value):
            weights[key] = value
        else:  # what a module returns from get_extra_state
            problem = f"a {type(value).__name__}, which only pickle could save"
            warnings.warn(f"{place}: {key} is not in it: {problem}", RuntimeWarning, stacklevel=3)
    return weights


def write_weights(path: Path, weights: Mapping[str, Any]) -> None:
    """Write a state dict whole: as safetensors if the file is named so, else as ``torch.save`` does.

    Raises:
        OSError: the disk does not take it.
        ConfigError: safetensors has tensors only.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            if path.suffix == SAFETENSORS:
                file.write(_as_safetensors(path, weights))
            else:
                torch.save(dict(weights), file)
            file.flush()
            with if_it_can():
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # a full disk is not to be kept full
            part.unlink(missing_ok=True)
        raise


def _as_safetensors(path: Path, weights: Mapping[str, Any]) -> bytes:
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            problem = f"{key} is a {type(value).__name__}, and safetensors holds tensors only"
            raise ConfigError("--to", str(path), problem, "choose a file that ends in .pt")
    return safetensors.torch.save({key: value.contiguous() for key, value in weights.items()})
