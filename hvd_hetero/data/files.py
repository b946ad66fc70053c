"""Reading dataset files: finding them, and one clear error for each way in which they can be bad."""

from __future__ import annotations

import csv
import gzip
import lzma
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_hetero.errors import ConfigError


def folder_with(root: Path, folders: Sequence[str], names: Iterable[str]) -> Path | None:
    """Return the first of ``root/folder`` that holds a file matching every pattern of ``names``."""
    patterns = list(names)
    for folder in (root / name for name in folders):
        if all(any(folder.glob(pattern)) for pattern in patterns):
            return folder
    return None


def missing(root: Path, what: str) -> ConfigError:
    """Return the error for a folder that holds none of the layouts of a dataset."""
    problem = "holds no such dataset" if root.is_dir() else "is not a folder"
    remedy = f"put there {what}, or name another folder: data.root=FOLDER or HVD_HETERO_DATA=FOLDER"
    return ConfigError("data.root", str(root), problem, remedy)


def corrupt(path: Path, found: str, expected: str) -> ConfigError:
    """Return the error for a file that is not what it should be."""
    return ConfigError(str(path), found, f"truncated or corrupt: expected {expected}", "fetch the file again")


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn the many errors of reading a broken or unreadable file into one.

    Raises:
        ConfigError: instead of what was raised inside.
    """
    try:
        yield
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, zlib.error,
            zipfile.BadZipFile, lzma.LZMAError, csv.Error, pickle.UnpicklingError) as error:
        raise corrupt(path, f"{type(error).__name__}: {error}", expected) from error


def read_bytes(path: Path, expected: str) -> bytes:
    """Read a whole file, unpacked if its name ends in ``.gz``."""
    with reading(path, expected):
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the named arrays of an ``.npz``, without pickle."""
    with reading(path, f"an npz file with {', '.join(names)}"), np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names}


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a batch file of CIFAR: a pickled dict of lists, bytes, text and numpy arrays, and nothing else.

    Files of Python 2 hold byte strings, which come back as text like the keys.
    """
    with reading(path, "a pickled dict of lists and arrays"), path.open("rb") as file:
        content = _PlainUnpickler(file, encoding="latin1").load()
        if not isinstance(content, dict):
            raise corrupt(path, type(content).__name__, "a pickled dict")
        return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in content.items()}


class _PlainUnpickler(pickle.Unpickler):
    """Admits what numpy arrays need, and refuses every other global: a pickle can run code."""

    def find_class(self, module: str, name: str) -> Any:
        # numpy moved its core in version 2; a pickle carries the name of the version that wrote it.
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return _from_buffer
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module == "_codecs" and name == "encode":  # how Python 3 writes bytes in Python 2's protocol
            return _encode_latin1
        raise pickle.UnpicklingError(f"'{module}.{name}' has no place in a data file")


def _from_buffer(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding '{encoding}' has no place in a data file")
    return text.encode("latin1")


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
