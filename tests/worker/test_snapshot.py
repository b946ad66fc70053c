"""What is remembered in place, and put back: all that is reached, the very objects, and no more than has changed."""

from __future__ import annotations

import random
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from hvd_hetero.worker.snapshot import snapshot


class Holder:
    """An object of somebody's own."""

    def __init__(self, **content: Any) -> None:
        vars(self).update(content)


def test_containers_and_attributes() -> None:
    inner = [1, {"a": 2}]
    held = Holder(
        number=1, inner=inner, again=inner, named=OrderedDict(b=1, a=2), counts=Counter("aab"), some=defaultdict(list),
        last=deque([1, 2], maxlen=2), names={"x"}, deep=(Holder(text="as it was"), SimpleNamespace(count=0)),
    )  # fmt: skip
    held.me = held
    before = repr({key: value for key, value in vars(held).items() if key not in ("me", "deep")})
    restore = snapshot(held)
    held.number, held.new = 2, 3
    inner[1]["a"], held.again = 7, []  # type: ignore[index]
    inner.append(3)
    held.named["c"], held.deep[0].text, held.deep[1].count = 3, "changed", 1
    held.named.move_to_end("b")
    held.counts["z"] += 1
    held.some["x"].append(1)
    held.last.append(9)
    held.names.add("y")
    restore()
    assert repr({key: value for key, value in vars(held).items() if key not in ("me", "deep")}) == before
    assert held.inner is held.again is inner and held.me is held
    assert held.deep[0].text == "as it was" and held.deep[1].count == 0


def test_tensors_keep_their_memory_and_all_that_hangs_on_them() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.register_buffer("expanded", torch.zeros(3).expand(2, 3))
    model.register_buffer("strided", torch.ones(4, dtype=torch.bfloat16)[::2])
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("nothing", torch.empty(0))
    model.meta = torch.empty(3, device="meta")
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    weight, tensors = model[0].weight, [*model.parameters(), *model.buffers()]
    weight.note = "kept"
    before = [(id(t), t.data_ptr(), t.clone()) for t in tensors]
    sums = [part["sum"].clone() for part in optimizer.state.values()]
    restore = snapshot(model, optimizer)
    for _ in range(2):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    weight.note = "changed"
    weight.data = weight.data * 2
    weight.requires_grad_(False)
    model[0].bias = nn.Parameter(torch.ones(3))
    model.expanded = model.expanded + 1
    model.strided.fill_(3), model.mask.fill_(True)
    model[1].running_mean.add_(torch.ones(3, requires_grad=True))
    restore()
    after = [(id(t), t.data_ptr(), t) for t in [*model.parameters(), *model.buffers()]]
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))
    assert weight.requires_grad and weight.note == "kept" and all(p.grad is None for p in model.parameters())
    assert not model[1].running_mean.requires_grad
    assert all(torch.equal(a, part["sum"]) for a, part in zip(sums, optimizer.state.values(), strict=True))


def test_a_file_that_is_mapped_is_not_written_to(tmp_path: Path) -> None:
    """It would end the process."""
    np.arange(4.0).tofile(tmp_path / "numbers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch knows no arrays that cannot be written to
        table = torch.from_numpy(np.memmap(tmp_path / "numbers", mode="r", dtype=np.float64))
    other = torch.zeros(2)
    restore = snapshot(Holder(table=table, other=other))
    other.add_(1).resize_(5)
    restore()
    assert table.tolist() == [0, 1, 2, 3] and other.tolist() == [0, 0]


def test_random_generators_and_arrays() -> None:
    held = Holder(
        torch=torch.Generator(), python=random.Random(1), old=np.random.RandomState(1), new=np.random.default_rng(1),
        array=np.zeros(3), fixed=np.broadcast_to(np.zeros(1), 3),
    )  # fmt: skip

    def draw() -> list[float]:
        held.array += 1
        return [float(torch.rand(1, generator=held.torch)), held.python.random(), held.old.rand(), held.new.random()]

    restore = snapshot(held)
    drawn = draw()
    restore()
    assert draw() == drawn and held.array.tolist() == [1, 1, 1]


def test_what_functions_hold_and_whose_method_it_is() -> None:
    seen: list[int] = []
    counter = Holder(count=0)

    def loss() -> None:
        seen.append(1)
        counter.count += 1
        loss.calls = 1  # type: ignore[attr-defined]

    def recursive() -> Any:
        return later  # noqa: F821 (a variable that is empty yet)

    restore = snapshot(loss, Holder(count=2).__init__, recursive)  # type: ignore[misc]
    loss()
    restore()
    assert seen == [] and counter.count == 0 and not hasattr(loss, "calls")
    later = None  # noqa: F841


def test_threads_locks_and_files_are_left_alone() -> None:
    lock, done = threading.Lock(), threading.Event()
    held = Holder(lock=lock, done=done, thread=threading.Thread(target=done.set), module=random, kind=Holder)
    restore = snapshot(held)
    held.thread.start()
    held.thread.join()
    held.lock = None
    restore()
    assert held.lock is lock and done.is_set() and not held.thread.is_alive()
