"""Small images that sit in memory: digits, Fashion-MNIST and CIFAR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hvd_hetero.data.augment import Normalize, RandomCropFlip
from hvd_hetero.data.files import (
    check_images,
    class_numbers,
    corrupt,
    folder_with,
    missing,
    read_bytes,
    read_npz,
    read_pickle,
)
from hvd_hetero.data.split import Split, Splits, stratified
from hvd_hetero.errors import ConfigError

CIFAR10_STATISTICS = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def digits(root: Path | None) -> Splits:
    """scikit-learn's handwritten digits: 1797 images ``[N, 1, 8, 8]``, floats 0..1, 80 % for training.

    The split is stratified and always the same; ``root`` is not needed.
    """
    from sklearn.datasets import load_digits  # takes a second to import: only those who use it wait

    bunch = load_digits()
    inputs = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
    targets = torch.from_numpy(bunch.target).long()
    everything = Split(inputs, targets)
    train, test = stratified(bunch.target, 0.2, np.random.default_rng(0))
    return Splits(everything.take(train), everything.take(test))


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


def cifar10(root: Path, parts: Sequence[str] | None = None, augment: bool = True) -> Splits:
    """CIFAR-10, colour images ``[N, 3, 32, 32]``.

    Args:
        root: holds ``cifar-10-batches-py`` or ``-bin``, or the packed ``cifar10-*.npz``.
        parts: which packed files, e.g. ``[20k]``; all that are there if not given.
        augment: training images are cropped at random out of a frame of 4 zeros, and mirrored.
    """
    train_batches = [f"data_batch_{i}" for i in range(1, 6)]
    layouts = [
        ("cifar-10-batches-py", "", _read_python_batch),
        ("cifar-10-batches-bin", ".bin", _read_binary_batch),
    ]
    for folder_name, ending, read in layouts if parts is None else ():
        names = [f"{name}{ending}" for name in (*train_batches, "test_batch")]
        folder = folder_with(root, [folder_name, "."], names)
        if folder:
            *train, test = (read(folder / name, "labels", 0, 10) for name in names)
            return _augmented(_joined(train), test, augment)
    folder = folder_with(root, [".", "cifar10"], ["cifar10-*.npz"])
    if folder is None:
        names_there = f"{', '.join(train_batches)} and test_batch"
        raise missing(root, f"cifar-10-batches-py with {names_there}, or the packed cifar10-*.npz")
    return _augmented(*_read_packed(folder, parts), augment)


def _read_python_batch(path: Path, label_key: str, label_byte: int, classes: int) -> Split:
    """Read a batch file as the authors publish it for Python: rows of 3072 bytes, channel by channel."""
    content = read_pickle(path)
    if "data" not in content or label_key not in content:
        raise corrupt(path, f"keys {sorted(content)}", f"keys data and {label_key}")
    rows = check_images(path, np.asarray(content["data"]), (3072,))
    targets = class_numbers(path, content[label_key], len(rows), classes)
    return Split(torch.from_numpy(rows.reshape(-1, 3, 32, 32)), targets)


def _read_binary_batch(path: Path, label_key: str, label_byte: int, classes: int) -> Split:
    """Read a batch file as the authors publish it for C: label bytes, then 3072 pixels, again and again."""
    raw = np.frombuffer(bytearray(read_bytes(path, "a binary batch")), np.uint8)
    record = label_byte + 1 + 3072
    if not len(raw) or len(raw) % record:
        raise corrupt(path, f"{len(raw)} bytes", f"a multiple of {record} bytes")
    rows = raw.reshape(-1, record)
    targets = class_numbers(path, rows[:, label_byte], len(rows), classes)
    return Split(torch.from_numpy(rows[:, label_byte + 1:].reshape(-1, 3, 32, 32)), targets)


def _read_packed(folder: Path, parts: Sequence[str] | None) -> tuple[Split, Split]:
    there = {path.stem.removeprefix("cifar10-"): path for path in sorted(folder.glob("cifar10-*.npz"))}
    chosen = list(there) if parts is None else list(parts)
    unknown = [part for part in chosen if part not in there]
    if unknown or not chosen:
        problem = f"no file cifar10-{unknown[0]}.npz in {folder}" if unknown else "no part named"
        raise ConfigError("data.args.parts", parts, problem, f"choose from {', '.join(there)}")
    trains: list[Split] = []
    tests: list[Split] = []
    for part in chosen:
        arrays = read_npz(there[part], ["x_train_coded", "y_train", "x_test_coded", "y_test"])
        for name, splits in (("train", trains), ("test", tests)):
            coded = check_images(there[part], arrays[f"x_{name}_coded"], (3, 32, 32))
            targets = class_numbers(there[part], arrays[f"y_{name}"], len(coded), classes=10)
            splits.append(Split(torch.from_numpy(_decode(coded)), targets))
    return _joined(trains), _joined(tests)


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


def _joined(splits: Sequence[Split]) -> Split:
    inputs: list[Tensor] = [split.inputs for split in splits if isinstance(split.inputs, Tensor)]
    return Split(torch.cat(inputs), torch.cat([split.targets for split in splits]))


def _augmented(train: Split, test: Split, augment: bool) -> Splits:
    plain = CIFAR10_STATISTICS
    return Splits(train, test, RandomCropFlip(32, padding=4, then=plain) if augment else plain, plain)
