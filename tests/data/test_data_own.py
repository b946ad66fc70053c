"""The user's own splits: what is taken for one, and what is refused by its name, with what to give instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from hvd_hetero.data import MapSource, TensorSource, as_source, read
from hvd_hetero.errors import ConfigError

X, Y = torch.arange(12.0).view(6, 2), torch.arange(6)
ROW = np.array([[4, 1]])


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield X[0], 0


class SizedStream(Stream):
    def __len__(self) -> int:
        return 6


class Augmented(TensorDataset):
    def __getitem__(self, i: Any) -> Any:
        x, y = super().__getitem__(i)
        return x + 100, y


class Rows(Dataset):
    """Its length, or what raises when it is asked for."""

    def __init__(self, length: Any) -> None:
        self.length = length

    def __len__(self) -> int:
        if isinstance(self.length, Exception):
            raise self.length
        return self.length  # type: ignore[no-any-return]

    def __getitem__(self, i: int) -> Any:
        return X[i], Y[i]


class Unsized(Dataset):
    def __getitem__(self, i: int) -> Any:
        return X[i], Y[i]


class Table:
    """As pandas has tables and columns."""

    def __init__(self, values: Any) -> None:
        self.values = self.iloc = np.asarray(values)

    def __array__(self, *args: Any, **options: Any) -> Any:
        return self.values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, name: str) -> Any:
        raise KeyError(name)


class Half:
    def batches(self, indices: Any, generator: Any) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 6


ITEMS = [(x, int(y)) for x, y in zip(X, Y, strict=True)]


@pytest.mark.parametrize(("split", "kind"), [
    ((X, Y), TensorSource),
    ([X, Y], TensorSource),
    ((X.numpy(), Y.numpy()), TensorSource),
    ((X.numpy()[::-1][::-1], Y.numpy()), TensorSource),
    ((np.ma.masked_greater(X.numpy(), 99), Y), TensorSource),
    ((X, Y.tolist()), TensorSource),
    ((X.tolist(), Y.tolist()), TensorSource),
    ((Table(X), Table(Y)), TensorSource),
    (TensorDataset(X, Y), TensorSource),
    (ITEMS, MapSource),
    (tuple(ITEMS), MapSource),
    ([list(item) for item in ITEMS], MapSource),
    ([{"x": x, "label": y} for x, y in ITEMS], MapSource),
    (dict(enumerate(ITEMS)), MapSource),
    (Rows(6), MapSource),
    (Subset(TensorDataset(X, Y), range(6)), MapSource),
    (ConcatDataset([TensorDataset(X[:3], Y[:3]), ITEMS[3:]]), MapSource),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_what_is_a_split(split: Any, kind: Any) -> None:
    source = as_source("data", split)
    inputs, targets = next(read(source, ROW, torch.Generator()))
    assert isinstance(source, kind) and targets.tolist() == [4, 1]
    x = inputs["x"] if isinstance(inputs, dict) else inputs
    assert torch.equal(x, X[[4, 1]].to(x.dtype))


def test_a_file_that_is_mapped_to_be_read_is_a_split(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Nothing is said of it: to map one as private copies takes as much memory as it is long."""
    np.arange(12.0).tofile(tmp_path / "numbers")
    inputs = np.memmap(tmp_path / "numbers", np.float64, "r", shape=(4, 3))
    source = as_source("train_data", (inputs, torch.arange(4)))
    batch, _ = next(source.batches(np.array([[2, 0]]), torch.Generator()))
    assert batch.tolist() == [[6.0, 7.0, 8.0], [0.0, 1.0, 2.0]] and not recwarn.list


def test_two_items_are_a_dataset_and_no_pair() -> None:
    for items in (ITEMS[:2], tuple(ITEMS[:2])):
        source = as_source("data", items)
        assert isinstance(source, MapSource) and len(source) == 2


def test_a_dataset_with_items_of_its_own_is_asked_for_them() -> None:
    inputs, _ = next(read(as_source("data", Augmented(X, Y)), ROW, torch.Generator()))
    assert torch.equal(inputs, X[[4, 1]] + 100)


@pytest.mark.parametrize(("split", "words"), [
    (Stream(), ["=Stream: is an IterableDataset", "map-style"]),
    (SizedStream(), ["=SizedStream: is an IterableDataset", "map-style", "list(it)"]),
    (type("IterableDataset", (), {"__iter__": Stream.__iter__})(), ["is an IterableDataset"]),
    (DataLoader(Rows(6)), ["=DataLoader: ", "train.batch_size", "give its dataset", "collate"]),
    ((item for item in ITEMS), ["=generator: is an iterator", "list"]),
    (iter(ITEMS), ["is an iterator"]),
    (Table(X), ["=Table: is a table", "(inputs, targets)"]),
    (X, ["=[6, 2] float32: has no targets; give (inputs, targets)"]),
    (X.numpy(), ["=array [6, 2] float32: has no targets"]),
    (TensorDataset(X), ["=[6, 2] float32: has no targets"]),
    ((X, None), ["=([6, 2] float32, None): a tensor of inputs without one of targets"]),
    ((X, Y[:5]), ["=[6, 2] float32: 6 inputs but 5 targets"]),
    ((X, torch.tensor(3)), ["=[] int64: is no tensor of samples"]),
    (([[1.0]] * 5 + [[1.0, 2.0]], Y), ["data inputs=list of 6 [[1.0], [1.0], [1.0], [1.0], ...]: makes no tensor"]),
    ((X, np.array(["a"] * 6)), ["data targets=array [6] <U1: makes no tensor: TypeError"]),
    ((np.ma.masked_greater(X.numpy(), 3), Y), ["data inputs=array [6, 2] float32: has masked numbers"]),
    ((X, np.array([1, None] * 3)), ["data targets=array [6] object: makes no tensor"]),
    (({"a": X, "b": [Y, np.array(["a"] * 6)]}, Y), ["data inputs['b'][1]=array [6] <U1: makes no tensor"]),
    ({"train": ITEMS, "test": ITEMS}, ["={train: ", "by name", "one split"]),
    ({"x": X, "labels": Y}, ["={x: [6, 2] float32, labels: [6] int64}: is read by name"]),
    ("train", ["='train': not a split; give a map-style dataset"]),
    (3, ["=3: not a split"]),
    (None, ["=None: not a split"]),
    (Rows, ["=type: is a class", "call it: Rows(...)"]),
    (lambda: ITEMS, ["=function: not a split"]),
    (Unsized(), ["=Unsized: is a dataset without __len__"]),
    (Rows(ValueError("unknown")), ["='Rows': the length of this Rows cannot be told: ValueError: unknown", "__len__"]),
    (Rows("six"), ["cannot be told: TypeError"]),
    (Rows(-1), ["cannot be told: ValueError"]),
    (Half(), ["='Half': is a source without to; give it what hvd_hetero.data.Source lists"]),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_what_only_looks_like_one(split: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        as_source("data", split)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_a_remedy_promises_works() -> None:
    """A list of a stream, the dataset of a loader."""
    assert len(as_source("data", list(Stream()))) == 1
    loader = DataLoader(Rows(6), collate_fn=lambda items: items)
    assert len(as_source("data", MapSource(loader.dataset, collate=loader.collate_fn))) == 6
