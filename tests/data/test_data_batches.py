"""Batches of everything that people epoch around: made of items, taken apart, moved, counted, given to a model."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import default_collate

from hvd_hetero.data import MapSource, TensorSource, as_source, read
from hvd_hetero.data.batch import pinned, sample_counts, split_target, to_device
from hvd_hetero.data.collate import collate
from hvd_hetero.errors import ConfigError
from hvd_hetero.worker.forward import forward

ROWS = np.array([[3, 0], [7, 7], [1, 9]])


@dataclass(frozen=True)
class Record:
    image: Any
    label: Any
    name: str = "a"


class Labelled(NamedTuple):
    label: Any
    image: Any
    mask: Any


Pair = namedtuple("Pair", "left right")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rows(make: Any, count: int = 10, **options: Any) -> list[tuple[Any, Any]]:
    """The batches of a dataset of ``make(i)``."""
    return list(read(MapSource([make(i) for i in range(count)], **options), ROWS, generator()))


def first(make: Any, **options: Any) -> tuple[Any, Any]:
    return rows(make, **options)[0]


# ---- items ----------------------------------------------------------------------------------------------------------


def test_numbers_texts_and_none_of_an_item() -> None:
    inputs, targets = first(lambda i: {"x": torch.ones(2) * i, "name": f"img{i}.png", "mask": None, "n": i, "label": i})
    assert inputs.keys() == {"x", "name", "mask", "n"}
    assert inputs["name"] == ["img3.png", "img0.png"] and inputs["mask"] is None
    assert inputs["x"].tolist() == [[3, 3], [0, 0]] and inputs["n"].tolist() == targets.tolist() == [3, 0]
    (raw, flag), targets = first(lambda i: (b"%d" % i, i > 1, 0.5 * i))
    assert raw == [b"3", b"0"] and flag.tolist() == [True, False]
    assert targets.tolist() == [1.5, 0] and targets.dtype == torch.float32


@pytest.mark.parametrize(("target", "dtype"), [
    (lambda i: i, torch.int64),
    (lambda i: float(i), torch.float32),
    (lambda i: bool(i), torch.bool),
    (lambda i: np.int32(i), torch.int32),
    (lambda i: np.float64(i), torch.float64),
    (lambda i: np.bool_(i > 0), torch.bool),
    (lambda i: np.array([i], np.uint8), torch.uint8),
    (lambda i: torch.tensor(i, dtype=torch.float64), torch.float64),
    (lambda i: i if i else torch.tensor(i), torch.int64),
    (lambda i: torch.tensor(0.5 * i) if i else 0.0, torch.float32),
    (lambda i: [i, -i], torch.int64),
    (lambda i: [0.5 * i], torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("named", [False, True])
def test_targets_as_numbers_of_any_kind(target: Any, dtype: torch.dtype, named: bool) -> None:
    x = torch.zeros(1)
    _, targets = first(lambda i: {"x": x, "labels": target(i)} if named else (x, target(i)))
    assert isinstance(targets, Tensor) and targets.dtype == dtype and len(targets) == 2
    assert not targets[1].any()


def test_lists_of_numbers_are_vectors_as_in_rows_of_a_table() -> None:
    """torch's own default makes a list of columns of them."""
    inputs, targets = first(lambda i: {"input_ids": [i, i + 1, 5], "scores": [[0.5, 1], [2, 3]], "label": i})
    assert inputs["input_ids"].tolist() == [[3, 4, 5], [0, 1, 5]] and inputs["scores"].shape == (2, 2, 2)
    inputs, _ = first(lambda i: ([0.5, i], i))
    assert inputs.dtype == torch.float32 and inputs.tolist() == [[0.5, 3], [0.5, 0]]
    inputs, targets = first(lambda i: [0.5 * i, i])  # the item itself is none
    assert inputs.tolist() == [1.5, 0] and targets.tolist() == [3, 0]


