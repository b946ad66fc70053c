"""Pretrained weights from local files, read without running any code that they might hold."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvd_hetero.errors import ConfigError

KEY = "model.args.weights"
REMEDY = "give a state dict, saved with torch.save or as safetensors"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of named tensors: ``.safetensors``, or what ``torch.save`` wrote.

    Raises:
        ConfigError: no such file, not such a file, or the package safetensors is missing.
    """
    if not path.is_file():
        raise ConfigError(KEY, str(path), "no such file", "give the path of a file with weights")
    try:
        state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except ConfigError:
        raise
    except Exception as error:  # torch, pickle, zipfile and safetensors each have their own
        problem = f"cannot be read: {type(error).__name__}: {str(error).splitlines()[:1]}"
        raise ConfigError(KEY, str(path), problem, REMEDY) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(KEY, str(path), "is not a dict of tensors", REMEDY)
    return dict(state)


def _read_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Any:
    if find_spec("safetensors") is None:
        raise ConfigError(KEY, str(path), "needs the package safetensors", "pip install 'hvd-hetero[nlp]'")
    return importlib.import_module("safetensors.torch").load_file(path)


def load_weights(model: nn.Module, path: Path, head: Sequence[str], ignored: Sequence[str] = ()) -> None:
    """Fill a model with the weights of a file; a head of another size keeps its fresh ones.

    Args:
        model: filled in place.
        path: see :func:`read_weights`.
        head: beginnings of the names that belong to the classifier, which may be absent from the file or have
            another shape there.
        ignored: beginnings of further names in the file that the model has no use for.

    Raises:
        ConfigError: the first tensor that is missing, unknown or of another shape.
    """
    saved, wanted = read_weights(path), model.state_dict()
    head, ignored = tuple(head), tuple(ignored)
    for name, tensor in wanted.items():
        found = saved.get(name)
        if found is None or found.shape != tensor.shape:
            saved.pop(name, None)
            if name.startswith(head):
                continue
            what = "is not in the file" if found is None else f"has shape {tuple(found.shape)} in the file"
            problem = f"'{name}' {what}, the model's has {tuple(tensor.shape)}"
            raise ConfigError(KEY, str(path), problem, "use the weights of this very architecture")
    unknown = [name for name in saved if name not in wanted and not name.startswith(head + ignored)]
    if unknown:
        problem = f"'{unknown[0]}' is in the file but not in the model"
        raise ConfigError(KEY, str(path), problem, "use the weights of this very architecture")
    model.load_state_dict({name: saved[name] for name in wanted if name in saved}, strict=False)
