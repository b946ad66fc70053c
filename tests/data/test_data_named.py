"""Named datasets: what all have in common, digits, MNIST and Fashion-MNIST from made and from real files."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import REAL, everything, get, real_data
from published_files import idx, make_mnist

from hvd_hetero.data import load
from hvd_hetero.data.images import _digits
from hvd_hetero.data.split import Split, Splits, adapt
from hvd_hetero.errors import ConfigError

# Digits and what every named dataset takes -----------------------------------------------------------------


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, numbers = _digits()
    theirs = datasets.load_digits(return_X_y=True)
    assert np.array_equal(pixels, theirs[0]) and np.array_equal(numbers, theirs[1])


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


def test_limits_spread_over_the_split() -> None:
    splits = adapt(made(), seed=0, train_limit=6, test_limit=10_000)
    assert splits.train.inputs.tolist() == [0, 10, 20, 30, 40, 50]
    assert len(splits.test.targets) == 1


@pytest.mark.parametrize(("name", "args", "key", "message"), [
    ("digit", {}, "data.name", "did you mean 'digits'"),
    ("digits", {"train_limits": 3}, "data.args.train_limits", "did you mean 'train_limit'"),
    ("digits", {"train_limit": 0}, "data.args.train_limit", "at least 1"),
    ("digits", {"train_limit": "few"}, "data.args.train_limit", "type str"),
    ("digits", {"validation": 1.0}, "data.args.validation", "not a share"),
    ("digits", {"validation": 0.0001}, "data.args.validation", "empty"),
    ("digits", {"root": "x"}, "data.args.root", "set data.root"),
    ("cifar10", {"download": True}, "data.args.download", "set data.download"),
    ("cifar10", {}, "data.root", "read from files"),
])
def test_bad_names_and_arguments(name: str, args: dict, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(name, "/" if "download" in args else None, None, args, workers=0, seed=0)
    assert caught.value.key == key


@pytest.mark.parametrize(("name", "wanted", "can_download"), [
    ("mnist", "MNIST/raw", True), ("fashion_mnist", "FashionMNIST/raw", True), ("cifar10", "cifar-10-batches-py", True),
    ("cifar100", "cifar-100-python", True), ("flowers102", "setid.mat", True),
    ("tiny_imagenet", "val_annotations.txt", False), ("image_folder", "train and val", False),
])
def test_a_missing_dataset_is_told_with_the_folder_and_what_to_do(
    tmp_path: Path, name: str, wanted: str, can_download: bool
) -> None:
    for root, message in ((tmp_path, "no such dataset"), (tmp_path / "nowhere", "not a folder")):
        with pytest.raises(ConfigError, match=message) as caught:
            get(name, root)
        assert (caught.value.key, caught.value.value) == ("data.root", str(root))
        for part in (wanted, "HVD_HETERO_DATA=FOLDER", *(["data.download=true"] if can_download else [])):
            assert part in caught.value.remedy
        assert ("data.download" in caught.value.remedy) is can_download


# MNIST and Fashion-MNIST -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "made", "ending", "below"), [
    ("mnist", "MNIST/raw", "", ""), ("mnist", "MNIST/raw", "", "MNIST"), ("mnist", "MNIST/raw", "", "MNIST/raw"),
    ("fashion_mnist", "FashionMNIST/raw", "", ""), ("fashion_mnist", "FashionMNIST/raw", "", "FashionMNIST/raw"),
    ("fashion_mnist", "fashion-mnist", ".gz", ""), ("fashion_mnist", "fashion-mnist", ".gz", "fashion-mnist"),
])
def test_mnist_files_here_or_below(tmp_path: Path, name: str, made: str, ending: str, below: str) -> None:
    arrays = make_mnist(tmp_path / made, ending)
    data = get(name, tmp_path / below)
    for source, split in ((data.train, "train"), (data.test, "t10k")):
        inputs, targets = everything(source)
        assert np.array_equal(inputs.squeeze(1).numpy(), arrays[split])
        assert targets.tolist() == [i % 10 for i in range(len(arrays[split]))]
    images, _ = next(data.train.batches(np.array([[2, 1]]), torch.Generator()))
    mean, deviation = (0.1307, 0.3081) if name == "mnist" else (0.2860, 0.3530)
    assert np.allclose(images.squeeze(1).numpy(), (arrays["train"][[2, 1]] / 255.0 - mean) / deviation, atol=1e-5)


def test_packed_files_are_read_without_importing_torchvision(tmp_path: Path) -> None:
    """It takes a second on every rank."""
    make_mnist(tmp_path / "fashion-mnist", ".gz")
    code = f"import sys; from hvd_hetero.data import load; load('fashion_mnist', {str(tmp_path)!r}, None, {{}}); "
    done = subprocess.run([sys.executable, "-c", code + "print('torchvision' in sys.modules)"], capture_output=True,
                          text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


IMAGES = "train-images-idx3-ubyte"


@pytest.mark.parametrize("change", [lambda raw: raw[:-100], lambda raw: raw[:7], lambda raw: b"\x89PNG" + raw[4:]])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_bad_images(tmp_path: Path, ending: str, change: Callable[[bytes], bytes]) -> None:
    folder = tmp_path / ("fashion-mnist" if ending else "FashionMNIST/raw")
    make_mnist(folder, ending)
    path = folder / f"{IMAGES}{ending}"
    raw = path.read_bytes()
    path.write_bytes(gzip.compress(change(gzip.decompress(raw))) if ending else change(raw))
    with pytest.raises(ConfigError, match="truncated or corrupt") as caught:
        get("fashion_mnist", tmp_path)
    assert caught.value.key == str(path if ending else folder)


def test_bad_gzip_and_labels(tmp_path: Path) -> None:
    make_mnist(tmp_path, ".gz")
    images, labels = tmp_path / f"{IMAGES}.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="EOFError") as caught:
        get("fashion_mnist", tmp_path)
    assert caught.value.key == str(images)
    images.write_bytes(whole)
    make_mnist(tmp_path / "FashionMNIST" / "raw")
    published = tmp_path / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    for wrong, message in (([0] * 11, "12, one for each"), ([10] * 12, r"0 \.\. 9")):
        raw = idx(np.array(wrong, np.uint8))
        labels.write_bytes(gzip.compress(raw))
        published.write_bytes(raw)
        for root in (tmp_path, tmp_path / "FashionMNIST" / "raw"):
            with pytest.raises(ConfigError, match=message):
                get("fashion_mnist", root)
        published.parent.rename(tmp_path / "aside")  # the packed ones are read where there are no others
        with pytest.raises(ConfigError, match=message):
            get("fashion_mnist", tmp_path)
        (tmp_path / "aside").rename(published.parent)


@real_data
def test_real_fashion_mnist() -> None:
    data = get("fashion_mnist", REAL)
    inputs, targets = everything(data.train)
    assert torch.bincount(targets).tolist() == [6000] * 10 and len(data.test) >= 8000
    assert inputs.float().mean() / 255 == pytest.approx(0.28604, abs=1e-4)
