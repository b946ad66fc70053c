"""Photographs: Oxford Flowers 102 and Tiny ImageNet, streamed from files or decoded once into memory."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hvd_hetero.data.augment import CenterCrop, ImageTransform, Normalize, RandomCropFlip, Resize
from hvd_hetero.data.files import class_numbers, corrupt, folder_with, missing, read_npz, reading
from hvd_hetero.data.split import Split, Splits
from hvd_hetero.errors import ConfigError

# Of ImageNet, because published weights expect them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def flowers102(root: Path, size: int | None = None, augment: bool = True, with_val: bool = False,
               with_test: bool = False) -> Splits:
    """Oxford Flowers 102, colour images ``[N, 3, size, size]``.

    The official photographs are streamed: worker processes decode them, scale the shorter side to 8/7 of
    ``size`` and cut out the middle square; the rest happens on whole batches.

    Args:
        root: holds ``flowers-102`` with ``jpg``, ``imagelabels.mat`` and ``setid.mat``, or the packed
            ``flowers102-64.npz``, which sits in memory.
        size: height and width; 224 for the official files, 64 for the packed ones if not given.
        augment: training images are cropped at random and mirrored.
        with_val: train on the official validation split too.
        with_test: train on the official test split too (7169 images in all), and be tested on the validation split.
    """
    _check_size(size)
    if with_val and with_test:
        raise ConfigError("data.args.with_test", True, "beside with_val nothing is left to test on", "set one of them")
    own, other = ((0, 2), 1) if with_test else ((0, 1) if with_val else (0,), 2)  # 0 train, 1 validation, 2 test
    folder = folder_with(root, ["flowers-102", "flowers102", "."], ["jpg", "imagelabels.mat", "setid.mat"])
    if folder is not None:
        size = size or 224
        stored = round(size * 8 / 7)
        normalize = Normalize(MEAN, STD)
        center = CenterCrop(size, normalize)
        crop = RandomCropFlip(size, 0, normalize) if augment else center
        return Splits(*_official_flowers(folder, own, other), crop, center, partial(read_image, size=stored))
    packed = folder_with(root, [".", "flowers102"], ["flowers102-64.npz"])
    if packed is None:
        files = "jpg/image_00001.jpg and so on, imagelabels.mat, setid.mat"
        raise missing(root, f"flowers-102 with {files}, or the packed flowers102-64.npz")
    path = packed / "flowers102-64.npz"
    arrays = read_npz(path, ["jpeg", "offsets", "y", "split"])
    images = decode_all(path, _cut(path, arrays["jpeg"], arrays["offsets"]), size=64)
    everything = Split(images, class_numbers(path, arrays["y"], len(images), classes=102))
    split = class_numbers(path, arrays["split"], len(images), classes=3).numpy()
    train, test = np.flatnonzero(np.isin(split, own)), np.flatnonzero(split == other)
    return Splits(everything.take(train), everything.take(test),
                  *_small_transforms(64, size, augment))


def _official_flowers(folder: Path, own: Sequence[int], other: int) -> tuple[Split, Split]:
    labels_path = folder / "imagelabels.mat"
    labels = _read_mat(labels_path, ["labels"])["labels"]
    with reading(labels_path, "class numbers"):
        numbers = labels.astype(np.int64) - 1
    targets = class_numbers(labels_path, numbers, len(labels), classes=102)
    names = ["trnid", "valid", "tstid"]
    sets = _read_mat(folder / "setid.mat", names)
    train = np.concatenate([sets[names[number]] for number in own])
    jpg = folder / "jpg"
    there = {path.name for path in jpg.iterdir()}

    def split(numbers: np.ndarray) -> Split:
        numbers = numbers.astype(np.int64)
        if not len(numbers) or numbers.min() < 1 or numbers.max() > len(targets):
            expected = f"image numbers in 1 .. {len(targets)}"
            raise corrupt(folder / "setid.mat", f"{len(numbers)} numbers", expected)
        files = [f"image_{number:05d}.jpg" for number in numbers]
        lost = [name for name in files if name not in there]
        if lost:
            raise ConfigError(str(jpg), lost[0], "is not there", f"put the {len(lost)} lost images back")
        return Split(np.array([str(jpg / name) for name in files]), targets[torch.from_numpy(numbers - 1)])

    return split(train), split(sets[names[other]])


def _read_mat(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read vectors from a MATLAB file."""
    with reading(path, f"a MATLAB file with {', '.join(names)}"):
        try:
            # Slow to import, and only these files need it.
            content: dict[str, Any] = importlib.import_module("scipy.io").loadmat(path)
        except Exception as error:  # scipy's own error classes and those of its parsing
            raise OSError(str(error)) from error
        return {name: np.asarray(content[name]).reshape(-1) for name in names}


