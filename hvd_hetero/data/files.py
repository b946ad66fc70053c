"""Reading dataset files: finding them, and one clear error for each way in which they can be bad."""

from __future__ import annotations

import csv
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hvd_hetero.errors import ConfigError


def folder_with(root: Path, folders: Sequence[str], names: Iterable[str]) -> Path | None:
    """Return the first of ``root/folder`` that holds a file matching every pattern of ``names``."""
    patterns = list(names)
    for folder in (root / name for name in folders):
        if all(any(folder.glob(pattern)) for pattern in patterns):
            return folder
    return None


def missing(root: Path, what: str, can_download: bool = False) -> ConfigError:
    """Return the error for a folder that holds none of the layouts of a dataset."""
    problem = "holds no such dataset" if root.is_dir() else "is not a folder"
    remedy = f"put there {what}, or name another folder: data.root=FOLDER or HVD_HETERO_DATA=FOLDER"
    return ConfigError("data.root", str(root), problem, f"set data.download=true, {remedy}" if can_download else remedy)


def corrupt(path: Path, found: str, expected: str, remedy: str = "fetch the file again") -> ConfigError:
    """Return the error for a file that is not what it should be."""
    return ConfigError(str(path), found, f"truncated or corrupt: expected {expected}", remedy)


@contextmanager
def reading(path: Path, expected: str, remedy: str = "fetch the file again") -> Iterator[None]:
    """Turn the many errors of reading a broken or unreadable file into one.

    Raises:
        ConfigError: instead of what was raised inside.
    """
    try:
        yield
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError,
            AssertionError, zlib.error, zipfile.BadZipFile, lzma.LZMAError, csv.Error) as error:
        raise corrupt(path, f"{type(error).__name__}: {error}", expected, remedy) from error


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the named arrays of an ``.npz``, without pickle."""
    with reading(path, f"an npz file with {', '.join(names)}"), np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names}


def class_numbers(path: Path, labels: Any, count: int, classes: int) -> Tensor:
    """Check the labels of a file and return them as int64 ``[count]``.

    Raises:
        ConfigError: not ``count`` of them, or one outside ``0 .. classes - 1``.
    """
    with reading(path, f"{count} labels"):
        targets = np.asarray(labels).astype(np.int64)
    if targets.shape != (count,):
        raise corrupt(path, f"{targets.shape} labels", f"{count}, one for each sample")
    if count and not 0 <= targets.min() <= targets.max() < classes:
        raise corrupt(path, f"labels {targets.min()} to {targets.max()}", f"labels in 0 .. {classes - 1}")
    return torch.from_numpy(targets)


def check_images(path: Path, images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Check that an array is uint8 images ``[N, *shape]``."""
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        raise corrupt(path, f"{images.dtype} {images.shape}", f"uint8 images of shape {shape}")
    return images


def read_image(path: str, size: int) -> Tensor:
    """Read an image file as uint8 ``[3, size, size]``: shorter side scaled to ``size``, middle square.

    Raises:
        ConfigError: it cannot be decoded.
    """
    with reading(Path(path), "an image"):
        return decode_image(path, size)


def decode_image(file: Any, size: int) -> Tensor:
    """Decode an image file, open or by its name, as :func:`read_image` does."""
    with Image.open(file) as image:
        image.draft("RGB", (size, size))  # a large JPEG is decoded at half, a quarter, an eighth of its size
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def decode_all(files: Iterable[Any], decode: Callable[[Any], Tensor]) -> Tensor:
    """Decode image files into one tensor ``[N, 3, H, W]``."""
    with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock
        return torch.stack(list(pool.map(decode, files)))
