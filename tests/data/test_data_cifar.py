"""CIFAR from official files that the tests make, packed files, real files, and bad ones."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import REAL, RNG, everything, first_batch, get, real_data

from hvd_hetero.errors import ConfigError


def make_cifar(folder: Path, write: object, rows: int = 6) -> np.ndarray:
    """Write the six batch files in one of the official formats; returns the training pixels."""
    folder.mkdir(parents=True)
    ending = ".bin" if write is write_binary else ""
    pixels = RNG.integers(0, 256, (6, rows, 3072), dtype=np.uint8)
    labels = RNG.integers(0, 10, (6, rows))
    for i in range(6):
        name = "test_batch" if i == 5 else f"data_batch_{i + 1}"
        write(folder / f"{name}{ending}", pixels[i], labels[i])  # type: ignore[operator]
    return pixels[:5].reshape(-1, 3, 32, 32)


def write_text_keys(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    content = {"data": pixels, "labels": labels.tolist(), "filenames": ["a"]}
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_bytes_keys(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    content = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"training batch"}
    path.write_bytes(pickle.dumps(content, protocol=5))


def write_python2(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Write the very opcodes of the published files: protocol 2 with Python 2's byte strings."""
    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\x01\x87R(K\x03" + text(b"|") + b"NNN" + number(-1) * 2
    dtype += b"K\0tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    shape = number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(number(int(label)) for label in labels) + b"e"
    path.write_bytes(b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + b"u.")


def write_binary(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    path.write_bytes(np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1).tobytes())


@pytest.mark.parametrize("write", [write_text_keys, write_bytes_keys, write_python2, write_binary])
@pytest.mark.parametrize("below", [True, False])
def test_cifar10_official_files(tmp_path: Path, write: object, below: bool) -> None:
    folder = tmp_path / ("cifar-10-batches-bin" if write is write_binary else "cifar-10-batches-py")
    pixels = make_cifar(folder, write)
    data = get("cifar10", tmp_path if below else folder, augment=False)
    inputs, targets = everything(data.train)
    assert np.array_equal(inputs.numpy(), pixels) and targets.shape == (30,) and len(data.test) == 6
    images, _ = first_batch(data.train, [4])
    expected = (pixels[4, 0] / 255 - 0.4914) / 0.2470
    assert np.allclose(images[0, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar100_official_files_give_fine_labels(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / f"cifar-100-{kind}"
    folder.mkdir()
    pixels = RNG.integers(0, 256, (7, 3072), dtype=np.uint8)
    fine, coarse = np.arange(93, 100), np.arange(7)
    for name in ("train", "test"):
        if kind == "python":
            content = {"data": pixels, "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        else:
            rows = np.concatenate([coarse[:, None], fine[:, None], pixels], axis=1).astype(np.uint8)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
    for root in (tmp_path, folder):
        data = get("cifar100", root)
        assert np.array_equal(everything(data.train)[0].numpy(), pixels.reshape(7, 3, 32, 32))
        assert everything(data.test)[1].tolist() == fine.tolist()
    assert first_batch(data.train, [0, 1])[0].shape == (2, 3, 32, 32)


def test_cifar100_is_not_any_folder_with_train_and_test(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(ConfigError, match="no such dataset"):
        get("cifar100", tmp_path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "was-run"),)

    folder = tmp_path / "cifar-10-batches-py"
    make_cifar(folder, write_text_keys)
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    with pytest.raises(ConfigError, match="has no place in a data file") as caught:
        get("cifar10", tmp_path)
    assert caught.value.key == str(folder / "data_batch_2")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(("content", "message"), [
    ({"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1]}, "3, one for each"),
    ({"data": np.zeros((3, 3071), np.uint8), "labels": [0, 1, 2]}, "uint8 images"),
    ({"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 10]}, "labels 0 to 10"),
    ({"labels": [0, 1, 10]}, "keys data and labels"),
    ([1], "pickled dict"),
])
def test_bad_cifar10_batches(tmp_path: Path, content: object, message: str) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    make_cifar(folder, write_text_keys)
    (folder / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(ConfigError, match=message) as caught:
        get("cifar10", tmp_path)
    assert caught.value.key == str(folder / "test_batch")


def test_truncated_cifar10_batches(tmp_path: Path) -> None:
    for name, write in (("cifar-10-batches-py/data_batch_3", write_text_keys),
                        ("cifar-10-batches-bin/data_batch_3.bin", write_binary)):
        path = tmp_path / name
        make_cifar(path.parent, write)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ConfigError, match="truncated or corrupt") as caught:
            get("cifar10", tmp_path)
        assert caught.value.key == str(path)
        shutil.rmtree(path.parent)


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