def test_nested_containers_keep_their_class() -> None:
    x = torch.zeros(2)
    inputs, _ = first(lambda i: ((x, {"deep": [x, "t"]}), i))
    assert type(inputs) is tuple and type(inputs[1]["deep"]) is list and inputs[1]["deep"][1] == ["t", "t"]
    inputs, _ = first(lambda i: (Pair(x, i), i))
    assert type(inputs) is Pair and inputs.left.shape == (2, 2) and inputs.right.tolist() == [3, 0]
    inputs, _ = first(lambda i: ([x, x], i))
    assert type(inputs) is list and inputs[0].shape == (2, 2)
    for mapping in (OrderedDict, UserDict, MappingProxyType):
        inputs, _ = first(lambda i, kind=mapping: (kind({"x": x}), i))
        assert type(inputs) is mapping and inputs["x"].shape == (2, 2)
    inputs, _ = first(lambda i: (Record(x, i), i))
    assert type(inputs) is Record and inputs.label.tolist() == [3, 0] and inputs.name == ["a", "a"]


def test_named_entries_hold_the_target_by_its_name() -> None:
    x = torch.zeros(2)
    inputs, targets = first(lambda i: Record(x, i, f"n{i}"))
    assert inputs.keys() == {"image", "name"} and targets.tolist() == [3, 0]
    inputs, targets = first(lambda i: Labelled(i, x, x))
    assert type(inputs) is tuple and len(inputs) == 2 and targets.tolist() == [3, 0]
    for kind in (dict, UserDict, OrderedDict):
        inputs, targets = first(lambda i, kind=kind: kind({"x": x, "labels": i}))
        assert type(inputs) is dict and targets.tolist() == [3, 0]


