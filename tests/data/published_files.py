"""Datasets as torchvision has them on disk, made small by the tests, with the checksums that they have."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
import struct
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

Attributes = dict[str, Any]
"""What a class in torchvision.datasets is to have, for it to take a made dataset for the published one."""


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def make_cifar(root: Path, classes: int = 10, rows: int = 6) -> tuple[dict[str, np.ndarray], Attributes]:
    """CIFAR-10, or CIFAR-100 with 100 classes; returns the pixels by split."""
    ten = classes == 10
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    names = {"train": [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"],
             "test": ["test_batch" if ten else "test"]}
    rng, label_key = np.random.default_rng(0), "labels" if ten else "fine_labels"
    pixels: dict[str, np.ndarray] = {}
    lists: dict[str, list[list[str]]] = {}
    for split, files in names.items():
        data = rng.integers(0, 256, (len(files), rows, 3072), dtype=np.uint8)
        for name, part in zip(files, data, strict=True):
            labels = [(classes - 1 - i) % classes for i in range(rows)]
            (folder / name).write_bytes(pickle.dumps({"data": part, label_key: labels}, protocol=2))
        pixels[split] = data.reshape(-1, 3, 32, 32)
        lists[f"{split}_list"] = [[name, md5(folder / name)] for name in files]
    meta, key = ("batches.meta", "label_names") if ten else ("meta", "fine_label_names")
    (folder / meta).write_bytes(pickle.dumps({key: [f"class {i}" for i in range(classes)]}))
    return pixels, {**lists, "meta": {"filename": meta, "key": key, "md5": md5(folder / meta)}}


def pack_cifar(root: Path, server: Path) -> Attributes:
    """Move CIFAR's folder into the archive that a server has; ``url`` is to be added."""
    folder = next(root.glob("cifar-*"))
    archive = server / ("cifar-10-python.tar.gz" if "10-" in folder.name else "cifar-100-python.tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    return {"tgz_md5": md5(archive)}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">i{array.ndim}i", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def make_mnist(folder: Path, ending: str = "") -> dict[str, np.ndarray]:
    """MNIST's four files, or Fashion-MNIST's; returns the pixels by split."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", 12), ("t10k", 5)):
        arrays[split] = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, raw in (("images-idx3", idx(arrays[split])), ("labels-idx1", idx(labels))):
            path = folder / f"{split}-{kind}-ubyte{ending}"
            path.write_bytes(gzip.compress(raw) if ending == ".gz" else raw)
    return arrays


def picture(value: int, width: int = 64, height: int = 64) -> Image.Image:
    """Make one of a single grey, so that its class can be read off its pixels after JPEG."""
    return Image.new("RGB", (width, height), (value, value, value))


def make_flowers(root: Path, sizes: tuple[int, int] = (80, 60)) -> Attributes:
    """Twelve photographs; number i is of class (i - 1) % 3 and of grey 10 i."""
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for i in range(1, 13):
        picture(10 * i, *sizes).save(folder / "jpg" / f"image_{i:05d}.jpg", quality=95)
    savemat(folder / "imagelabels.mat", {"labels": np.arange(12)[None] % 3 + 1})
    savemat(folder / "setid.mat", {"trnid": np.array([[1, 5, 9, 2]], np.uint16), "valid": np.array([[3, 4]]),
                                   "tstid": np.array([[12, 6, 7, 8, 10, 11]])})
    labels, sets = ((name, md5(folder / name)) for name in ("imagelabels.mat", "setid.mat"))
    return {"_file_dict": {"image": ("102flowers.tgz", ""), "label": labels, "setid": sets}}


def make_folders(root: Path, **splits: dict[str, list[int]]) -> None:
    """Folders of images: greys by class by split."""
    for split, classes in splits.items():
        for name, greys in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number, grey in enumerate(greys):
                picture(grey, 90, 70).save(root / split / name / f"{number}.png")


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder over HTTP; yields the address and the paths that are fetched, as they are."""
    fetched: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            # torchvision looks for redirects by a GET of which it reads nothing, then fetches
            fetched.append(self.path)
            super().do_GET()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
