"""States split into tensors and JSON, and joined again exactly; also through the disk."""

from __future__ import annotations

import enum
import json
import random
import shutil
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from store_helpers import around, same, save_round
from torch import nn

from hvd_hetero.checkpoint import CheckpointError, Store, join, split
from hvd_hetero.checkpoint.encoding import AS_BITS
from hvd_hetero.checkpoint.tensor_file import DTYPES, to_pieces
from hvd_hetero.errors import UserError


@st.composite
def some_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any dtype, of any bits, also without elements or dimensions, and views with strides of their own."""
    dtype = draw(st.sampled_from([*DTYPES, *sorted(AS_BITS, key=str)]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = int(np.prod(shape, dtype=int))
    if dtype == torch.bool:
        bits = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype)
    else:
        size = count * torch.empty(0, dtype=dtype).element_size()
        raw = draw(st.binary(min_size=size, max_size=size))
        bits = torch.tensor(list(raw), dtype=torch.uint8).view(dtype)
    tensor = bits.reshape(shape)
    if shape and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    if shape and draw(st.booleans()):
        tensor = tensor[::2]
    return tensor


@st.composite
def some_arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    dtype = draw(st.sampled_from("?bhilBHILefdFD"))
    array = np.array(draw(st.lists(st.integers(0, 1), max_size=6)), dtype=dtype)
    array = array * 1j if dtype in "FD" else array
    array = array[::-1] if draw(st.booleans()) else array.reshape(-1, 1).T
    array.flags.writeable = draw(st.booleans())
    return array


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(0, 2**200), st.floats(allow_nan=False),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0]), st.text(),
    st.sampled_from(["$tensor", "\ud800", "__metadata__"]),
    st.sampled_from([np.float32(0.1), np.int64(-3), np.bool_(True), np.complex64(1j)]),
    st.floats(allow_nan=False).map(np.float64), st.binary(max_size=9), st.binary(max_size=9).map(bytearray),
    st.complex_numbers(allow_nan=False),
    st.sampled_from([complex(float("inf"), float("nan")), torch.Size([2, 3]), torch.Size([])]),
    st.sampled_from([torch.bfloat16, torch.float8_e5m2, torch.device("cpu"), torch.device("cuda:1")]),
)  # fmt: skip
keys = st.one_of(
    st.text(max_size=3), st.sampled_from(["$dict", "a.b", "a", "1", "\ud800", "__metadata__", "a~2"]),
    st.integers(-1, 3), st.none(), st.booleans(), st.tuples(st.integers(), st.text()),
    st.sampled_from([0.5, float("inf"), b"a", 1j, torch.float32, torch.device("cpu"), np.int64(2), frozenset([1, ""])]),
)  # fmt: skip
states = st.recursive(
    st.one_of(scalars, some_tensors(), some_arrays()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.dictionaries(st.integers(), st.integers(), max_size=3).map(Counter),
        st.sets(keys, max_size=4), st.frozensets(keys, max_size=4),
        st.lists(inner, max_size=4).map(lambda items: deque(items, 3)), st.lists(inner, max_size=2).map(deque),
        st.builds(defaultdict, st.sampled_from([None, list, int, dict, set]), st.dictionaries(keys, inner, max_size=3)),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(states)
def test_any_state_comes_back_as_it_was(state: Any) -> None:
    assert same(around(state), state)


@settings(max_examples=60, deadline=None)
@given(states)
def test_any_state_comes_back_from_disk(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    store = Store(tmp_path_factory.mktemp("run"))
    save_round(store, 1, [state])
    latest = store.latest()
    assert latest is not None and same(latest.load(0), state)
    shutil.rmtree(store.folder)


def test_the_comparison_itself() -> None:
    pairs: list[tuple[Any, Any]] = [
        (1, True), (1, 1.0), (0.0, -0.0), ([1], (1,)), ({1: 2}, {"1": 2}), ({}, OrderedDict()), (np.float64(1), 1.0),
        (torch.zeros(1), torch.zeros(1, 1)), (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), torch.tensor([0.0, -0.0])), ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (torch.ones(1), torch.zeros(1)),
    ]  # fmt: skip
    assert not any(same(a, b) for a, b in pairs)
    assert same(float("nan"), float("nan"))


OPTIMIZERS = [
    ("SGD", {"momentum": 0.9, "nesterov": True}), ("SGD", {}), ("Adam", {"amsgrad": True}), ("AdamW", {}),
    ("Adagrad", {}), ("RMSprop", {"centered": True}), ("NAdam", {}), ("Rprop", {}), ("ASGD", {}), ("Adafactor", {}),
]  # fmt: skip
SCHEDULERS = [
    ("StepLR", {"step_size": 2}), ("MultiStepLR", {"milestones": [1, 3, 3]}), ("CosineAnnealingLR", {"T_max": 5}),
    ("ReduceLROnPlateau", {}), ("OneCycleLR", {"max_lr": 0.1, "total_steps": 9}), ("LinearLR", {}),
    ("CosineAnnealingWarmRestarts", {"T_0": 2}), ("LambdaLR", {"lr_lambda": lambda epoch: 0.5**epoch}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "cycle_momentum": False}),
]  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean() + torch.rand(())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step(*([loss.item()] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [*((o, SCHEDULERS[0]) for o in OPTIMIZERS), *((OPTIMIZERS[0], s) for s in SCHEDULERS[1:])],
    ids=lambda pair: pair[0],
)
def test_training_goes_on_as_if_nothing_had_been(tmp_path: Path, optimizer: Any, scheduler: Any) -> None:
    """All of torch's own states, of the optimizer, the schedule and the random numbers, through the disk."""

    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))
        rule = getattr(torch.optim, optimizer[0])(model.parameters(), lr=0.05, **optimizer[1])
        return model, rule, getattr(torch.optim.lr_scheduler, scheduler[0])(rule, **scheduler[1])

    parts = make(1)
    train(*parts, steps=3)
    state = {"parts": [part.state_dict() for part in parts], "rng": torch.get_rng_state()}
    store = Store(tmp_path)
    save_round(store, 3, [state])
    expected = train(*parts, steps=4)

    again = make(2)
    loaded = store.at(3).load(0)
    for part, content in zip(again, loaded["parts"], strict=True):
        part.load_state_dict(content)
    torch.set_rng_state(loaded["rng"])
    assert train(*again, steps=4) == expected


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_numpys_random_numbers_go_on(kind: str) -> None:
    generator = np.random.Generator(getattr(np.random, kind)(7))
    generator.integers(0, 9, 5, dtype=np.uint8)
    state = around({"rng": generator.bit_generator.state, "python": random.getstate()})
    expected, drawn = generator.random(9), random.random()
    other = np.random.Generator(getattr(np.random, kind)(8))
    other.bit_generator.state = state["rng"]
    random.setstate(state["python"])
    assert (other.random(9) == expected).all() and random.random() == drawn


