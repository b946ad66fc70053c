"""Sources: batches by index, augmentation from one generator, and the wrapping of users' own data."""

from __future__ import annotations

import multiprocessing
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from hvd_hetero.data import Files, MapSource, TensorSource, as_source, load, targets_of
from hvd_hetero.data.augment import CenterCrop, Normalize, RandomCropFlip
from hvd_hetero.errors import ConfigError

ROWS = np.array([[3, 0], [7, 7], [1, 9]])
PLAIN = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_tensor_source_cuts_rows_of_tensors_tuples_and_dicts() -> None:
    values, targets = torch.arange(20.0).view(10, 2), torch.arange(10)
    for inputs, read in [
        (values, lambda batch: batch),
        ((values, -values), lambda batch: -batch[1]),
        ({"a": values, "b": targets}, lambda batch: batch["a"]),
    ]:
        batches = list(TensorSource(inputs, targets).to("cpu").batches(ROWS, generator()))
        assert len(batches) == 3
        for row, (batch, target) in zip(ROWS, batches, strict=True):
            assert target.tolist() == row.tolist()
            assert torch.equal(read(batch), values[torch.from_numpy(row)])


def test_tensor_source_refuses_unequal_lengths() -> None:
    with pytest.raises(ConfigError, match="3 inputs but 2 targets"):
        TensorSource(torch.zeros(3, 1), torch.zeros(2))


