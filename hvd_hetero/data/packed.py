"""Packed datasets: one small file each, for tests and for hosts without the published files.

- ``cifar10-*.npz``: uint8 ``x_train_coded``, ``x_test_coded`` ``[N, 3, 32, 32]``, see :func:`_decode`; ``y_train``,
  ``y_test``
- ``flowers102-64.npz``: JPEG files of 64 pixels end to end in ``jpeg``, cut at ``offsets``; ``y``; ``split``
- ``tiny-imagenet-*.npz``: likewise ``jpeg_train``, ``offsets_train``, ``y_train``, the same for ``val``, and ``wnids``
- ``fashion-mnist/*.gz``: the four idx files as published

Each function returns the training and the test split, or None if ``root`` holds no such file.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hvd_hetero.data.files import (
    check_images,
    class_numbers,
    corrupt,
    decode_all,
    decode_image,
    folder_with,
    read_npz,
    reading,
)
from hvd_hetero.data.split import Split, joined
from hvd_hetero.errors import ConfigError

Pair = tuple[Split, Split]


def fashion_mnist(root: Path) -> Pair | None:
    """Read the packed idx files of Fashion-MNIST."""
    kinds = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
    names = [[f"{split}-{kind}" for kind in kinds] for split in ("train", "t10k")]
    folder = folder_with(root, ["fashion-mnist", "FashionMNIST/raw", "."], sum(names, []))
    if folder is None:
        return None

    def split(images: str, labels: str) -> Split:
        pixels = _read_idx(folder / images, (28, 28))
        targets = class_numbers(folder / labels, _read_idx(folder / labels, ()), len(pixels), classes=10)
        return Split(torch.from_numpy(pixels).unsqueeze(1), targets)

    return split(*names[0]), split(*names[1])


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read samples of unsigned bytes: magic number, number of samples, their shape, data."""
    with reading(path, f"an idx file of samples of shape {shape}"):
        raw = bytearray(gzip.decompress(path.read_bytes()))
        magic, count, *sizes = np.frombuffer(raw, ">i4", count=2 + len(shape)).tolist()
        if (magic, tuple(sizes)) != (0x0801 + len(shape), shape):
            raise ValueError(f"magic number {magic:#06x}, shape {tuple(sizes)}")
        return np.frombuffer(raw, np.uint8, offset=4 * (2 + len(shape))).reshape(count, *shape)


def cifar10(root: Path, parts: Sequence[str] | None) -> Pair | None:
    """Read the packed files of CIFAR-10 that ``parts`` names (``[20k]``), or all of them."""
    folder = folder_with(root, [".", "cifar10"], ["cifar10-*.npz"])
    if folder is None:
        return None
    there = {path.stem.removeprefix("cifar10-"): path for path in sorted(folder.glob("cifar10-*.npz"))}
    chosen = list(there) if parts is None else list(parts)
    unknown = [part for part in chosen if part not in there]
    if unknown or not chosen:
        problem = f"no file cifar10-{unknown[0]}.npz in {folder}" if unknown else "no part named"
        raise ConfigError("data.args.parts", parts, problem, f"choose from {', '.join(there)}")
    splits: dict[str, list[Split]] = {"train": [], "test": []}
    for path in map(there.__getitem__, chosen):
        arrays = read_npz(path, ["x_train_coded", "y_train", "x_test_coded", "y_test"])
        for name, found in splits.items():
            coded = check_images(path, arrays[f"x_{name}_coded"], (3, 32, 32))
            targets = class_numbers(path, arrays[f"y_{name}"], len(coded), classes=10)
            found.append(Split(torch.from_numpy(_decode(coded)), targets))
    return joined(splits["train"]), joined(splits["test"])


def _decode(coded: np.ndarray) -> np.ndarray:
    """Undo the differences between neighbours and channels that the packed files hold, modulo 256.

    Args:
        coded: uint8 ``[N, 3, H, W]``; red and blue relative to green.
    """
    pixels = np.cumsum(coded, axis=2, dtype=np.uint8)
    np.cumsum(pixels, axis=3, dtype=np.uint8, out=pixels)
    pixels[:, 0] += pixels[:, 1]
    pixels[:, 2] += pixels[:, 1]
    return pixels


def flowers102(root: Path, train: Sequence[int], test: int) -> Pair | None:
    """Read the packed Oxford Flowers; splits are 0 train, 1 val, 2 test."""
    folder = folder_with(root, [".", "flowers102"], ["flowers102-64.npz"])
    if folder is None:
        return None
    path = folder / "flowers102-64.npz"
    arrays = read_npz(path, ["jpeg", "offsets", "y", "split"])
    images = _images(path, arrays["jpeg"], arrays["offsets"])
    everything = Split(images, class_numbers(path, arrays["y"], len(images), classes=102))
    split = class_numbers(path, arrays["split"], len(images), classes=3).numpy()
    return everything.select(np.flatnonzero(np.isin(split, train))), everything.select(np.flatnonzero(split == test))


def tiny_imagenet(root: Path) -> Pair | None:
    """Read a packed part of Tiny ImageNet."""
    folder = folder_with(root, [".", "tiny-imagenet"], ["tiny-imagenet-*.npz"])
    if folder is None:
        return None
    path = min(folder.glob("tiny-imagenet-*.npz"))
    kinds = ("jpeg", "offsets", "y")
    arrays = read_npz(path, [*(f"{kind}_{split}" for split in ("train", "val") for kind in kinds), "wnids"])

    def split(name: str) -> Split:
        images = _images(path, arrays[f"jpeg_{name}"], arrays[f"offsets_{name}"])
        return Split(images, class_numbers(path, arrays[f"y_{name}"], len(images), len(arrays["wnids"])))

    return split("train"), split("val")


def _images(path: Path, blob: np.ndarray, offsets: np.ndarray) -> Tensor:
    """Decode JPEG files of 64 pixels that lie end to end."""
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(blob) or (np.diff(offsets) <= 0).any():
        raise corrupt(path, f"offsets that end at {offsets[-1:]}", f"rising ones from 0 to {len(blob)}")
    files = [io.BytesIO(blob[a:b].tobytes()) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    with reading(path, "JPEG images"):
        return decode_all(files, lambda file: decode_image(file, 64))
