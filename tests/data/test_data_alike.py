"""What ranks have read is compared: what differs is found, and what may differ is let through."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from hvd_hetero.data import MapSource, TensorSource, as_source
from hvd_hetero.data.alike import FEW, MANY, check_alike, facts_of, facts_of_stream
from hvd_hetero.data.stream import StreamSource
from hvd_hetero.errors import ConfigError

HOSTS = ["a", "a", "b"]
N = 200
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 7
IMAGES = torch.randint(255, (N, 400), generator=torch.Generator().manual_seed(0)).byte()
NAMES = [f"/data/{i}.png" for i in range(N)]


def difference(one: Any, other: Any, split: str = "test") -> str | None:
    """What ranks say of a split that rank 2 has read otherwise than the others; as it comes over the network."""
    same = facts_of(as_source("data", (X, Y)))
    facts = [{"training": same, split: facts_of(as_source("data", s))} for s in (one, one, other)]
    try:
        check_alike(json.loads(json.dumps(facts)), HOSTS)
    except ConfigError as error:
        return str(error)
    return None


class Rows(Dataset):
    """Items as a function makes them of their number."""

    def __init__(self, make: Callable[[int], Any], count: int = N, **attributes: Any) -> None:
        self.make, self.count = make, count
        vars(self).update(attributes)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.make(i)


class Custom:
    """A source of a user's own, whose inputs are a function of numbers and of the generator."""

    def __init__(self, make: Callable[[Any, torch.Generator], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return N

    def to(self, device: Any) -> Custom:
        return self

    def batches(self, indices: Any, generator: torch.Generator) -> Iterator[Any]:
        for row in indices:
            yield self.make(row, generator), Y[row]


ONE = 1 << 60
ITEMS = list(zip(X, Y.tolist(), strict=True))
CHANGED = Y.clone()
CHANGED[100] = 6 - CHANGED[100]
FLIPPED = X.flip(0)
UNSEEDED = np.random.default_rng()


@pytest.mark.parametrize(("one", "other", "output"), [
    ((X, Y), (X[:-3], Y[:-3]), "197 samples: rank 2 on b has read so many, rank 0 on a 200"),
    ((X, Y), (X, CHANGED), "targets: rank 2 on b has read other ones than rank 0 on a"),
    ((X, Y), (X.flip(0), Y), "inputs of sample 0: rank 2"),
    ((X, Y), (X.double(), Y), "inputs of sample 0"),
    ((X, Y), (torch.cat([X[:-1], X[:1]]), Y), f"inputs of sample {N - 1}"),
    ((X, X[:, 0]), (X, FLIPPED[:, 0]), "targets"),
    ((X, {"a": Y, "b": Y}), (X, {"a": Y, "b": CHANGED}), "targets"),
    (({"a": X, "b": Y}, Y), ({"b": Y, "a": X}, Y), "inputs of sample 0"),
    (TensorDataset(X, Y), TensorDataset(X, CHANGED), "targets"),
    (Subset(TensorDataset(X, Y), range(100)), Subset(TensorDataset(X, Y), range(1, 101)), "indices"),
    (ConcatDataset([TensorDataset(X, Y), TensorDataset(X, Y)]), ConcatDataset([TensorDataset(X, Y)] * 2), None),
    (ConcatDataset([TensorDataset(X, Y)] * 2), ConcatDataset([TensorDataset(X, CHANGED), TensorDataset(X, Y)]),
     "dataset1.targets"),
    (ITEMS, [*ITEMS[:100], (X[100], 3), *ITEMS[101:]], "targets"),
    (Rows(lambda i: (X[i], 0), y=Y), Rows(lambda i: (X[i], 0), y=CHANGED), "y: rank 2"),
    (Rows(len, dataset=Rows(len, y=Y)), Rows(len, dataset=Rows(len, y=CHANGED)), "dataset.y: rank 2"),
    (Rows(lambda i: (X[i], 0), targets=Y), Rows(lambda i: (X[i], 0), targets=CHANGED), "targets"),
    (Rows(lambda i: (X[i], 0), labels=Y.tolist()), Rows(lambda i: (X[i], 0), labels=CHANGED.tolist()), "labels"),
    (Rows(lambda i: (X[i], i % 7)), Rows(lambda i: (X[i], (i + 1) % 7)), "target of sample 0"),
    (Rows(lambda i: (X[i], i % 7)), Rows(lambda i: (X[-1 - i], i % 7)), "inputs of sample 0"),
    (Rows(lambda i: (i, 0.5)), Rows(lambda i: (i, 0.6)), "target of sample 0"),
    (Rows(lambda i: ({"a": [X[i]], "n": i}, 0)), Rows(lambda i: ({"a": [X[i]], "n": -i}, 0)), "inputs of sample 199"),
    (Rows(lambda i: (f"text {i}", 0)), Rows(lambda i: (f"text {i}!", 0)), "inputs of sample 0"),
    (Rows(lambda i: (NAMES[i], X[i], 0)), Rows(lambda i: ("/mnt" + NAMES[i], X[i], 0)), None),
    (Rows(lambda i: (b"a", 0)), Rows(lambda i: (b"b", 0)), "inputs of sample 0"),
    (Rows(lambda i: (torch.tensor(i, dtype=torch.uint8), 0)), Rows(lambda i: (torch.tensor(0).byte(), 0)), "inputs of"),
    (Rows(lambda i: (X[i], 0)), Rows(lambda i: {"x": X[i], "label": 0}), "inputs of sample 0"),
    (Rows(lambda i: {"x": X[i], "label": 0}), Rows(lambda i: UserDict(x=X[i], label=0)), None),
    (Rows(lambda i: (X[i], torch.tensor([i, ONE]))), Rows(lambda i: (X[i], torch.tensor([i, ONE + 1]))), "target of"),
    (Rows(lambda i: (X[i], 0)), Rows(lambda i: open(f"/none/{i}")), "of sample 0 (cannot be read: FileNotFoundError)"),
    (Rows(lambda i: open(f"/none/{i}")), Rows(lambda i: open(f"/none/{i}")), None),
    (Rows(lambda i: 1 / 0), Rows(lambda i: open(f"/none/{i}")), "cannot be read"),
    (Custom(lambda row, g: X[row]), Custom(lambda row, g: FLIPPED[row]), "inputs of sample 0"),
    (Custom(lambda row, g: X[row] + torch.rand(1, generator=g)), Custom(lambda row, g: X[row]), "inputs of sample 0"),
], ids=str)  # fmt: skip
def test_what_differs_is_told(one: Any, other: Any, output: str | None) -> None:
    for split in ("training", "test"):
        found = difference(one, other, split)
        if output is None:
            assert found is None
        else:
            assert found is not None and found.startswith(f"{split} data=") and output in found
            assert "rank 2 on b" in found and "rank 0 on a" in found and "seed what shuffles" in found
        assert difference(one, one, split) is None or one is not other


def augmented(i: int) -> Any:
    noise = torch.rand(3) + np.random.rand() + random.random()
    return X[i] + noise, i % 7


def unseeded(i: int) -> Any:
    return X[i] + torch.from_numpy(UNSEEDED.random(3)), i % 7


@pytest.mark.parametrize(("one", "other"), [
    (Rows(augmented), Rows(augmented)),
    (Rows(unseeded), Rows(unseeded)),
    (Rows(lambda i: (X[i], UNSEEDED.random())), Rows(lambda i: (X[i], UNSEEDED.random()))),
    (Custom(lambda row, g: torch.rand(1, 3)), Custom(lambda row, g: torch.rand(1, 3))),
    (Custom(lambda row, g: torch.rand(1, 3, generator=g)), Custom(lambda row, g: torch.rand(1, 3, generator=g))),
    ((X, Y), (X * (1 + 1e-6), Y)),
    ((X, X[:, 0]), (X, X[:, 0] + 1e-6)),
    ((torch.full_like(X, torch.nan), Y), (torch.full_like(X, torch.nan), Y)),
    ((X.to(torch.complex64), Y), (X.to(torch.complex64), Y)),
    (Rows(lambda i: (X[i].half().to_sparse(), object() is None, i)),) * 2,
    (Rows(lambda i: (IMAGES[i], 0)), Rows(lambda i: (torch.cat([IMAGES[i, :-1], IMAGES[i, -1:] + 1]), 0))),
    (MapSource([(X[i], 0) for i in range(N)], collate=lambda items: (object(), {1}, 0)),) * 2,
    ([(X[0], 0)], [(X[0], 0)]),
], ids=str)  # fmt: skip
def test_what_may_differ_is_let_through(one: Any, other: Any) -> None:
    """Randomness that nobody can seed, and what processors and libraries compute a little differently."""
    assert difference(one, other) is None


def test_unseeded_inputs_do_not_hide_other_targets() -> None:
    assert "target of sample 0" in str(difference(Rows(unseeded), Rows(lambda i: (unseeded(i)[0], 8))))


def test_augmentation_that_is_seeded_does_not_hide_other_inputs() -> None:
    found = difference(Rows(augmented), Rows(lambda i: (augmented(i)[0] + i, i % 7)))
    assert found is not None and "inputs of sample" in found


def test_looking_leaves_no_trace() -> None:
    """Neither in random states nor in worker processes."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    for source in (MapSource(Rows(augmented), workers=2), Custom(lambda row, g: torch.rand(1, 3))):
        assert len(facts_of(source)["samples"]) >= FEW
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert not multiprocessing.active_children()


def test_a_million_samples_are_told_in_little() -> None:
    count = 1_000_000
    targets = torch.arange(count)
    sources = [
        TensorSource(torch.zeros(count, 2), targets), as_source("data", Rows(lambda i: (i, i), count, targets=targets)),
        TensorSource(torch.zeros(count, 2), torch.rand(count, 40)),
    ]  # fmt: skip
    for source in sources:
        facts = facts_of(source)
        assert FEW <= len(facts["samples"]) <= MANY and len(json.dumps(facts)) < 20_000
        assert facts["numbers"][:2] == [0, count - 1] and len(set(facts["numbers"])) == MANY
    assert facts_of(TensorSource(torch.zeros(0, 2), targets[:0]))["numbers"] == []


def test_files_are_not_told_apart_by_their_folder(tmp_path: Path) -> None:
    """Hosts may keep them in folders of their own."""
    assert difference(Rows(lambda i: (str(tmp_path / f"{i}"), 0)), Rows(lambda i: (f"/elsewhere/{i}", 0))) is None


def test_streams_are_told_apart_by_what_comes_first() -> None:
    """Each rank reads a stream by itself and takes its own part of it."""
    def stream(make: Callable[[int], Any]) -> StreamSource:
        return StreamSource([make(i) for i in range(9)], 9, None, seed=3)

    def shuffled(i: int) -> Any:
        return torch.rand(3), random.random(), np.random.rand()

    one, other = stream(shuffled), stream(shuffled)
    first, second = ({"training": json.loads(json.dumps(facts_of_stream(s)))} for s in (one, other))
    with pytest.raises(ConfigError, match="inputs of sample 0: rank 1 on b has read other ones than rank 0 on a"):
        check_alike([first, second], ["a", "b"])
    same = [{"training": facts_of_stream(stream(lambda i: (X[i], i)))} for _ in range(2)]
    check_alike(same, ["a", "b"])
    taken = next(one.batches(np.arange(4)[None], torch.Generator()))[0]
    assert torch.equal(taken[0][0], one._stream[0][0]), "nothing of it is lost"  # type: ignore[index]


def test_nothing_is_the_same_as_nothing() -> None:
    """An array without columns has no mean."""
    class Table(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.numbers = np.zeros((5, 0), np.float32)

        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return torch.ones(2), i % 2

    facts = [{"training": facts_of(as_source("data", Table()))} for _ in range(2)]
    check_alike(facts, ["a", "b"])