def test_shared_memory_is_saved_once_and_shared_again() -> None:
    weight, vector = torch.randn(4, 4), torch.arange(10.0)
    state = {"in": weight, "out": weight, "view": weight.t(), "first": vector[:5], "second": vector[3:],
             "np": weight.numpy(), "none": [torch.empty(0), torch.empty(0)]}  # fmt: skip
    tensors, plain = split(state)
    assert len(tensors) == 6, "one for in, out and np, and one for each of the others"
    again = join(tensors, plain)
    assert same(again, state)
    again["in"][0, 0] = again["np"][1, 1] = 7.0
    assert again["out"] is again["in"] and again["out"][1, 1] == 7 and again["np"][0, 0] == 7
    assert weight[0, 0] != 7, "what is joined is a copy"


def test_what_has_no_word_in_the_file_is_kept_bit_for_bit_and_shared() -> None:
    wave = torch.view_as_complex(torch.randn(3, 4, 2))
    state = {"wave": wave, "again": wave, "conj": wave.conj(), "turned": wave.t(), "imag": wave.conj().imag,
             "np": wave.numpy(), "scalar": torch.tensor(1 + 2j), "none": torch.empty(0, 3, dtype=torch.complex64),
             "hole": torch.eye(3).to_sparse(),
             "twice": torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (4,), check_invariants=True)}  # fmt: skip
    again = around(state)
    assert same(again, state) and torch.equal(again["conj"], wave.conj())
    assert not again["twice"].is_coalesced() and again["twice"].to_dense()[0] == 3
    again["wave"][0, 0] = 7
    assert again["again"][0, 0] == 7 and again["np"][0, 0] == 7


