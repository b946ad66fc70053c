"""Data: named datasets and the user's own, cut into batches by index.

``load`` reads a registered dataset by name or calls the user's function. A new dataset is one reader with
typed keyword arguments and one line in ``DATASETS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from hvd_hetero.data import cifar, images, photos, text
from hvd_hetero.data.source import Batch, MapSource, Source, TensorSource, Transform
from hvd_hetero.data.split import Decode, Files, Split, Splits, adapt
from hvd_hetero.errors import ConfigError
from hvd_hetero.imports import call, check_arguments, choose, import_target

__all__ = ["DATASETS", "Batch", "Dataset", "Files", "MapSource", "Source", "TensorSource", "as_source", "load"]

DATASETS: Mapping[str, Callable[..., Splits]] = {
    "digits": images.digits,
    "fashion_mnist": images.fashion_mnist,
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "flowers102": photos.flowers102,
    "tiny_imagenet": photos.tiny_imagenet,
    "ag_news": text.ag_news,
}
WITHOUT_FILES = ("digits",)
COMMON_ARGUMENTS = ("validation", "label_noise", "train_limit", "test_limit")


@dataclass(frozen=True)
class Dataset:
    """The two splits that a run needs."""

    train: Source
    test: Source


def load(name: str | None, root: str | None, target: str | None, args: Mapping[str, Any], *, workers: int = 0,
         seed: int = 0) -> Dataset:
    """Load a dataset.

    Args:
        name: a key of ``DATASETS``; not looked at when ``target`` is given.
        root: folder with the files of a named dataset, or the folder above it.
        target: import path ``package.module:function`` of the user's own function, which returns
            (train, test), each a map-style dataset or a pair of tensors (inputs, targets).
        args: keyword arguments of the reader or of the user's function. All named datasets also take those of
            :func:`hvd_hetero.data.split.adapt`.
        workers: worker processes of data that is streamed.
        seed: of the validation split and of label noise; the same on every rank.

    Raises:
        ConfigError: unknown name or argument, missing or corrupt files, sizes that do not agree.
    """
    if target:
        return _load_target(target, args, workers)
    reader = choose("data.name", name, DATASETS)
    if root is None and name not in WITHOUT_FILES:
        problem = f"'{name}' is read from files"
        raise ConfigError("data.root", root, problem, "set it to the folder that holds them")
    own = {"root": Path(root).expanduser() if root is not None else None}
    common = {key: value for key, value in args.items() if key in COMMON_ARGUMENTS}
    rest = {key: value for key, value in args.items() if key not in COMMON_ARGUMENTS}
    if "root" in rest:
        raise ConfigError("data.args.root", rest["root"], "is not an argument", "set data.root")
    check_arguments("data.args", reader, own | rest, also=COMMON_ARGUMENTS)
    check_arguments("data.args", adapt, {"splits": None, "seed": seed} | common)
    splits = adapt(reader(**own, **rest), seed, **common)
    return Dataset(_named_source(splits.train, splits.train_transform, splits.decode, workers),
                   _named_source(splits.test, splits.test_transform, splits.decode, workers))


def as_source(key: str, data: Any, workers: int = 0) -> Source:
    """Wrap a user's split: tensors (or arrays) (inputs, targets), a map-style dataset, or a source already.

    Raises:
        ConfigError: it is none of these.
    """
    if hasattr(data, "batches"):
        return data
    if isinstance(data, TensorDataset):
        *inputs, targets = data.tensors
        return TensorSource(inputs[0] if len(inputs) == 1 else tuple(inputs), targets)
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], (Tensor, np.ndarray)):
        return TensorSource(_tensors(data[0]), torch.as_tensor(data[1]))
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return MapSource(data, workers)
    remedy = "give a map-style dataset or tensors (inputs, targets)"
    raise ConfigError(key, type(data).__name__, "not a split", remedy)


def _tensors(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: torch.as_tensor(part) for name, part in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(torch.as_tensor(part) for part in inputs)
    return torch.as_tensor(inputs)


def _load_target(target: str, args: Mapping[str, Any], workers: int) -> Dataset:
    result = call("data.args", import_target("data.target", target), args)
    if isinstance(result, Dataset):
        return result
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        problem = f"returned {type(result).__name__}, not two splits"
        raise ConfigError("data.target", target, problem, "return (train, test)")
    train, test = (as_source("data.target", split, workers) for split in result)
    return Dataset(train, test)


def _named_source(split: Split, transform: Transform | None, decode: Decode | None, workers: int) -> Source:
    if isinstance(split.inputs, np.ndarray):
        assert decode is not None, "a reader that gives file names gives their decoder too"
        return MapSource(Files(split.inputs, split.targets, decode), workers, transform=transform)
    return TensorSource(split.inputs, split.targets, transform)