def tiny_imagenet(root: Path, size: int = 64, augment: bool = True, stream: bool = False) -> Splits:
    """Tiny ImageNet, colour images ``[N, 3, size, size]``; the official validation images are the test split.

    Classes are numbered in the order of their names (WordNet ids), in the packed file as it says.

    Args:
        root: holds ``tiny-imagenet-200`` with ``train`` and ``val``, or the packed ``tiny-imagenet-*.npz``.
        size: height and width; images of 64 pixels are scaled up on the device, as a whole batch.
        augment: training images are cropped at random out of a frame of 8 zeros, and mirrored.
        stream: worker processes decode the files again and again; otherwise all sit in memory.
    """
    _check_size(size)
    transforms = _small_transforms(64, size, augment)
    folder = folder_with(root, ["tiny-imagenet-200", "."], ["train", "val/val_annotations.txt"])
    if folder is not None:
        train, test = _official_tiny(folder)
        if stream:
            return Splits(train, test, *transforms, partial(read_image, size=64))
        return Splits(_in_memory(train), _in_memory(test), *transforms)
    packed = folder_with(root, [".", "tiny-imagenet"], ["tiny-imagenet-*.npz"])
    if packed is None:
        what = "train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt"
        raise missing(root, f"tiny-imagenet-200 with {what}, or the packed tiny-imagenet-20.npz")
    path = sorted(packed.glob("tiny-imagenet-*.npz"))[0]
    kinds = ("jpeg", "offsets", "y")
    arrays = read_npz(path, [*(f"{kind}_{split}" for split in ("train", "val") for kind in kinds), "wnids"])

    def split(name: str) -> Split:
        images = decode_all(path, _cut(path, arrays[f"jpeg_{name}"], arrays[f"offsets_{name}"]), size=64)
        return Split(images, class_numbers(path, arrays[f"y_{name}"], len(images), len(arrays["wnids"])))

    return Splits(split("train"), split("val"), *transforms)


def _official_tiny(folder: Path) -> tuple[Split, Split]:
    number = {path.name: i for i, path in enumerate(sorted((folder / "train").glob("n*")))}
    train = [(str(path), i) for name, i in number.items()
             for path in sorted((folder / "train" / name / "images").glob("*.JPEG"))]
    annotations = folder / "val" / "val_annotations.txt"
    test = []
    with reading(annotations, "lines of a file name, a tab and a class"):
        for line in annotations.read_text().splitlines():
            name, wnid = line.split("\t")[:2]
            test.append((str(folder / "val" / "images" / name), number[wnid]))
    if not train or not test:
        raise corrupt(folder, f"{len(train)} training and {len(test)} validation images", "some of both")
    return _named(train), _named(test)


def _named(samples: Sequence[tuple[str, int]]) -> Split:
    names, targets = zip(*samples, strict=True)
    return Split(np.array(names), torch.tensor(targets))


def _in_memory(split: Split) -> Split:
    assert isinstance(split.inputs, np.ndarray)
    with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock
        images = list(pool.map(partial(read_image, size=64), split.inputs.tolist()))
    return Split(torch.stack(images), split.targets)


def _cut(path: Path, blob: np.ndarray, offsets: np.ndarray) -> list[bytes]:
    """Part JPEG files that lie one after the other."""
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(blob) or (np.diff(offsets) <= 0).any():
        raise corrupt(path, f"offsets that end at {offsets[-1:]}", f"rising ones from 0 to {len(blob)}")
    return [blob[a:b].tobytes() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def decode_all(path: Path, jpegs: Sequence[bytes], size: int) -> Tensor:
    """Decode images that lie in one file into uint8 ``[N, 3, size, size]``.

    Raises:
        ConfigError: one cannot be decoded.
    """
    with reading(path, "JPEG images"), ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(partial(_decode, size=size), map(io.BytesIO, jpegs))))


def read_image(path: str, size: int) -> Tensor:
    """Read an image file as uint8 ``[3, size, size]``: shorter side scaled to ``size``, middle square.

    Raises:
        ConfigError: it cannot be decoded.
    """
    with reading(Path(path), "an image"):
        return _decode(path, size)


def _decode(file: Any, size: int) -> Tensor:
    with Image.open(file) as image:
        image.draft("RGB", (size, size))  # a large JPEG is decoded at half, a quarter, an eighth of its size
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _small_transforms(stored: int, size: int | None, augment: bool) -> tuple[ImageTransform, ImageTransform]:
    plain: ImageTransform = Normalize(MEAN, STD)
    if size not in (None, stored):
        plain = Resize(int(size or stored), plain)
    return (RandomCropFlip(stored, stored // 8, plain) if augment else plain), plain


def _check_size(size: int | None) -> None:
    if size is not None and size < 1:
        raise ConfigError("data.args.size", size, "must be at least 1", "give a number of pixels")