@pytest.mark.parametrize(("make", "begins", "problem"), [
    (lambda i: None if i == 7 else (torch.zeros(1), i), "data item=None", "is not inputs and a target"),
    (lambda i: None if i == 0 else (torch.zeros(1), i), "data item=None", "is not inputs and a target"),
    (lambda i: (1, i) if i else {"x": 1, "label": i}, "data item={x: 1, label: 0}", "(1, 3) in another sample"),
    (lambda i: (torch.zeros(1 + i), i), "data item[0]=[1] float32", "[4] float32 in another sample"),
    (lambda i: {"x": None if i else torch.zeros(1), "label": i}, "data item['x']=[1] float32", "None in another"),
    (lambda i: {"x": 1, **({"y": 1} if i else {}), "label": i}, "data item=", "{x: 1, y: 1, label: 3} in another"),
    (lambda i: {"a": {"b": [torch.zeros(1)] * (i + 1)}, "label": i}, "data item['a']['b']=", "in another sample"),
    (lambda i: ([1.0] * (i + 1), i), "data item[0]=", "make no tensor: ValueError"),
    (lambda i: (Path("x"), i), "data item[0]=", "no batch is made of such objects"),
    (lambda i: (np.array(["a"]), i), "data item[0]=array [1] <U1", "make no tensor: TypeError"),
    (lambda i: (torch.zeros(1), 2**70), "data item[1]=11805", "make no tensor"),
    (lambda i: (Record(object(), i), i), "data item[0].image=object", "no batch is made"),
    (lambda i: (Pair(1, set()), i), "data item[0].right=", "no batch is made"),
    (lambda i: {"x": torch.zeros(1), "answer": i}, "data={x: [2, 1] float32, answer: [2] int64}", "no target"),
    (lambda i: (torch.zeros(1),), "data=([2, 1] float32)", "not a batch of inputs and targets"),
    (lambda i: torch.zeros(1), "data item=[1] float32", "is not inputs and a target"),
    (lambda i: "text", "data item='text'", "is not inputs and a target"),
])  # fmt: skip
def test_what_no_batch_can_be_made_of_is_told_by_its_entry(make: Any, begins: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rows(make)
    assert str(caught.value).startswith(begins) and problem in str(caught.value)
    assert "in the batch of the samples [" in str(caught.value)


def test_it_is_told_alike_by_a_worker_process() -> None:
    output = set()
    for workers in (0, 1):
        with pytest.raises(ConfigError) as caught:
            rows(lambda i: (torch.zeros(1 + i), "a", i), workers=workers)
        output.add(str(caught.value))
    assert output == {
        "data item[0]=[1] float32: [4] float32 in another sample of the batch, in the batch of the samples [3, 0]; "
        "make the items alike, or make batches of them yourself: hvd_hetero.data.MapSource(dataset, collate=...)"
    }


# ---- collate of one's own, batches and models -----------------------------------------------------------------------


class Encoding(UserDict):
    """As tokenizers give it; its method moves tensors only."""

    def to(self, device: Any) -> Encoding:
        self.moved = str(device)
        return Encoding({name: part.to(device) for name, part in self.items()})


class Bag:
    """An object that moves itself in place, and says nothing."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> None:
        self.x = self.x.to(device)

    def pin_memory(self) -> Bag:
        return self


@dataclass(frozen=True)
class Nodes:
    x: Tensor
    count: int = 3
    rest: Any = field(default=None)


X = torch.arange(6.0).view(2, 3)
SEQUENCES = [torch.ones(2, 3), torch.ones(1, 3)]


@pytest.mark.parametrize(("inputs", "read_x"), [
    (X, lambda *args, **kw: args[0]),
    ((X, "text", None, 3), lambda x, text, none, number: x if (text, none, number) == ("text", None, 3) else None),
    ({"x": X, "length": 17}, lambda x, length: x if length == 17 else None),
    (UserDict(x=X, names=["a"]), lambda x, names: x if names == ["a"] else None),
    (Encoding(x=X), lambda x: x),
    ([X, X], lambda one: one[1]),
    (Pair(X, "r"), lambda pair: pair.left if pair.right == "r" else None),
    (Nodes(X), lambda nodes: nodes.x if nodes.count == 3 else None),
    (Bag(X), lambda bag: bag.x),
    (MappingProxyType({"x": X}), lambda x: x),
    (pack_sequence(SEQUENCES), lambda packed: packed.data if isinstance(packed, PackedSequence) else None),
    ([{"x": X}, {"x": X}], lambda items: items[1]["x"]),
    ({"deep": [(X, {"y": X})]}, lambda deep: deep[0][1]["y"]),
], ids=lambda value: type(value).__name__ if not callable(value) else "")  # fmt: skip
def test_inputs_of_a_collate_reach_the_model(inputs: Any, read_x: Any) -> None:
    """Moved where they can be moved, on another device than before; as they are otherwise."""
    items = [(i, i) for i in range(10)]
    for device in ("cpu", "meta"):
        source = MapSource(items, collate=lambda batch: (inputs, torch.tensor([y for _, y in batch])), device=device)
        found, targets = next(read(source, ROWS, generator()))
        x = forward(read_x, found)
        assert x is not None and x.device.type == targets.device.type == device, type(inputs)
        assert device == "meta" or x.sum() == (15 if x.shape == X.shape else 9)


def test_what_moves_nothing_stays_the_same_object() -> None:
    inputs = {"x": X, "names": ["a"], "odd": {1, 2}}
    assert to_device(inputs, "cpu") is inputs
    assert to_device(Tensor, "cpu") is Tensor, "a class has methods too"


def test_a_method_that_fails_is_not_hidden() -> None:
    with pytest.raises(AttributeError, match="'str' object has no attribute 'to'"):
        to_device(Encoding(x="text"), "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_batches_for_a_gpu_are_pinned_and_keep_their_classes() -> None:
    def make(batch: Any) -> Any:
        return (X, Pair(X, "r"), [X], {"n": 1}, pack_sequence(SEQUENCES), Bag(X)), torch.tensor([y for _, y in batch])

    for workers in (0, 1):
        source = MapSource([(i, i) for i in range(10)], workers=workers, collate=make, device="cuda")
        found, targets = next(read(source, ROWS, generator()))
        assert type(found) is tuple and type(found[1]) is Pair and type(found[2]) is list
        on_gpu = (found[0], found[1].left, found[2][0], found[4].data, found[5].x, targets)
        assert all(part.is_cuda for part in on_gpu) and found[3] == {"n": 1}
    assert pinned({"x": X, "n": 1})["x"].is_pinned() and not X.is_pinned()
    assert pinned(X.to_sparse()).is_sparse and pinned(X.cuda()).is_cuda


def test_targets_of_any_kind_reach_the_loss() -> None:
    def boxes(batch: Any) -> Any:
        return [x for x, _ in batch], [{"boxes": torch.zeros(i, 4), "name": str(i)} for _, i in batch]

    inputs, targets = first(lambda i: (torch.zeros(1 + i), i), collate=boxes, device="meta")
    assert [x.device.type for x in inputs] == ["meta"] * 2 and targets[0]["name"] == "3"
    assert targets[0]["boxes"].device.type == "meta" and targets[0]["boxes"].shape == (3, 4)
    _, (number, text) = first(lambda i: (X, (i, "t")))
    assert number.tolist() == [3, 0] and text == ["t", "t"]
    _, targets = first(lambda i: (X, {"a": i, "b": 0.5}))
    assert targets["a"].tolist() == [3, 0]
    assert first(lambda i: (X, None))[1] is None
    _, targets = first(lambda i: (X, i), collate=lambda batch: (X, np.array([i for _, i in batch])))
    assert isinstance(targets, Tensor) and targets.tolist() == [3, 0]


def test_a_tuple_is_arguments_and_a_named_tuple_is_one() -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, *args: Any, **keywords: Any) -> None:
            seen.append((args, keywords))

    for inputs in ((1, 2), [1, 2], Pair(1, 2), {"a": 1}, UserDict(a=1), None, "text", ()):
        forward(Net(), inputs)
    assert seen == [
        ((1, 2), {}), (([1, 2],), {}), ((Pair(1, 2),), {}), ((), {"a": 1}), ((), {"a": 1}), ((None,), {}),
        (("text",), {}), ((), {}),
    ]  # fmt: skip


# ---- samples of a batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("targets", "counts"), [
    (torch.zeros(3, 9), {3}),
    (torch.tensor(1.0), set()),
    (np.zeros(4), {4}),
    ([1, 2, 3], {3}),
    (["a", "b"], {2}),
    ("text", set()),
    (None, set()),
    ((torch.zeros(4), torch.zeros(4, 2)), {2, 4}),
    ([torch.zeros(5, 4), torch.zeros(0, 4)], {2}),
    ([{"boxes": torch.zeros(5, 4)}, {"boxes": torch.zeros(1, 4)}], {2}),
    ({"a": torch.zeros(4), "b": ["x"] * 4, "scale": 2.0}, {4}),
    ({"a": torch.zeros(4), "b": torch.zeros(1)}, set()),
    (Nodes(torch.zeros(3)), {3}),
    (Pair(torch.zeros(6), None), {6}),
    (object(), set()),
])  # fmt: skip
def test_how_many_samples_targets_may_be_of(targets: Any, counts: set[int]) -> None:
    assert sample_counts(targets) == counts


def drop_none(items: list[Any]) -> Any:
    return default_collate([item for item in items if item is not None])


def with_first_twice(items: list[Any]) -> Any:
    return default_collate([items[0], *items])


def list_without_last(items: list[Any]) -> Any:
    return torch.zeros(2, 1), [y for _, y in items][:-1]


class Custom:
    """A source of a user's own, which knows of no later start."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return 10

    def to(self, device: Any) -> Custom:
        return self

    def batches(self, indices: Any, generator: torch.Generator) -> Iterator[Any]:
        return iter(self._batches)


@pytest.mark.parametrize(("source", "problem"), [
    (MapSource([None if i == 7 else (X, i) for i in range(10)], collate=lambda items: drop_none([*items, (X, 5)])),
     "3 targets: they came back for the batch of the 2 samples [3, 0]"),
    (MapSource([(X, i) for i in range(10)], collate=with_first_twice),
     "3 targets: they came back for the batch of the 2 samples [3, 0]"),
    (MapSource([(X, i) for i in range(10)], collate=list_without_last), "1 targets: "),
    (Custom([(X, torch.zeros(2))]), "1 batches: 3 were asked for; yield a batch for every row"),
    (Custom([(X, torch.zeros(1))]), "1 targets: they came back for the batch of the 2 samples [3, 0]"),
    (Custom([X]), "[2, 3] float32: no batch; yield (inputs, targets)"),
    (Custom([(X, X, X)]), "no batch; yield (inputs, targets)"),
])  # fmt: skip
def test_a_batch_that_is_not_what_was_asked_for(source: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list(read(source, ROWS, generator()))
    assert str(caught.value).startswith("training data=") and problem in str(caught.value)


def test_targets_of_all_samples_one_after_the_other_may_be_more() -> None:
    """Boxes of images, labels of the nodes of graphs: the loss has one number a sample all the same."""
    boxes = Custom([(torch.zeros(2, 3), torch.zeros(7, 6)), (torch.zeros(2, 3), torch.zeros(2, 6))])
    assert [len(targets) for _, targets in read(boxes, ROWS[:2], generator())] == [7, 2]


def test_a_collate_that_fails_is_named_with_the_samples() -> None:
    wrong = r"data collate=drop_none: makes no batch of \[None, None\]: IndexError: .*, in the batch of the samples \[3"
    with pytest.raises(ConfigError, match=wrong):
        next(read(MapSource([None] * 10, collate=drop_none), ROWS, generator()))


def test_it_is_seen_at_that_very_batch() -> None:
    """What was read before is good, with worker processes that have read ahead too."""
    items = [None if i == 7 else (torch.ones(1) * i, i) for i in range(10)]
    for workers in (0, 1):
        with pytest.raises(ConfigError, match=r"test data=1 targets: .* the 2 samples \[2, 7\]"):
            rows = torch.tensor([[3, 0], [1, 9], [2, 7], [5, 5]])
            batches = read(MapSource(items, workers, collate=drop_none), rows, generator(), split="test")
            assert [next(batches)[1].tolist() for _ in range(2)] == [[3, 0], [1, 9]]
            next(batches)


def test_reading_from_a_later_row() -> None:
    source = TensorSource(X.repeat(5, 1), torch.arange(10))
    assert [y.tolist() for _, y in read(source, ROWS, generator(), 1)] == ROWS[1:].tolist()


# ---- tensors in memory ----------------------------------------------------------------------------------------------


def test_tensor_source_with_targets_of_several_parts() -> None:
    targets = {"a": torch.arange(10), "b": (torch.zeros(10, 4),)}
    source = as_source("data", (torch.zeros(10, 1), targets)).to("cpu")
    found = next(read(source, ROWS, generator()))[1]
    assert found["a"].tolist() == [3, 0] and found["b"][0].shape == (2, 4)
    source = as_source("data", (torch.zeros(10, 1), (torch.arange(10), np.zeros(10))))
    found = next(read(source, ROWS, generator()))[1]
    assert isinstance(found, tuple) and found[1].dtype == torch.float64
    inputs: Mapping[str, Any] = UserDict(x=torch.zeros(10, 1))
    assert next(read(as_source("data", (inputs, np.arange(10))), ROWS, generator()))[0]["x"].shape == (2, 1)
    for bad in (torch.zeros(9), torch.tensor(1.0)):
        with pytest.raises(ConfigError, match="give"):
            TensorSource(torch.zeros(10, 1), {"a": torch.zeros(10), "b": bad})


def test_transformers_encodings_are_mappings() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    made = collate([transformers.BatchEncoding({"ids": [1, 2], "labels": i}) for i in range(3)])
    inputs, targets = split_target(made)
    assert inputs["ids"].shape == (3, 2) and targets.tolist() == [0, 1, 2]
    moved = to_device((transformers.BatchEncoding({"ids": torch.zeros(2, 2), "text": ["a"]}),), "meta")
    assert moved[0]["ids"].device.type == "meta" and moved[0]["text"] == ["a"]
