"""CIFAR-10 and CIFAR-100: colour images ``[N, 3, 32, 32]`` that sit in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from hvd_hetero.data.split import Split, Splits
from hvd_hetero.errors import ConfigError

Read = Callable[[Path], Split]


def cifar10(root: Path, parts: Sequence[str] | None = None, augment: bool = True) -> Splits:
    """CIFAR-10.

    Args:
        root: holds ``cifar-10-batches-py`` or ``-bin``, or the packed ``cifar10-*.npz``.
        parts: which packed files, e.g. ``[20k]``; all that are there if not given.
        augment: training images are cropped at random out of a frame of 4 zeros, and mirrored.
    """
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    statistics = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    layouts: list[tuple[str, list[str], Read]] = [
        ("cifar-10-batches-py", names, lambda path: _read_python(path, "labels", classes=10)),
        ("cifar-10-batches-bin", [f"{name}.bin" for name in names],
         lambda path: _read_binary(path, label_bytes=1, classes=10)),
    ]
    official = None if parts is not None else _read_official(root, layouts)
    if official is not None:
        return _splits(*official, statistics, augment)
    folder = folder_with(root, [".", "cifar10"], ["cifar10-*.npz"])
    if folder is None:
        raise missing(root, f"cifar-10-batches-py with {', '.join(names)}, or the packed cifar10-*.npz")
    return _splits(*_read_packed(folder, parts), statistics, augment)


def cifar100(root: Path, augment: bool = True) -> Splits:
    """CIFAR-100 with its 100 fine classes.

    Args:
        root: holds ``cifar-100-python`` or ``cifar-100-binary``.
        augment: as for :func:`cifar10`.
    """
    layouts: list[tuple[str, list[str], Read]] = [
        ("cifar-100-python", ["train", "test"], lambda path: _read_python(path, "fine_labels", classes=100)),
        ("cifar-100-binary", ["train.bin", "test.bin"],
         lambda path: _read_binary(path, label_bytes=2, classes=100)),  # a coarse label comes first
    ]
    official = _read_official(root, layouts)
    if official is None:
        raise missing(root, "cifar-100-python with train and test, or cifar-100-binary")
    return _splits(*official, Normalize((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), augment)


def _read_official(root: Path, layouts: Sequence[tuple[str, list[str], Read]]) -> tuple[Split, Split] | None:
    """Read the first layout that is there; the last of its files is the test split."""
    for folder_name, names, read in layouts:
        folder = folder_with(root, [folder_name, "."], names)
        # A folder may be called "train" too.
        if folder is not None and all((folder / name).is_file() for name in names):
            *train, test = (read(folder / name) for name in names)
            return _joined(train), test
    return None


def _read_python(path: Path, label_key: str, classes: int) -> Split:
    """Read a batch file as the authors publish it for Python: rows of 3072 bytes, channel by channel."""
    content = read_pickle(path)
    if "data" not in content or label_key not in content:
        raise corrupt(path, f"keys {sorted(content)}", f"keys data and {label_key}")
    rows = check_images(path, np.asarray(content["data"]), (3072,))
    targets = class_numbers(path, content[label_key], len(rows), classes)
    return Split(torch.from_numpy(rows.reshape(-1, 3, 32, 32)), targets)


def _read_binary(path: Path, label_bytes: int, classes: int) -> Split:
    """Read a batch file as the authors publish it for C: labels (the last counts) and 3072 pixels a row."""
    raw = np.frombuffer(bytearray(read_bytes(path, "a binary batch")), np.uint8)
    record = label_bytes + 3072
    if not len(raw) or len(raw) % record:
        raise corrupt(path, f"{len(raw)} bytes", f"a multiple of {record} bytes")
    rows = raw.reshape(-1, record)
    targets = class_numbers(path, rows[:, label_bytes - 1], len(rows), classes)
    return Split(torch.from_numpy(rows[:, label_bytes:].reshape(-1, 3, 32, 32)), targets)


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


def _splits(train: Split, test: Split, statistics: Normalize, augment: bool) -> Splits:
    augmented = RandomCropFlip(32, padding=4, then=statistics)
    return Splits(train, test, augmented if augment else statistics, statistics)
