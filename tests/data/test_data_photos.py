"""Photographs: published trees and folders that the tests make, packed files, and bad ones."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import REAL, RNG, everything, first_batch, get, real_data
from PIL import Image
from published_files import make_flowers, make_folders, picture

from hvd_hetero.data import MapSource, TensorSource
from hvd_hetero.data.files import read_image
from hvd_hetero.data.photos import MEAN, STD
from hvd_hetero.errors import ConfigError

datasets = importlib.import_module("torchvision.datasets")  # hvd_hetero has to be there first


def level(images: torch.Tensor) -> list[int]:
    """Read the greys off normalized images."""
    middle = images[:, :, images.shape[2] // 2, images.shape[3] // 2]
    return (middle * torch.tensor(STD) + torch.tensor(MEAN)).mean(1).mul(255).round().int().tolist()


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    picture(value).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


# Flowers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for key, value in make_flowers(tmp_path).items():
        monkeypatch.setattr(datasets.Flowers102, key, value)
    return tmp_path / "flowers-102"


@pytest.mark.parametrize("workers", [0, 2])
def test_published_flowers_stream_through_workers(flowers: Path, workers: int) -> None:
    data = get("flowers102", flowers.parent, workers=workers, size=28)
    assert isinstance(data.train, MapSource) and (len(data.train), len(data.test)) == (4, 6)
    images, targets = first_batch(data.train, [3, 1, 1])
    assert images.shape == (3, 3, 28, 28) and images.dtype == torch.float32
    assert targets.tolist() == [1, 1, 1] and level(images) == pytest.approx([20, 50, 50], abs=1)
    images, targets = first_batch(data.test, [0])
    assert targets.tolist() == [2] and level(images) == pytest.approx([120], abs=1)


def test_published_flowers_with_the_validation_split_and_the_arguments_of_all(flowers: Path) -> None:
    assert len(get("flowers102", flowers, with_val=True).train) == 6
    swapped = get("flowers102", flowers, with_test=True)
    assert (len(swapped.train), len(swapped.test)) == (10, 2)
    held = get("flowers102", flowers, with_val=True, validation=0.5, size=8)
    assert len(held.train) + len(held.test) == 6 and isinstance(held.test, MapSource)
    assert first_batch(get("flowers102", flowers).train, [0])[0].shape == (1, 3, 224, 224)


def test_photographs_are_scaled_by_the_shorter_side_and_cut_in_the_middle(tmp_path: Path) -> None:
    wide = Image.new("RGB", (400, 100))
    wide.paste((255, 0, 0), (150, 0, 250, 100))  # the middle square is red
    wide.save(tmp_path / "wide.png")
    image = read_image(str(tmp_path / "wide.png"), size=20)
    assert image.shape == (3, 20, 20) and image.dtype == torch.uint8
    assert (image[0, :, 1:-1] == 255).all() and not image[1:].any()


def test_bad_published_flowers(flowers: Path) -> None:
    data = get("flowers102", flowers, workers=1, size=28)
    broken = flowers / "jpg" / "image_00005.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(ConfigError, match="truncated or corrupt") as caught:
        first_batch(data.train, [1])
    assert caught.value.key == str(broken)
    broken.unlink()
    with pytest.raises(ConfigError, match="image_00005.jpg.*is not there; put the 1 lost"):
        get("flowers102", flowers)
    (flowers / "imagelabels.mat").write_bytes(b"no such thing")
    with pytest.raises(ConfigError, match="truncated or corrupt.*data.download=true") as caught:
        get("flowers102", flowers)
    assert caught.value.key == str(flowers)


def blob(values: list[int]) -> tuple[np.ndarray, np.ndarray]:
    files = [jpeg(value) for value in values]
    return np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])


def test_packed_flowers_sit_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "flowers102-64.npz"
    data, offsets = blob([10, 20, 30, 40])
    np.savez(path, jpeg=data, offsets=offsets, y=[0, 101, 2, 3], split=[0, 0, 1, 2])
    packed = get("flowers102", tmp_path, augment=False)
    assert isinstance(packed.train, TensorSource)
    inputs, targets = everything(packed.train)
    assert inputs.dtype == torch.uint8 and targets.tolist() == [0, 101]
    assert len(get("flowers102", tmp_path, with_val=True).train) == 3
    swapped = get("flowers102", tmp_path, with_test=True)
    assert everything(swapped.train)[1].tolist() == [0, 101, 3] and everything(swapped.test)[1].tolist() == [2]
    with pytest.raises(ConfigError, match=r"data\.args\.with_test=True: .*nothing is left to test on"):
        get("flowers102", tmp_path, with_val=True, with_test=True)
    images, _ = first_batch(get("flowers102", tmp_path, size=96).test, [0])
    assert images.shape == (1, 3, 96, 96) and level(images) == [40]
    np.savez(path, jpeg=data[:-5], offsets=offsets, y=[0, 101, 2, 3], split=[0, 0, 1, 2])
    with pytest.raises(ConfigError, match="rising ones"):
        get("flowers102", tmp_path)
    np.savez(path, jpeg=RNG.integers(0, 256, 40, np.uint8), offsets=[0, 40], y=[0], split=[0])
    with pytest.raises(ConfigError, match="JPEG images"):
        get("flowers102", tmp_path)


# Tiny ImageNet ---------------------------------------------------------------------------------------------


def make_tiny(folder: Path) -> None:
    """Three classes (the second by name has two training images), two validation images."""
    for wnid, count in (("n03", 1), ("n01", 1), ("n02", 2)):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        for i in range(count):
            picture(int(wnid[1:]) * 50 + i).save(images / f"{wnid}_{i}.JPEG", quality=95)
    (folder / "val" / "images").mkdir(parents=True)
    Image.new("L", (64, 64), 200).save(folder / "val" / "images" / "val_0.JPEG")  # some are grey
    picture(150).save(folder / "val" / "images" / "val_1.JPEG")
    lines = ("val_1.JPEG\tn03\t0\t0\t9\t9\n", "val_0.JPEG\tn02\t0\t0\t9\t9\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))


@pytest.mark.parametrize("stream", [False, True])
def test_official_tiny_imagenet(tmp_path: Path, stream: bool) -> None:
    make_tiny(tmp_path / "tiny-imagenet-200")
    data = get("tiny_imagenet", tmp_path, augment=False, stream=stream)
    assert isinstance(data.train, MapSource if stream else TensorSource)
    images, targets = first_batch(data.train, [0, 1, 2, 3])
    assert targets.tolist() == [0, 1, 1, 2] and level(images) == [50, 100, 101, 150]
    images, targets = first_batch(data.test, [0, 1])
    assert targets.tolist() == [2, 1] and level(images) == [150, 200]
    larger = get("tiny_imagenet", tmp_path, size=80, stream=stream)
    assert first_batch(larger.train, [0])[0].shape == (1, 3, 80, 80)


def test_bad_official_tiny_imagenet(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    annotations = tmp_path / "val" / "val_annotations.txt"
    for content in ("val_1.JPEG\tn99\t0\n", "val_1.JPEG\n"):
        annotations.write_text(content)
        with pytest.raises(ConfigError, match="a tab and a class") as caught:
            get("tiny_imagenet", tmp_path)
        assert caught.value.key == str(annotations)
    annotations.write_text("nowhere.JPEG\tn01\n")
    with pytest.raises(ConfigError, match="nowhere.JPEG"):
        get("tiny_imagenet", tmp_path)


def test_packed_tiny_imagenet(tmp_path: Path) -> None:
    (train, train_offsets), (val, val_offsets) = blob([10, 20]), blob([30])
    arrays = {"jpeg_train": train, "offsets_train": train_offsets, "y_train": [1, 0], "jpeg_val": val,
              "offsets_val": val_offsets, "y_val": [1], "wnids": np.array(["n02", "n01"])}
    np.savez(tmp_path / "tiny-imagenet-2.npz", **arrays)
    data = get("tiny_imagenet", tmp_path, augment=False)
    images, targets = first_batch(data.train, [0, 1])
    assert targets.tolist() == [1, 0] and level(images) == [10, 20]
    np.savez(tmp_path / "tiny-imagenet-2.npz", **{**arrays, "y_val": [2]})
    with pytest.raises(ConfigError, match=r"labels in 0 \.\. 1"):
        get("tiny_imagenet", tmp_path)


@pytest.mark.parametrize("name", ["flowers102", "tiny_imagenet", "image_folder"])
def test_bad_sizes(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        get(name, tmp_path, size=0)


# Folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("test", ["val", "test"])
def test_folders_of_images(tmp_path: Path, test: str, stream: bool) -> None:
    make_folders(tmp_path, train={"cat": [10, 20], "ape": [30]}, **{test: {"cat": [40], "ape": [50]}})
    data = get("image_folder", tmp_path, size=32, stream=stream)
    assert isinstance(data.train, MapSource if stream else TensorSource)
    images, targets = first_batch(data.train, [0, 1, 2])
    assert images.shape == (3, 3, 32, 32) and targets.tolist() == [0, 1, 1] and level(images) == [30, 10, 20]
    images, targets = first_batch(data.test, [1, 0])
    assert targets.tolist() == [1, 0] and level(images) == [40, 50]
    assert first_batch(get("image_folder", tmp_path).test, [0])[0].shape == (1, 3, 224, 224)


def test_of_val_and_test_val_is_tested_on(tmp_path: Path) -> None:
    make_folders(tmp_path, train={"a": [10]}, val={"a": [20]}, test={"a": [30]})
    assert level(first_batch(get("image_folder", tmp_path, size=8).test, [0])[0]) == [20]


def test_bad_folders(tmp_path: Path) -> None:
    make_folders(tmp_path, train={"a": [10], "b": []}, val={"a": [20], "c": [30]})
    with pytest.raises(ConfigError, match="classes b") as caught:
        get("image_folder", tmp_path)
    assert caught.value.key == str(tmp_path / "train")
    make_folders(tmp_path / "train", b={".": [10]})
    with pytest.raises(ConfigError, match=r"classes differ in \['b', 'c'\]") as caught:
        get("image_folder", tmp_path)
    assert caught.value.key == str(tmp_path / "val")


def test_tiny_imagenet_with_folders_for_its_validation_images(tmp_path: Path) -> None:
    splits = {"n01": [10, 20], "n02": [30]}
    make_folders(tmp_path / "tiny-imagenet-200", train=splits, val={"n01": [40], "n02": [50]})
    images, targets = first_batch(get("tiny_imagenet", tmp_path).test, [1, 0])
    assert targets.tolist() == [1, 0] and level(images) == [50, 40]


@real_data
@pytest.mark.parametrize(("name", "train", "test", "classes"), [("flowers102", 1020, 6149, 102),
                                                               ("tiny_imagenet", 8000, 1000, 20)])
def test_real_packed_photographs(name: str, train: int, test: int, classes: int) -> None:
    data = get(name, REAL)
    assert (len(data.train), len(data.test)) == (train, test)
    assert torch.bincount(everything(data.train)[1]).tolist() == [train // classes] * classes
    images, _ = first_batch(data.test, list(range(200)))
    assert images.shape == (200, 3, 64, 64)
    assert images.mean().abs() < 0.7 and 0.8 < images.std() < 1.5, "photographs, normalized"
