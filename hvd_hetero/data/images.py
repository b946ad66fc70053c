"""Small images that sit in memory: digits, MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_hetero.data import packed
from hvd_hetero.data.augment import Normalize, RandomCropFlip
from hvd_hetero.data.files import class_numbers, missing
from hvd_hetero.data.published import read_published
from hvd_hetero.data.split import Split, Splits, stratified


def digits(root: Path | None) -> Splits:
    """scikit-learn's handwritten digits: 1797 images ``[N, 1, 8, 8]``, floats 0..1, 80 % for training.

    The split is stratified and always the same; ``root`` is not needed.
    """
    pixels, numbers = _digits()
    inputs = torch.from_numpy(pixels).float().div_(16).view(-1, 1, 8, 8)
    everything = Split(inputs, torch.from_numpy(numbers).long())
    train, test = stratified(numbers, 0.2, np.random.default_rng(0))
    return Splits(everything.select(train), everything.select(test))


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


def mnist(root: Path, download: bool = False) -> Splits:
    """MNIST, grey images ``[N, 1, 28, 28]``; ``root`` holds ``MNIST/raw`` with the four idx files."""
    found = _in_memory("MNIST", "MNIST/raw", root, download)
    return _splits(found, root, "MNIST/raw with the four idx files", Normalize((0.1307,), (0.3081,)))


def fashion_mnist(root: Path, download: bool = False) -> Splits:
    """Fashion-MNIST, likewise; ``root`` holds ``FashionMNIST/raw``, or ``fashion-mnist`` with the packed files."""
    found = _in_memory("FashionMNIST", "FashionMNIST/raw", root, download) or packed.fashion_mnist(root)
    what = "FashionMNIST/raw with the four idx files, or fashion-mnist with them as *.gz"
    return _splits(found, root, what, Normalize((0.2860,), (0.3530,)))


def cifar10(root: Path, download: bool = False, parts: Sequence[str] | None = None, augment: bool = True) -> Splits:
    """CIFAR-10, colour images ``[N, 3, 32, 32]``.

    Args:
        root: holds ``cifar-10-batches-py``, or the packed ``cifar10-*.npz``.
        download: fetch the published files where they are missing.
        parts: which packed files, e.g. ``[20k]``; the published ones, or all packed ones, if not given.
        augment: training images are cropped at random out of a frame of 4 zeros, and mirrored.
    """
    published = _in_memory("CIFAR10", "cifar-10-batches-py", root, download) if parts is None else None
    what = "cifar-10-batches-py, or the packed cifar10-*.npz"
    statistics = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return _splits(published or packed.cifar10(root, parts), root, what, statistics, augment)


def cifar100(root: Path, download: bool = False, augment: bool = True) -> Splits:
    """CIFAR-100 with its 100 fine classes; ``root`` holds ``cifar-100-python``, see :func:`cifar10`."""
    found = _in_memory("CIFAR100", "cifar-100-python", root, download)
    statistics = Normalize((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    return _splits(found, root, "cifar-100-python", statistics, augment)


def _splits(found: packed.Pair | None, root: Path, what: str, statistics: Normalize, augment: bool = False) -> Splits:
    if found is None:
        raise missing(root, what, can_download=True)
    return Splits(*found, RandomCropFlip(32, padding=4, then=statistics) if augment else statistics, statistics)


def _in_memory(name: str, folder: str, root: Path, download: bool) -> packed.Pair | None:
    """Read both splits of a published dataset that torchvision holds in memory."""
    found = read_published(name, folder, root, download, {"train": True}, {"train": False})
    if found is None:
        return None
    train, test = (_split(data, root / folder) for data in found)
    return train, test


def _split(data: Any, path: Path) -> Split:
    pixels = torch.as_tensor(data.data)  # [N, H, W] or [N, H, W, 3]
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return Split(pixels, class_numbers(path, data.targets, len(pixels), len(data.classes)))
