"""Named datasets: official files that the tests make, real files where there are some, and bad files."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from hvd_hetero.data import Dataset, load
from hvd_hetero.data.split import Split, Splits, adapt
from hvd_hetero.errors import ConfigError

REAL = os.environ.get("HVD_HETERO_DATA")
real_data = pytest.mark.skipif(not REAL, reason="HVD_HETERO_DATA does not name a folder with real data")
RNG = np.random.default_rng(0)


def get(name: str, root: Path | str | None, **args: object) -> Dataset:
    return load(name, None if root is None else str(root), None, args, workers=0, seed=0)


def everything(source: object) -> tuple[torch.Tensor, torch.Tensor]:
    return source.inputs, source.targets  # type: ignore[attr-defined]  # the tests know it is in memory


# digits and what every named dataset takes -----------------------------------------------------------------


def test_digits_are_split_alike_in_every_class_and_always_the_same() -> None:
    first, second = get("digits", None), get("digits", None)
    inputs, targets = everything(first.train)
    assert len(first.train) + len(first.test) == 1797 and inputs.shape[1:] == (1, 8, 8)
    assert inputs.dtype == torch.float32 and inputs.min() == 0 and inputs.max() == 1
    share = torch.bincount(targets) / (torch.bincount(targets) + torch.bincount(everything(first.test)[1]))
    assert ((share - 0.8).abs() < 0.005).all()
    assert torch.equal(targets, everything(second.train)[1])
    rows = {tuple(x.flatten().tolist()) for x in inputs}
    assert not any(tuple(x.flatten().tolist()) in rows for x in everything(first.test)[0][:50])


def made(count: int = 60) -> Splits:
    train = Split(torch.arange(count), torch.arange(count) % 3)
    return Splits(train, Split(torch.tensor([-1]), torch.tensor([0])))


def test_validation_split_is_stratified_seeded_and_leaves_the_test_set_out() -> None:
    splits = adapt(made(), seed=4, validation=0.2)
    assert torch.bincount(splits.test.targets).tolist() == [4, 4, 4]
    assert sorted([*splits.train.inputs.tolist(), *splits.test.inputs.tolist()]) == list(range(60))
    assert torch.equal(splits.test.inputs % 3, splits.test.targets)
    assert torch.equal(splits.test.inputs, adapt(made(), seed=4, validation=0.2).test.inputs)
    assert not torch.equal(splits.test.inputs, adapt(made(), seed=5, validation=0.2).test.inputs)


def test_label_noise_changes_the_share_of_training_targets_it_says() -> None:
    splits = adapt(made(), seed=4, label_noise=0.25)
    assert int((splits.train.targets != torch.arange(60) % 3).sum()) == 15
    assert set(splits.train.targets.tolist()) == {0, 1, 2}
    assert splits.test.targets.tolist() == [0]


def test_limits_keep_the_first() -> None:
    data, small = get("digits", None), get("digits", None, train_limit=20, test_limit=10_000)
    assert torch.equal(everything(small.train)[0], everything(data.train)[0][:20])
    assert len(small.test) == len(data.test)


@pytest.mark.parametrize(("name", "args", "key", "message"), [
    ("digit", {}, "data.name", "did you mean 'digits'"),
    ("digits", {"train_limits": 3}, "data.args.train_limits", "did you mean 'train_limit'"),
    ("digits", {"train_limit": 0}, "data.args.train_limit", "at least 1"),
    ("digits", {"train_limit": "few"}, "data.args.train_limit", "type str"),
    ("digits", {"validation": 1.0}, "data.args.validation", "not a share"),
    ("digits", {"validation": 0.0001}, "data.args.validation", "empty"),
    ("digits", {"root": "x"}, "data.args.root", "set data.root"),
    ("cifar10", {}, "data.root", "read from files"),
])
def test_bad_names_and_arguments(name: str, args: dict, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(name, None, None, args, workers=0, seed=0)
    assert caught.value.key == key


@pytest.mark.parametrize(("name", "wanted"), [("fashion_mnist", "train-images-idx3-ubyte"),
                                             ("cifar10", "cifar-10-batches-py")])
def test_missing_files_are_named(tmp_path: Path, name: str, wanted: str) -> None:
    for root, message in ((tmp_path, "no such dataset"), (tmp_path / "nowhere", "not a folder")):
        with pytest.raises(ConfigError, match=message) as caught:
            get(name, root)
        assert caught.value.key == "data.root" and wanted in caught.value.remedy


# Fashion-MNIST ---------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = struct.pack(f">i{array.ndim}i", 0x0800 + array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def make_fashion(folder: Path, ending: str) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    arrays = {}
    for split, count in (("train", 12), ("t10k", 5)):
        arrays[split] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte{ending}", arrays[split])
        write_idx(folder / f"{split}-labels-idx1-ubyte{ending}", np.arange(count, dtype=np.uint8) % 10)
    return arrays


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "fashion-mnist", "."])
def test_fashion_mnist_files_packed_or_not_here_or_below(tmp_path: Path, ending: str, folder: str) -> None:
    arrays = make_fashion(tmp_path / "root" / folder, ending)
    data = get("fashion_mnist", tmp_path / "root")
    for source, split in ((data.train, "train"), (data.test, "t10k")):
        inputs, targets = everything(source)
        assert np.array_equal(inputs.squeeze(1).numpy(), arrays[split])
        assert targets.tolist() == [i % 10 for i in range(len(arrays[split]))]
    images, _ = next(data.train.batches(np.array([[2, 1]]), torch.Generator()))
    expected = (arrays["train"][[2, 1]] / 255.0 - 0.2860) / 0.3530
    assert np.allclose(images.squeeze(1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("change", "message"), [
    (lambda raw: raw[:-100], "bytes for"),
    (lambda raw: raw[:7], "idx header"),
    (lambda raw: b"\0\0\x08\x01" + raw[4:], "magic number 0x0801"),
])
def test_bad_fashion_mnist_images(tmp_path: Path, change: object, message: str) -> None:
    make_fashion(tmp_path / "raw", "")
    path = tmp_path / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]  # pytest's parameters have no type
    with pytest.raises(ConfigError, match=message) as caught:
        get("fashion_mnist", tmp_path)
    assert caught.value.key == str(path)


def test_bad_fashion_mnist_gzip_and_labels(tmp_path: Path) -> None:
    make_fashion(tmp_path / "raw", ".gz")
    images, labels = (tmp_path / "raw" / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    whole = images.read_bytes()
    images.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="EOFError") as caught:
        get("fashion_mnist", tmp_path)
    assert caught.value.key == str(images)
    images.write_bytes(whole)
    for wrong, message in (([0] * 11, "12, one for each"), ([10] * 12, r"0 \.\. 9")):
        write_idx(labels, np.array(wrong, np.uint8))
        with pytest.raises(ConfigError, match=message):
            get("fashion_mnist", tmp_path)


@real_data
def test_real_fashion_mnist() -> None:
    data = get("fashion_mnist", REAL)
    inputs, targets = everything(data.train)
    assert torch.bincount(targets).tolist() == [6000] * 10 and len(data.test) >= 8000
    assert inputs.float().mean() / 255 == pytest.approx(0.28604, abs=1e-4)


# CIFAR-10 --------------------------------------------------------------------------------------------------


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
    images, _ = next(data.train.batches(np.array([[4]]), torch.Generator()))
    expected = (pixels[4, 0] / 255 - 0.4914) / 0.2470
    assert np.allclose(images[0, 0].numpy(), expected, atol=1e-5)


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
    first = next(data.train.batches(np.arange(64)[None], torch.Generator().manual_seed(1)))[0]
    again = next(data.train.batches(np.arange(64)[None], torch.Generator().manual_seed(1)))[0]
    assert torch.equal(first, again) and first.shape == (64, 3, 32, 32)
