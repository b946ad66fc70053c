"""Photographs: Oxford Flowers 102, Tiny ImageNet and the user's own folders, streamed or decoded once into memory."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hvd_hetero.data import packed
from hvd_hetero.data.augment import CenterCrop, ImageTransform, Normalize, RandomCropFlip, Resize
from hvd_hetero.data.files import corrupt, decode_all, missing, read_image, reading
from hvd_hetero.data.published import read_published
from hvd_hetero.data.split import Split, Splits, joined
from hvd_hetero.errors import ConfigError

# Of ImageNet, because published weights expect them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def flowers102(root: Path, download: bool = False, size: int | None = None, augment: bool = True,
               with_val: bool = False, with_test: bool = False) -> Splits:
    """Oxford Flowers 102, colour images ``[N, 3, size, size]``.

    Args:
        root: holds ``flowers-102`` with ``jpg``, ``imagelabels.mat`` and ``setid.mat``, which is streamed (see
            :func:`image_folder`), or the packed ``flowers102-64.npz``, which sits in memory.
        download: fetch the published files where they are missing.
        size: height and width; 224 for the published files, 64 for the packed ones if not given.
        augment: training images are cropped at random and mirrored.
        with_val: train on the official validation split too.
        with_test: train on the official test split too (7169 images in all), and be tested on the validation split.
    """
    _check_size(size)
    if with_val and with_test:
        raise ConfigError("data.args.with_test", True, "beside with_val nothing is left to test on", "set one of them")
    names = ("train", "val", "test")
    parts, other = ((0, 2), 1) if with_test else ((0, 1) if with_val else (0,), 2)
    wanted = [{"split": names[number], "loader": str} for number in (*parts, other)]
    published = read_published("Flowers102", "flowers-102", root, download, *wanted)
    if published is not None:
        images = {Path(data[i][0]) for data in published for i in range(len(data))}
        folder = min(images).parent
        if lost := sorted(images - {*folder.iterdir()}):
            raise ConfigError(str(folder), lost[0].name, "is not there", f"put the {len(lost)} lost images back")
        *train, test = map(_listed, published)
        return _photographs(joined(train), test, size or 224, augment)
    found = packed.flowers102(root, parts, other)
    if found is None:
        files = "jpg/image_00001.jpg and so on, imagelabels.mat, setid.mat"
        raise missing(root, f"flowers-102 with {files}, or the packed flowers102-64.npz", can_download=True)
    return Splits(*found, *_small_transforms(size or 64, augment))


def image_folder(root: Path, size: int = 224, augment: bool = True, stream: bool = True) -> Splits:
    """Images of one's own, a folder for each class; colour images ``[N, 3, size, size]``.

    Each image is decoded, its shorter side is scaled to 8/7 of ``size``, and the middle square is cut out; the rest
    happens on whole batches.

    Args:
        root: holds ``train`` and ``val`` (or, without it, ``test``), each with a folder of images for every class.
        size: height and width.
        augment: training images are cropped at random and mirrored.
        stream: worker processes decode the files again and again; otherwise all sit in memory.
    """
    _check_size(size)
    test = root / ("val" if (root / "val").is_dir() else "test")
    if not (root / "train").is_dir() or not test.is_dir():
        raise missing(root, "train and val (or test), each with a folder of images for every class")
    return _photographs(*_folders(root / "train", test), size, augment, stream)


def tiny_imagenet(root: Path, size: int = 64, augment: bool = True, stream: bool = False) -> Splits:
    """Tiny ImageNet, colour images ``[N, 3, size, size]``; the official validation images are the test split.

    Classes are numbered in the order of their names (WordNet ids), in the packed file as it says.

    Args:
        root: holds ``tiny-imagenet-200`` with ``train`` and ``val``, or the packed ``tiny-imagenet-*.npz``.
        size: height and width; images of 64 pixels are scaled up on the device, as a whole batch.
        augment: training images are cropped at random out of a frame of 8 zeros, and mirrored.
        stream: as for :func:`image_folder`.
    """
    _check_size(size)
    transforms = _small_transforms(size, augment)
    for folder in (root / "tiny-imagenet-200", root):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return _decoded(Splits(*_folders(folder / "train", folder / "val"), *transforms), 64, stream)
    found = packed.tiny_imagenet(root)
    if found is None:
        what = "train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt"
        raise missing(root, f"tiny-imagenet-200 with {what}, or the packed tiny-imagenet-20.npz")
    return Splits(*found, *transforms)


def _folders(train: Path, test: Path) -> tuple[Split, Split]:
    """List images by the folders of their classes, of which Tiny ImageNet has a table for its validation images."""
    read: Any = importlib.import_module("torchvision.datasets").ImageFolder
    what = "a folder of images for every class"
    with reading(train, what):
        classes = read(train, loader=str)
    annotations = test / "val_annotations.txt"
    if annotations.is_file():
        with reading(annotations, "lines of a file name, a tab and a class"):
            rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
            return _listed(classes), _listed([(test / "images" / name, classes.class_to_idx[c]) for name, c in rows])
    with reading(test, what):
        others = read(test, loader=str)
    if differ := sorted({*classes.classes} ^ {*others.classes}):
        raise corrupt(test, f"classes differ in {differ}", f"the classes of {train}", "make the folders the same")
    return _listed(classes), _listed(others)


def _listed(dataset: Any) -> Split:
    """Return the file names and classes that a dataset gives as its items."""
    names, targets = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return Split(np.array([*map(str, names)]), torch.tensor(targets))


def _photographs(train: Split, test: Split, size: int, augment: bool, stream: bool = True) -> Splits:
    center = CenterCrop(size, Normalize(MEAN, STD))
    crop = RandomCropFlip(size, 0, Normalize(MEAN, STD)) if augment else center
    return _decoded(Splits(train, test, crop, center), round(size * 8 / 7), stream)


def _decoded(splits: Splits, size: int, stream: bool) -> Splits:
    """Have the files of both splits decoded to ``size`` pixels, now or by worker processes."""
    decode = partial(read_image, size=size)
    if stream:
        return replace(splits, decode=decode)
    train, test = (Split(decode_all(part.inputs, decode), part.targets) for part in (splits.train, splits.test))
    return replace(splits, train=train, test=test)


def _small_transforms(size: int, augment: bool) -> tuple[ImageTransform, ImageTransform]:
    """Return the transforms of images of 64 pixels that are to have ``size``."""
    evaluated: ImageTransform = Normalize(MEAN, STD)
    if size != 64:
        evaluated = Resize(size, evaluated)
    return (RandomCropFlip(64, 8, evaluated) if augment else evaluated), evaluated


def _check_size(size: int | None) -> None:
    if size is not None and size < 1:
        raise ConfigError("data.args.size", size, "must be at least 1", "give a number of pixels")
