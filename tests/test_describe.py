"""What a message says of a value, whatever it is: short, on one line, and never an error of its own."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from hvd_hetero.describe import LENGTH, describe

Point = namedtuple("Point", "x y")


@dataclass
class Item:
    image: torch.Tensor
    name: str


class Raises:
    """Fails however it is looked at."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __len__ = __iter__ = __bool__ = __repr__  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no attributes")


class BadMapping(UserDict):
    def __iter__(self) -> Iterator[Any]:
        raise OSError("the disk is gone")


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


ITSELF: list[Any] = [1]
ITSELF.append(ITSELF)
IN_DICT: dict[str, Any] = {}
IN_DICT["again"] = (IN_DICT, IN_DICT)
ZERO = torch.zeros(4, 1)


@pytest.mark.parametrize(("value", "printed"), [
    (ZERO, "[4, 1] float32"),
    (torch.tensor(True), "[] bool"),
    (torch.zeros(2, 0, dtype=torch.bfloat16, device="meta"), "[2, 0] bfloat16"),
    (torch.eye(2).to_sparse(), "[2, 2] float32 sparse_coo"),
    (np.zeros((3, 2), np.int16), "array [3, 2] int16"),
    (np.array(["a", None], object), "array [2] object"),
    (np.float32(2.5), "2.5"),
    (None, "None"),
    (True, "True"),
    (17, "17"),
    (1e-9, "1e-09"),
    (2j, "2j"),
    ("a.png", "'a.png'"),
    ("", "''"),
    ("two\nlines", r"'two\nlines'"),
    ("x" * 90, "'" + "x" * 26 + "..."),
    (b"\x00\xff", r"b'\x00\xff'"),
    ({"x": ZERO, "name": "a"}, "{x: [4, 1] float32, name: 'a'}"),
    ({1: 2, (3, 4): 5}, "{1: 2, (3, 4): 5}"),
    (OrderedDict(x=1), "OrderedDict {x: 1}"),
    (UserDict(x=ZERO), "UserDict {x: [4, 1] float32}"),
    ([], "[]"),
    ((), "()"),
    ([ZERO, ZERO], "[[4, 1] float32, [4, 1] float32]"),
    ((ZERO, "a"), "([4, 1] float32, 'a')"),
    ({3}, "{3}"),
    (frozenset([3]), "frozenset of 1 {3}"),
    (list(range(50_000)), "list of 50000 [0, 1, 2, 3, ...]"),
    (dict.fromkeys(range(6), 0), "{0: 0, 1: 0, 2: 0, 3: 0, ...}"),
    (range(5), "range"),
    (Point(1, ZERO), "Point(x=1, y=[4, 1] float32)"),
    (Item(ZERO, "a"), "Item(image=[4, 1] float32, name='a')"),
    (Item, "type"),
    (pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)]),
     "PackedSequence(data=[4, 2] float32, batch_sizes=[3] int64, sorted_indices=None, unsorted_indices=None)"),
    (ITSELF, "[1, ...]"),
    (IN_DICT, "{again: (..., ...)}"),
    (nested(9), "[[[[[...]]]]]"),
    (object(), "object"),
])  # fmt: skip
def test_what_is_said(value: Any, printed: str) -> None:
    assert describe(value) == printed


def test_what_raises_when_it_is_looked_at_is_told_by_its_class() -> None:
    assert describe(Raises()) == "Raises"
    assert describe([Raises(), 1]) == "[Raises, 1]"
    assert describe(BadMapping(x=1)) == "BadMapping"
    assert describe(10**6000) == "int"
    parts = [torch.zeros(1), torch.zeros(2)]
    assert describe(torch.nested.nested_tensor(parts, layout=torch.jagged)).startswith("[2, j")


def test_it_stays_short_however_much_there_is() -> None:
    value: Any = {"k" * 99: "v" * 99}
    for _ in range(30):
        value = [value] * 30
    assert len(describe(value)) <= LENGTH
    wide = {f"name{i}": torch.zeros(1, 2, 3, 4, 5, 6) for i in range(4)}
    assert len(describe([wide] * 4)) == LENGTH
    assert "\n" not in describe({"a\nb": 1})


def test_outputs_and_encodings_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    output = transformers.modeling_outputs.SequenceClassifierOutput(logits=ZERO)
    assert describe(output) == "SequenceClassifierOutput {logits: [4, 1] float32}"
    encoding = transformers.BatchEncoding({"input_ids": ZERO.long()})
    assert describe(encoding) == "BatchEncoding {input_ids: [4, 1] int64}"
