"""Data: named datasets and the user's own, cut into batches by index.

``load`` reads a registered dataset by name or calls the user's function. A new dataset is one reader with
typed keyword arguments and one line in ``DATASETS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hvd_hetero.config.instantiate import call, check_arguments, choose, import_target
from hvd_hetero.data import images, photos, text
from hvd_hetero.data.batch import Batch
from hvd_hetero.data.collate import collate as default_collate
from hvd_hetero.data.own import as_source
from hvd_hetero.data.source import MapSource, Source, TensorSource, Transform, read
from hvd_hetero.data.split import Decode, Files, Split, Splits, adapt
from hvd_hetero.errors import ConfigError

__all__ = [
    "DATASETS", "Batch", "Dataset", "Files", "MapSource", "Source", "TensorSource", "as_source", "load", "read",
    "targets_of",
]  # fmt: skip

DATASETS: Mapping[str, Callable[..., Splits]] = {
    "digits": images.digits,
    "mnist": images.mnist,
    "fashion_mnist": images.fashion_mnist,
    "cifar10": images.cifar10,
    "cifar100": images.cifar100,
    "flowers102": photos.flowers102,
    "tiny_imagenet": photos.tiny_imagenet,
    "image_folder": photos.image_folder,
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
         seed: int = 0, download: bool = False) -> Dataset:
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
        download: fetch the published files where they are missing, once for all ranks that have the same folder.

    Raises:
        ConfigError: unknown name or argument, missing or corrupt files, sizes that do not agree.
    """
    if target:
        if download:
            raise ConfigError("data.download", True, "is for named datasets", "have data.target download its own")
        return _load_target(target, args, workers)
    reader = choose("data.name", name, DATASETS)
    if root is None and name not in WITHOUT_FILES:
        problem = f"'{name}' is read from files"
        raise ConfigError("data.root", root, problem, "set it to the folder that holds them")
    options: dict[str, Any] = {"root": Path(root).expanduser() if root is not None else None}
    if "download" in signature(reader).parameters:
        options["download"] = download
    elif download:
        remedy = "set data.download=false, and put the files into data.root"
        raise ConfigError("data.download", True, f"torchvision downloads no '{name}'", remedy)
    common = {key: value for key, value in args.items() if key in COMMON_ARGUMENTS}
    rest = {key: value for key, value in args.items() if key not in COMMON_ARGUMENTS}
    for key in options.keys() & rest.keys():
        raise ConfigError(f"data.args.{key}", rest[key], "is not an argument", f"set data.{key}")
    check_arguments("data.args", reader, options | rest, also=COMMON_ARGUMENTS)
    check_arguments("data.args", adapt, {"splits": None, "seed": seed} | common)
    splits = adapt(reader(**options, **rest), seed, **common)
    return Dataset(_named_source(splits.train, splits.train_transform, splits.decode, workers),
                   _named_source(splits.test, splits.test_transform, splits.decode, workers))


def targets_of(source: Source) -> Tensor | None:
    """Return all targets of a source, where they are in memory and batches have them as they are."""
    holder: Any = source.dataset if isinstance(source, MapSource) and source.collate is default_collate else source
    has_them = type(holder) in (TensorSource, Files) and isinstance(holder.targets, Tensor)
    return holder.targets if has_them else None


def _load_target(target: str, args: Mapping[str, Any], workers: int) -> Dataset:
    result = call("data.args", import_target("data.target", target), args)
    if isinstance(result, Dataset):
        result = result.train, result.test
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        problem = f"returned {type(result).__name__}, not two splits"
        raise ConfigError("data.target", target, problem, "return (train, test)")
    names = ("data.target training split", "data.target test split")
    return Dataset(*(as_source(name, split, workers) for name, split in zip(names, result, strict=True)))


def _named_source(split: Split, transform: Transform | None, decode: Decode | None, workers: int) -> Source:
    if isinstance(split.inputs, np.ndarray):
        assert decode is not None, "a reader that gives file names gives their decoder too"
        return MapSource(Files(split.inputs, split.targets, decode), workers, transform=transform)
    return TensorSource(split.inputs, split.targets, transform)