class Noisy(Dataset):
    """Items with randomness from all three generators that people use."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        return torch.tensor([i, torch.rand(()).item(), np.random.rand(), random.random()]), -i, i


def read(source: MapSource, seed: int) -> list[torch.Tensor]:
    return [torch.cat([x, y[:, None], t[:, None]], 1) for (x, y), t in source.batches(ROWS, generator(seed))]


def test_targets_are_at_hand_where_batches_have_them_as_they_are() -> None:
    class Own(TensorSource):
        """Its batches may be anything."""

    inputs, targets = torch.zeros(3, 1), torch.arange(3)
    files = Files(np.array(["a", "b", "c"]), targets, lambda name: inputs[0])
    assert targets_of(TensorSource(inputs, targets).to("cpu")) is targets and targets_of(MapSource(files)) is targets
    for other in (Own(inputs, targets), TensorSource(inputs, {"a": targets}), MapSource(files, collate=lambda x: x),
                  MapSource(TensorDataset(inputs, targets))):  # fmt: skip
        assert targets_of(other) is None


def test_map_source_gives_the_same_batches_for_any_number_of_workers() -> None:
    random.seed(5)
    before = random.getstate()
    alone, parallel = MapSource(Noisy()), MapSource(Noisy(), workers=2)
    first = read(alone, 1)
    assert [b[:, 5].tolist() for b in first] == ROWS.tolist()
    assert all(torch.equal(b[:, 4], -b[:, 5]) for b in first)
    for seed in (1, 2):  # the second time, the workers have been alive before
        for a, b in zip(read(alone, seed), read(parallel, seed), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(read(parallel, 1)[0], read(parallel, 2)[0])
    assert len({tuple(row[1:4].tolist()) for batch in first for row in batch}) == ROWS.size
    assert random.getstate() == before


def test_map_source_starts_anew_after_an_unfinished_iteration() -> None:
    source = MapSource(Noisy(), workers=1)
    next(source.batches(np.tile(ROWS, (5, 1)), generator()))
    assert [b[:, 5].tolist() for b in read(source, 1)] == ROWS.tolist()


def test_map_source_that_moves_leaves_no_workers_behind() -> None:
    source = MapSource(Noisy(), workers=1)
    read(source, 1)
    assert len(multiprocessing.active_children()) == 1
    moved = source.to("meta")
    assert not multiprocessing.active_children() and len(moved) == len(source)


class Dicts(Noisy):
    def __init__(self, key: str) -> None:
        self.key = key

    def __getitem__(self, i: int) -> dict[str, int]:  # type: ignore[override]  # another kind of item on purpose
        return {"words": i + 1, "mask": 1, self.key: i}


def test_map_source_takes_the_target_out_of_a_dict() -> None:
    for key in ("labels", "label"):
        inputs, targets = next(MapSource(Dicts(key)).batches(ROWS, generator()))
        assert sorted(inputs) == ["mask", "words"]
        assert targets.tolist() == ROWS[0].tolist() == [i - 1 for i in inputs["words"].tolist()]
    with pytest.raises(ConfigError, match="'labels' or 'label'"):
        next(MapSource(Dicts("answer")).batches(ROWS, generator()))


def test_random_crop_and_flip_gives_what_slicing_gives() -> None:
    images = torch.randint(0, 256, (64, 3, 6, 6), dtype=torch.uint8)
    out = RandomCropFlip(6, padding=2, then=PLAIN)(images, generator(3)) * 255
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2)).float()
    seen = set()
    for image, result in zip(padded, out, strict=True):
        matches = [(top, left, flip) for top in range(5) for left in range(5) for flip in (False, True)
                   if torch.allclose(window(image, top, left, 6, flip), result, atol=1e-3)]
        assert len(matches) == 1, "each result is exactly one window of its own image"
        seen.add(matches[0])
    assert {t for t, _, _ in seen} == set(range(5)) and {c for _, c, _ in seen} == set(range(5))
    assert {f for _, _, f in seen} == {False, True}


def window(image: torch.Tensor, top: int, left: int, size: int, flip: bool) -> torch.Tensor:
    cut = image[:, top:top + size, left:left + size]
    return cut.flip(-1) if flip else cut


def test_augmentation_follows_the_generator_alone() -> None:
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    source = TensorSource(images, torch.arange(10), RandomCropFlip(8, padding=4, then=PLAIN))

    def run(seed: int) -> torch.Tensor:
        return torch.cat([x for x, _ in source.batches(np.arange(10).reshape(2, 5), generator(seed))])

    first = run(1)
    torch.rand(7)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


def test_normalize_and_center_crop() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 10), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
    out = CenterCrop(4, Normalize(mean, std).to("cpu"))(images, generator())
    cut = images[:, :, 2:6, 3:7].double() / 255
    expected = (cut - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_own_data_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_data_file.py").write_text(
        "import torch\n"
        "def pair(n):\n    return torch.zeros(n, 2), torch.ones(n)\n"
        "def tensors(n=4):\n    return pair(n), pair(2)\n"
        "def mixed():\n    return [(torch.zeros(1), 0)] * 6, pair(2)\n"
        "def one():\n    return 3\n"
        "def no_splits():\n    return 3, 4\n")
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    data = load(None, None, "my_data_file:tensors", {"n": 7}, workers=0, seed=0)
    assert isinstance(data.train, TensorSource) and (len(data.train), len(data.test)) == (7, 2)
    mixed = load(None, None, "my_data_file:mixed", {}, workers=0, seed=0)
    assert isinstance(mixed.train, MapSource) and len(mixed.train) == 6
    with pytest.raises(ConfigError, match="returned int"):
        load(None, None, "my_data_file:one", {}, workers=0, seed=0)
    with pytest.raises(ConfigError, match="map-style dataset or tensors"):
        load(None, None, "my_data_file:no_splits", {}, workers=0, seed=0)
    with pytest.raises(ConfigError, match="unknown argument; known are n"):
        load(None, None, "my_data_file:tensors", {"m": 7}, workers=0, seed=0)


def test_as_source_knows_tensor_datasets_arrays_and_sources() -> None:
    tensors = as_source("data", TensorDataset(torch.zeros(4, 1), torch.ones(4, 1), torch.arange(4)))
    assert isinstance(tensors, TensorSource) and isinstance(tensors.inputs, tuple)
    arrays = as_source("data", (np.zeros((4, 2), np.float32), np.arange(4)))
    assert isinstance(arrays, TensorSource) and arrays.targets.tolist() == [0, 1, 2, 3]
    assert as_source("data", arrays) is arrays
