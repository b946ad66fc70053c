"""Small grey images that sit in memory: digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_hetero.data.augment import Normalize
from hvd_hetero.data.files import check_images, class_numbers, corrupt, folder_with, missing, read_bytes
from hvd_hetero.data.split import Split, Splits, stratified


def digits(root: Path | None) -> Splits:
    """scikit-learn's handwritten digits: 1797 images ``[N, 1, 8, 8]``, floats 0..1, 80 % for training.

    The split is stratified and always the same; ``root`` is not needed.
    """
    pixels, numbers = _digits()
    inputs = torch.from_numpy(pixels).float().div_(16).view(-1, 1, 8, 8)
    everything = Split(inputs, torch.from_numpy(numbers).long())
    train, test = stratified(numbers, 0.2, np.random.default_rng(0))
    return Splits(everything.take(train), everything.take(test))


def _digits() -> tuple[NDArray[Any], NDArray[Any]]:
    """Pixels ``[N, 64]``, 0 to 16, and numbers ``[N]``.

    They are a file in scikit-learn, whose import takes longer than all the rest of a small job's start.
    """
    found = find_spec("sklearn")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.exists():
            with gzip.open(path, "rt") as file:
                rows = np.loadtxt(file, delimiter=",", dtype=np.int64)
            return rows[:, :-1], rows[:, -1]
    from sklearn.datasets import load_digits  # where a version of it keeps them elsewhere

    pixels, numbers = load_digits(return_X_y=True)
    return pixels, numbers


def fashion_mnist(root: Path) -> Splits:
    """Fashion-MNIST, grey images ``[N, 1, 28, 28]``, from its four idx files, packed or not."""
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    names = [f"{split}-{kind}*" for split in ("train", "t10k") for kind in kinds]
    folders = ["FashionMNIST/raw", "raw", "fashion-mnist", "."]
    folder = folder_with(root, folders, names)
    if folder is None:
        wanted = ", ".join(name.replace("*", "(.gz)") for name in names)
        raise missing(root, f"FashionMNIST/raw (or fashion-mnist) with {wanted}")

    def split(name: str) -> Split:
        images_path, labels_path = (sorted(folder.glob(f"{name}-{kind}*"))[0] for kind in kinds)
        images = read_idx(images_path, dimensions=3)
        labels = read_idx(labels_path, dimensions=1)
        pixels = torch.from_numpy(check_images(images_path, images, (28, 28))).unsqueeze(1)
        return Split(pixels, class_numbers(labels_path, labels, len(images), classes=10))

    normalize = Normalize((0.2860,), (0.3530,))
    return Splits(split("train"), split("t10k"), normalize, normalize)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an idx file of unsigned bytes: magic number, one big-endian size per dimension, data.

    Raises:
        ConfigError: another magic number, or a length that its own header contradicts.
    """
    raw = read_bytes(path, "an idx file")
    head = 4 * (1 + dimensions)
    if len(raw) < head:
        raise corrupt(path, f"{len(raw)} bytes", f"an idx header of {head} bytes")
    magic, *shape = np.frombuffer(raw, ">i4", count=1 + dimensions).tolist()
    if magic != 0x0800 + dimensions:
        raise corrupt(path, f"magic number {magic:#06x}", f"{0x0800 + dimensions:#06x}")
    size = head + int(np.prod(shape, dtype=np.int64))
    if len(raw) != size:
        raise corrupt(path, f"{len(raw)} bytes", f"{size} bytes for {tuple(shape)}, as its header says")
    return np.frombuffer(bytearray(raw), np.uint8, offset=head).reshape(shape)
