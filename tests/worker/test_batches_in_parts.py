"""Micro-batches: a step of several parts is the unsplit step, to rounding, whatever of the batch counts."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_hetero.data.batch import split_batch
from hvd_hetero.errors import ConfigError
from hvd_hetero.worker.factories import per_sample_loss
from hvd_hetero.worker.losses import NOT_COUNTED
from hvd_hetero.worker.memory import micro_batches_that_fit
from hvd_hetero.worker.worker import Worker

IGNORED = -100
LOSSES: dict[str, Callable[[], Any]] = {
    "plain": lambda: per_sample_loss("cross_entropy", {}),
    "class weights": lambda: per_sample_loss("cross_entropy", {"weight": [1.0, 2.5, 0.0]}),
    "ignored": lambda: per_sample_loss("cross_entropy", {"ignore_index": 1}),
}


def worker(loss: str = "plain", count: int = 1, **options: Any) -> Worker:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    return Worker(net, LOSSES[loss](), lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), None,
                  micro_batches=count, **options)  # fmt: skip


def batch(size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 1, 0])[:size]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("count", [2, 3, 7, 12])
def test_the_gradient_is_that_of_the_whole_batch(loss: str, count: int, flat: bool) -> None:
    whole, parted = worker(loss), worker(loss, count)
    if flat:
        whole.flat_gradients(), parted.flat_gradients()
    for _ in range(3):
        expected, found = whole.gradient(*batch(), 0.3), parted.gradient(*batch(), 0.3)
        torch.testing.assert_close(found, expected)
        again = parted.gradient_again(*batch(), 0.3)
        torch.testing.assert_close(again, whole.gradients())
        torch.testing.assert_close(parted.gradients(), whole.gradients())
        whole.apply(), parted.apply()
    for found, expected in zip(parted.pop_losses(), whole.pop_losses(), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_that_are_sent_by_hooks_are_whole_in_the_last_pass() -> None:
    """What synchronous SGD sends is what the last backward pass leaves, with weights that are known only then."""
    mine, seen = worker("class weights", 3), []
    first = next(mine.model.parameters())
    first.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.clone()))
    mine.gradient(*batch())
    assert len(seen) == 3 and torch.equal(seen[-1], first.grad)


def test_nothing_counts() -> None:
    mine = worker("ignored", 2)
    mine.gradient(batch()[0], torch.ones(7, dtype=torch.int64))
    assert all(bool((g == 0).all()) for g in mine.gradients())


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_that_are_left_out_count_as_zero_gradients(loss: str) -> None:
    """Of 7 samples in 3 parts the first two are trained on: their mean gradient, times 4 / 7."""
    inputs, targets = batch()
    mine, expected, asked = worker(loss, 3), worker(loss), []
    mine.gradient(inputs, targets, stop=lambda: bool(asked.append(1)) or len(asked) == 2)
    expected.gradient(inputs[:4], targets[:4], 4 / 7)
    torch.testing.assert_close(mine.gradients(), expected.gradients())
    losses, weights = mine.pop_losses()
    assert losses[4:].tolist() == [NOT_COUNTED] * 3 and weights[4:].tolist() == [0.0] * 3
    torch.testing.assert_close(losses[:4], expected.pop_losses()[0])


def test_a_part_has_as_many_samples_as_the_model_needs() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    mine = Worker(net, LOSSES["plain"](), lambda params: torch.optim.SGD(params, lr=0.1), None, micro_batches=7,
                  min_batch=2)  # fmt: skip
    assert mine.gradient(*batch()).shape == (7,)
    assert int(net[1].num_batches_tracked) == 3, "of seven samples"


# ---- cutting --------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "a b")


def test_whatever_a_batch_is_made_of_is_cut_by_samples() -> None:
    x = torch.arange(5)
    pair = Pair(x + 1, np.arange(5.0))
    inputs = {"x": x, "pair": pair, "names": list("abcde"), "scale": torch.tensor(2.0), "on": True}
    size, parts = split_batch((inputs, (x, [{"boxes": torch.ones(n, 4)} for n in range(5)])), 2)
    assert size == 5 and len(parts) == 2
    (first, (target, boxes)), (second, _) = parts
    assert first["x"].tolist() == [0, 1] and second["x"].tolist() == [2, 3, 4]
    assert isinstance(second["pair"], Pair) and second["pair"].b.tolist() == [2.0, 3.0, 4.0]
    assert second["names"] == ["c", "d", "e"] and second["scale"] == 2.0 and second["on"] is True
    assert target.tolist() == [0, 1] and [len(b["boxes"]) for b in boxes] == [0, 1]


@pytest.mark.parametrize(("inputs", "targets"), [
    (torch.ones(5, 2), object()),
    ((torch.ones(5, 2), torch.ones(2, 9)), torch.ones(5)),
    ({"x": torch.ones(5, 2), "graph": object()}, torch.ones(5)),
    ([torch.ones(5), torch.ones(5), torch.ones(5), torch.ones(5), torch.ones(5)], torch.ones(5)),
])  # fmt: skip
def test_what_does_not_go_by_samples_is_refused(inputs: Any, targets: Any) -> None:
    with pytest.raises(ConfigError, match="train.micro_batches"):
        split_batch((inputs, targets), 2)


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fits", "expected", "tried"), [(8, 1, [1]), (4, 2, [1, 2]), (1, 8, [1, 2, 4, 8])])
def test_micro_batches_are_halved_as_long_as_memory_runs_out(fits: int, expected: int, tried: list[int]) -> None:
    counts: list[int] = []

    def step(count: int) -> None:
        counts.append(count)
        if 8 / count > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert micro_batches_that_fit(step, 8) == expected and counts == tried


def test_where_nothing_fits_the_error_stays() -> None:
    def step(count: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        micro_batches_that_fit(step, 6)
