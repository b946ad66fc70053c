"""CIFAR from files as published, which the tests make, packed files, real files, and bad ones."""

from __future__ import annotations

import importlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import REAL, RNG, everything, first_batch, get, real_data
from published_files import make_cifar

from hvd_hetero.errors import ConfigError

datasets = importlib.import_module("torchvision.datasets")  # hvd_hetero has to be there first


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, np.ndarray]]:
    """``cifar(classes=10)`` makes what torchvision takes for the published files, and returns its pixels by split."""

    def make(classes: int = 10) -> dict[str, np.ndarray]:
        pixels, attributes = make_cifar(tmp_path, classes)
        for key, value in attributes.items():
            monkeypatch.setattr(getattr(datasets, f"CIFAR{classes}"), key, value)
        return pixels

    return make


@pytest.mark.parametrize("classes", [10, 100])
def test_published_files(tmp_path: Path, cifar: Callable[..., dict[str, np.ndarray]], classes: int) -> None:
    pixels = cifar(classes)
    for root in (tmp_path, next(tmp_path.glob("cifar-*"))):
        data = get(f"cifar{classes}", root, augment=False)
        for source, split in ((data.train, "train"), (data.test, "test")):
            inputs, targets = everything(source)
            assert np.array_equal(inputs.numpy(), pixels[split]) and inputs.is_contiguous()
            assert targets[:6].tolist() == [classes - 1 - i for i in range(6)] and len(targets) == len(inputs)
    mean, deviation = (0.4914, 0.2470) if classes == 10 else (0.5071, 0.2673)
    images, _ = first_batch(data.train, [4])
    assert np.allclose(images[0, 0].numpy(), (pixels["train"][4, 0] / 255 - mean) / deviation, atol=1e-5)


def test_what_is_not_as_published_is_refused_before_it_is_read(
    tmp_path: Path, cifar: Callable[..., dict[str, np.ndarray]]
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "was-run"),)

    cifar()
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    whole = path.read_bytes()
    for content in (pickle.dumps({"data": Evil(), "labels": []}), whole[:-1000], None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ConfigError, match="truncated or corrupt.*data.download=true") as caught:
            get("cifar10", tmp_path)
        assert caught.value.key == str(path.parent)
    assert not (tmp_path / "was-run").exists()


def code(pixels: np.ndarray) -> np.ndarray:
    """The packed files' coding, written from its description: differences of channels, then of neighbours."""
    mixed = pixels.copy()
    mixed[:, 0] -= pixels[:, 1]
    mixed[:, 2] -= pixels[:, 1]
    framed = np.pad(mixed, ((0, 0), (0, 0), (1, 0), (1, 0)))
    return framed[:, :, 1:, 1:] - framed[:, :, 1:, :-1] - framed[:, :, :-1, 1:] + framed[:, :, :-1, :-1]


def make_packed(path: Path, train: int, test: int) -> np.ndarray:
    pixels = RNG.integers(0, 256, (train + test, 3, 32, 32), dtype=np.uint8)
    labels = RNG.integers(0, 10, train + test, dtype=np.uint8)
    coded = code(pixels)
    np.savez(path, x_train_coded=coded[:train], y_train=labels[:train],
             x_test_coded=coded[train:], y_test=labels[train:])
    return pixels


def test_packed_cifar10_parts(tmp_path: Path) -> None:
    a, b = make_packed(tmp_path / "cifar10-a.npz", 4, 2), make_packed(tmp_path / "cifar10-b.npz", 3, 1)
    whole, part = get("cifar10", tmp_path), get("cifar10", tmp_path, parts=["b"])
    assert np.array_equal(everything(whole.train)[0].numpy(), np.concatenate([a[:4], b[:3]]))
    assert np.array_equal(everything(part.test)[0].numpy(), b[3:])
    with pytest.raises(ConfigError, match=r"choose from a, b") as caught:
        get("cifar10", tmp_path, parts=["c"])
    assert caught.value.key == "data.args.parts"
    with pytest.raises(ConfigError, match="type str"):
        get("cifar10", tmp_path, parts="a")
    path = tmp_path / "cifar10-a.npz"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ConfigError, match="truncated or corrupt") as caught:
        get("cifar10", tmp_path)
    assert caught.value.key == str(path)
    buffer = io.BytesIO()
    np.savez(buffer, y_train=np.zeros(3))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ConfigError, match="x_train_coded"):
        get("cifar10", tmp_path)


@real_data
def test_real_cifar10_part() -> None:
    data = get("cifar10", REAL, parts=["20k"])
    inputs, targets = everything(data.train)
    assert torch.bincount(targets).tolist() == [2000] * 10
    means = inputs.float().mean((0, 2, 3)) / 255
    assert torch.allclose(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.005)
    first, again = (first_batch(data.train, list(range(64)), seed=1)[0] for _ in range(2))
    assert torch.equal(first, again) and first.shape == (64, 3, 32, 32)