def test_a_type_of_tensors_is_looked_up_and_nothing_else() -> None:
    for name in ("torch.load", "load", "torch.nn.functional", "os"):
        with pytest.raises(ValueError, match="no type of tensors"):
            join({}, {"$dtype": name})


def test_parameters_are_saved_as_tensors_and_names_are_the_dotted_paths() -> None:
    tensors, _ = split({"model": nn.Linear(2, 1).state_dict(), "p": [nn.Parameter(torch.ones(2))], "a.b": torch.ones(1),
                        "a": {"b": torch.ones(2)}, 1: torch.ones(3), "1": torch.ones(4)})  # fmt: skip
    assert list(tensors) == ["model.weight", "model.bias", "p.0", "a.b", "a.b~2", "1", "1~2"]
    assert not any(tensor.requires_grad for tensor in tensors.values())


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int
    y: int


REFUSED: list[tuple[Any, str]] = [
    (Level.LOW, "Level"), (lambda: 0, "function"), (torch.Generator(), "Generator"), (Point(1, 2), "Point"),
    (np.array(["a"]), "dtype <U1"), (np.array([None]), "dtype object"), ({object()}, "object"),
    (np.array([1.0], dtype=">f8"), "dtype >f8"), (np.longdouble(1), "longdouble"), (np.clongdouble(1), "clongdouble"),
    (torch.eye(2).to_sparse_csr(), "sparse_csr"), (defaultdict(lambda: 0), "defaultdict"),
    (torch.empty(1, device="meta"), "meta"), ({(1, torch.zeros(1)): 0}, "Tensor"), (1 << 20_000, "integer"),
    (nn.parameter.UninitializedParameter(), "UninitializedParameter"), (np.str_("a"), "str_"),
    (np.datetime64(1, "s"), "datetime64"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "output"), REFUSED, ids=[output for _, output in REFUSED])
def test_what_only_pickle_could_save_is_named_by_its_path(tmp_path: Path, value: Any, output: str) -> None:
    with pytest.raises(CheckpointError, match="the state's optimizer.state.0.extra") as raised:
        Store(tmp_path).write_shard(1, 0, {"optimizer": {"state": {0: {"lr": 0.1, "extra": value}}}})
    assert isinstance(raised.value, UserError) and output in raised.value.problem and raised.value.remedy
    assert not list(tmp_path.iterdir()), "nothing is written, and no empty folder"


def test_a_state_that_contains_itself() -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    with pytest.raises(CheckpointError, match="contains itself"):
        split(state)


def test_the_file_is_what_the_library_would_write() -> None:
    tensors = {"b": torch.tensor([True]), "é.0": torch.randn(3, 2), "a": torch.arange(3), "h": torch.ones(3).bfloat16(),
               "none": torch.empty(0, 3), "0d": torch.tensor(5)}  # fmt: skip

    def parts(data: bytes) -> tuple[Any, bytes]:
        size = struct.unpack_from("<Q", data)[0]
        return json.loads(data[8 : 8 + size]), data[8 + size :]

    assert parts(b"".join(to_pieces(tensors))) == parts(save(tensors, {"format": "pt"}))
