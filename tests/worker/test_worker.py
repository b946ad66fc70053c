"""One rank's worker: local steps, learning rate, evaluation, and that measuring a step leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain, cycle, islice, repeat
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_hetero.data import MapSource, TensorSource
from hvd_hetero.data.batch import Weighted
from hvd_hetero.errors import ConfigError
from hvd_hetero.random_state import seed_all
from hvd_hetero.worker.factories import (
    accuracy,
    is_accuracy,
    optimizer_maker,
    per_sample_loss,
    scheduler_maker,
)
from hvd_hetero.worker.forward import forward
from hvd_hetero.worker.metrics import SampleMean, read_metrics
from hvd_hetero.worker.step_benchmark import Measurement, measure_step
from hvd_hetero.worker.worker import Worker


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3))


def source(count: int = 40) -> TensorSource:
    generator = torch.Generator().manual_seed(0)
    return TensorSource(torch.randn(count, 6, generator=generator), torch.arange(count) % 3)


def worker(optimizer: str = "SGD", scheduler: str | None = None, lr: float = 0.1, **options: Any) -> Worker:
    args = {"momentum": 0.9} if optimizer == "SGD" else {}
    return Worker(
        network(), per_sample_loss("cross_entropy", {}), optimizer_maker(optimizer, lr, args),
        scheduler_maker(scheduler, {"step_size": 1, "gamma": 0.5} if scheduler else {}),
        metrics=read_metrics("eval.metrics", {"accuracy": "accuracy"}), **options,
    )


def batches(rows: Any) -> Iterator[Any]:
    return source().batches(np.asarray(rows), torch.Generator())


# ---- training -------------------------------------------------------------------------------------------------------


def test_the_emulator_has_its_former_name_for_one_release() -> None:
    mine = worker()
    with pytest.warns(FutureWarning, match=r"Worker\.pace is now Worker\.emulator"):
        assert mine.pace is mine.emulator


def test_local_steps_are_those_of_a_plain_loop() -> None:
    rows = np.arange(40).reshape(5, 8)
    mine = worker()
    torch.manual_seed(11)
    mine.local_steps(batches(rows), 5)

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(11)
    expected = []
    for inputs, targets in batches(rows):
        losses = nn.functional.cross_entropy(model(inputs), targets, reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        expected.append(losses.detach())
    losses, weights = mine.pop_losses()
    assert losses.shape == (40,) and losses.dtype == torch.float32
    assert torch.equal(weights, torch.ones(40))
    assert torch.allclose(losses, torch.cat(expected), rtol=1e-5)
    for (name, a), b in zip(mine.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name
    assert mine.pop_losses()[0].numel() == 0


def test_local_steps_take_their_batches_and_no_more() -> None:
    mine, stream = worker(), batches(np.arange(40).reshape(5, 8))
    mine.local_steps(stream, 2)
    mine.local_steps(stream, 2)
    assert mine.pop_losses()[0].shape == (32,)
    assert len(list(stream)) == 1


def test_a_gradient_takes_no_step() -> None:
    mine = worker()
    before = mine.state.vectors[0][: mine.state.params[0]].clone()
    losses = mine.gradient(*next(batches([[0, 1, 2]])))
    assert losses.shape == (3,) and not losses.requires_grad
    assert torch.equal(mine.state.vectors[0][: mine.state.params[0]], before)
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in mine.model.parameters() if p.dim() > 1)


def test_what_comes_to_learn_while_training_is_refused() -> None:
    """The optimizer has not got it; what has no gradient, as the copy of a part, is no matter."""
    model, rows = network(), batches([[0, 1, 2], [3, 4, 5]])
    first = next(model.children()).requires_grad_(False)
    mine = Worker(model, per_sample_loss("cross_entropy", {}), optimizer_maker("SGD", 0.1, {}), None)
    first.register_module("copy", copy.deepcopy(list(model.children())[4]))
    mine.gradient(*next(rows))
    mine.check_learning()
    first.requires_grad_(True)
    mine.gradient(*next(rows))
    with pytest.raises(ConfigError, match="model='0.weight': has a gradient, but the optimizer was made without it"):
        mine.check_learning()


class Heads(nn.Module):
    """Of two heads it uses one, and the other one as well where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.other, self.both = nn.Linear(6, 3), nn.Linear(6, 3), False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x) + (self.other(x) if self.both else 0)
        return out


def test_a_part_that_nothing_uses_is_left_alone_where_gradients_are_summed() -> None:
    """Its gradient is zero then, in place of none: no reason for weight decay, nor once it is resumed."""

    def made() -> Worker:
        torch.manual_seed(3)
        mine = Worker(Heads(), per_sample_loss("cross_entropy", {}),
                      optimizer_maker("AdamW", 0.1, {"weight_decay": 0.5}), None)  # fmt: skip
        mine.flat_gradients()
        return mine

    plain, mine = Heads(), made()
    plain.load_state_dict(mine.model.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), 0.1, weight_decay=0.5)
    for both in (False, True, False):
        resumed = made()
        resumed.load_state_dict(copy.deepcopy(mine.state_dict()))
        plain.both = mine.model.both = resumed.model.both = both  # type: ignore[assignment]
        inputs, targets = next(batches([[0, 1, 2]]))
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(plain(inputs), targets).backward()
        optimizer.step()
        for one in (mine, resumed):
            one.gradient(inputs, targets)
            one.apply()
            for p, q in zip(plain.parameters(), one.model.parameters(), strict=True):
                torch.testing.assert_close(p, q)


def test_a_part_that_is_frozen_while_training_is_left_alone_where_gradients_are_summed() -> None:
    plain = Heads()
    mine = Worker(copy.deepcopy(plain), per_sample_loss("cross_entropy", {}),
                  optimizer_maker("SGD", 0.1, {"momentum": 0.9}), None)  # fmt: skip
    mine.flat_gradients()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    plain.both = mine.model.both = True  # type: ignore[assignment]
    inputs, targets = next(batches([[0, 1, 2]]))
    for learns in (True, True, False, True):
        for one in (plain, mine.model):
            one.other.requires_grad_(learns)  # type: ignore[union-attr]
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(inputs), targets).backward()
        optimizer.step()
        mine.gradient(inputs, targets)
        mine.apply()
        for p, q in zip(plain.parameters(), mine.model.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_ranks_step_alike_whether_or_not_their_own_batches_have_used_a_part() -> None:
    """Its gradient may be zero on the rank that has, as behind a gate that begins at zero; ranks only share the sum."""
    both = []
    for is_used in (True, False):
        mine = Worker(Heads(), per_sample_loss("cross_entropy", {}), optimizer_maker("Adam", 0.1, {"weight_decay": 1}),
                      None)  # fmt: skip
        mine.flat_gradients()
        mine.model.both = is_used  # type: ignore[assignment]
        mine.gradient(*next(batches([[0, 1, 2]])))
        for p in mine.model.other.parameters():  # type: ignore[union-attr]
            assert p.grad is not None
            p.grad.zero_()  # what the sum over ranks is
        before = copy.deepcopy(mine.model.other.state_dict())  # type: ignore[union-attr]
        mine.apply()
        torch.testing.assert_close(mine.model.other.state_dict(), before)  # type: ignore[union-attr]
        both.append(len(mine.optimizer.state))
    assert both[0] == both[1]


def rate(mine: Worker) -> float:
    return float(mine.optimizer.param_groups[0]["lr"])


def test_warm_up_scales_the_scheduled_rate_and_leaves_the_schedule_alone() -> None:
    mine = worker(scheduler="StepLR", lr=0.8)
    mine.scale_rate(0.25)
    assert rate(mine) == pytest.approx(0.2)
    mine.scale_rate(0.5)
    assert rate(mine) == pytest.approx(0.4), "of the scheduled rate, not of the last one"
    mine.optimizer.step()
    mine.step_scheduler()
    assert rate(mine) == pytest.approx(0.4), "half of 0.8, though the warm-up stood at a half"
    mine.scale_rate(0.5)
    mine.step_scheduler()
    assert rate(mine) == pytest.approx(0.2)


def test_without_a_scheduler_the_rate_stays() -> None:
    mine = worker(lr=0.8)
    mine.scale_rate(0.1)
    mine.step_scheduler()
    assert rate(mine) == 0.8


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_of_fewer_samples_than_were_asked_for_is_refused() -> None:
    data = MapSource(range(40), collate=lambda items: (torch.zeros(7, 6), torch.zeros(7, dtype=torch.int64)))
    with pytest.raises(ConfigError, match=r"test data=7 targets: .* the 8 samples \[32, 33, "):
        worker().evaluate(data, np.arange(32, 40), 8)


@pytest.mark.parametrize(("count", "batch"), [(40, 8), (37, 8), (5, 8), (1, 1), (0, 4)])
def test_evaluation_sums_over_every_sample(count: int, batch: int) -> None:
    """The last batch is smaller; dropout is off and BatchNorm's statistics are used, not changed."""
    mine, data = worker(), source(40)
    mine.local_steps(batches(np.arange(40).reshape(5, 8)), 5)
    before = [v.clone() for v in mine.state.vectors]
    order = np.random.default_rng(0).permutation(40)[:count]
    mine.evaluate(data, order, batch)
    (loss, counted), (correct, judged) = (m.sums.tolist() for m in mine.measures if isinstance(m, SampleMean))
    mine.model.eval()
    with torch.no_grad():
        outputs = mine.model(data.inputs[order])
        expected = nn.functional.cross_entropy(outputs, data.targets[order], reduction="none").sum()
    mine.model.train()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert correct == int((outputs.argmax(1) == data.targets[order]).sum())
    assert counted == judged == count
    assert all(torch.equal(a, b) for a, b in zip(mine.state.vectors, before, strict=True))


def test_evaluation_leaves_the_model_training() -> None:
    mine = worker()
    mine.evaluate(source(), np.arange(8), 4)
    assert mine.model.training
    mine.local_steps(batches([[0, 1, 2, 3]]), 1)  # tensors made in inference mode would fail here


class Noisy(nn.Module):
    """Draws from all generators, in training and in evaluation; keeps what it has made in the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.kept = network(), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(x.new_ones(3) * 2)
        noise = torch.rand(len(x), 1) + float(np.random.rand()) + random.random()
        return self.inner(x) * (self.kept[0] + noise)


class NoisyRows:
    """Items with noise of numpy's."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.random.rand(6)).float(), i % 3


def test_evaluating_more_often_changes_no_random_number() -> None:
    """Not in the data either, whose batches are drawn from the worker's generator."""
    data, found = MapSource(NoisyRows()), []
    for often in (False, True):
        mine = Worker(Noisy(), per_sample_loss("cross_entropy", {}), optimizer_maker("SGD", 0.1, {}), None)
        seed_all(7)
        for rows in np.arange(40).reshape(5, 1, 8):
            mine.local_steps(data.batches(rows, mine.generator), 1)
            if often:
                mine.evaluate(data, np.arange(20), 8)
        found.append([*mine.state.vectors, *mine.pop_losses()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_a_module_keeps_of_an_evaluation_can_be_trained_with() -> None:
    model = Noisy()
    scaled = nn.Sequential(model, nn.Linear(3, 3))
    mine = Worker(scaled, per_sample_loss("cross_entropy", {}), optimizer_maker("SGD", 0.1, {}), None)
    mine.evaluate(source(), np.arange(8), 4)
    assert model.kept and not model.kept[0].is_inference()
    mine.local_steps(batches([[0, 1, 2, 3]]), 1)


def test_all_random_numbers_go_on_from_a_saved_state() -> None:
    """And the losses of the steps before it, with their weights."""
    def made() -> Worker:
        loss = per_sample_loss("cross_entropy", {"ignore_index": 2})
        return Worker(Noisy(), loss, optimizer_maker("SGD", 0.1, {}), None)

    whole, again = made(), made()
    seed_all(7)
    whole.local_steps(batches(np.arange(16).reshape(2, 8)), 2)
    state = copy.deepcopy(whole.state_dict())
    whole.local_steps(batches(np.arange(16).reshape(2, 8)), 2)
    seed_all(8)
    again.load_state_dict(state)
    again.local_steps(batches(np.arange(16).reshape(2, 8)), 2)
    for ours, theirs in zip([*again.state.vectors, *again.pop_losses()],
                            [*whole.state.vectors, *whole.pop_losses()], strict=True):  # fmt: skip
        assert torch.equal(ours, theirs)


def test_a_state_from_before_losses_were_saved_is_taken() -> None:
    """The loss then begins as it is made."""
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return nn.functional.cross_entropy(outputs, targets, reduction="none")

    whole, again, older = (Worker(Noisy(), Counted(), optimizer_maker("SGD", 0.1, {}), None) for _ in range(3))
    whole.local_steps(batches(np.arange(16).reshape(2, 8)), 2)
    state = copy.deepcopy(whole.state_dict())
    again.load_state_dict(state)
    older.load_state_dict({name: part for name, part in state.items() if name != "loss"})
    for mine, calls in ((again, 2), (older, 0)):
        assert int(mine._loss_module.calls) == calls  # type: ignore[union-attr, operator, arg-type]
        assert all(map(torch.equal, mine.state.vectors, whole.state.vectors))


# ---- leaving no trace -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "Adagrad"])
def test_measuring_leaves_everything_as_it_was(optimizer: str) -> None:
    """The run that follows is bit for bit the one without it: model, BatchNorm, optimizer, random states."""
    measured, plain = worker(optimizer), worker(optimizer)
    results = []
    for mine in (measured, plain):
        torch.manual_seed(5)
        if mine is measured:
            assert measure_step(mine, source(), 8, seconds=0.01, warmup_steps=2, ready=lambda: None).step_sec > 0
        mine.local_steps(batches(np.arange(40).reshape(5, 8)), 5)
        state = [value for part in mine.optimizer.state.values() for value in part.values() if value is not None]
        state += [mine.generator.get_state(), *mine.pop_losses()]
        results.append([*mine.state.tensors(), *state])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def scripted(
    monkeypatch: pytest.MonkeyPatch, durations: Iterator[float], emulates: bool = False
) -> tuple[Any, list[int]]:
    """A worker whose steps take as long as they are told to, and a list of how many it is asked for at a time."""
    now, counts = [0.0], list[int]()

    def local_steps(batches: Any, count: int) -> None:
        counts.append(count)
        now[0] += sum(islice(durations, count))

    monkeypatch.setattr("hvd_hetero.worker.step_benchmark.time", SimpleNamespace(perf_counter=lambda: now[0]))
    emulator = SimpleNamespace(emulates=emulates, at_full_speed=nullcontext)
    mine = SimpleNamespace(snapshot=lambda: lambda: None, local_steps=local_steps, pop_losses=lambda: None,
                           generator=torch.Generator(), emulator=emulator)  # fmt: skip
    return mine, counts


@pytest.mark.parametrize("emulates", [False, True])
def test_steps_that_a_quota_makes_uneven_are_measured_in_long_chunks(
    monkeypatch: pytest.MonkeyPatch, emulates: bool
) -> None:
    """In short ones the median is one of the lengths that single steps have. An emulated rank's stay short."""
    durations = chain([0.05, 0.05, 0.019], cycle([0.02, 0.04, 0.06, 0.06, 0.06]))
    mine, counts = scripted(monkeypatch, durations, emulates)
    found = measure_step(mine, source(), 8, seconds=6.0, warmup_steps=2, ready=lambda: None)
    assert counts[:3] == [2, 1, 5], "warm-up, and a step that says how many there are in 0.1 s"
    if emulates:
        assert set(counts[3:]) == {5}
        return
    assert all(11 <= count <= 13 for count in counts[3:]), "0.6 s"
    assert found.step_sec == pytest.approx(0.048, rel=0.03)


def test_chunks_of_any_length_say_how_much_single_steps_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first one, of another length, is the one that varies: 1 step of 0.2 s, then 0.1 s each."""
    mine, counts = scripted(monkeypatch, chain([0.1, 0.099, 0.2], repeat(0.1)))
    found = measure_step(mine, source(), 8, seconds=4.0, warmup_steps=1, ready=lambda: None)
    chunks, steps = len(counts) - 2, sum(counts[2:])
    assert counts[2] == 1 and 3 <= counts[-1] <= 4 and found.step_sec == pytest.approx(0.1)
    assert found.jitter == pytest.approx(((1 - 1 / steps) / (chunks - 1)) ** 0.5), "the mean is 0.1 / steps off"


def test_the_way_that_the_last_rank_is_done_with_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Going by classes rank 0 is done early, and the others wait for what it sends them."""
    mine = worker()
    before = [v.clone() for v in mine.state.vectors]
    taken: list[str] = []
    comm = SimpleNamespace(paths=("flat", "hierarchical"), set_path=taken.append)

    def averages_sec(self: Measurement, count: int) -> list[float]:
        for vector in self.worker.state.vectors:
            vector.mul_(0.5)
        return {"flat": [2.0, 2.0, 2.0], "hierarchical": [1.0, 3.0, 3.0]}[taken[-1]]

    monkeypatch.setattr(Measurement, "_averages_sec", averages_sec)
    found = Measurement(mine, source(), None, comm, 0.1, 1).choose_path()  # type: ignore[arg-type]
    assert found == {"flat": 2.0, "hierarchical": 3.0} and taken[-1] == "flat" and set(taken) == set(comm.paths)
    assert all(torch.equal(a, b) for a, b in zip(before, mine.state.vectors, strict=True)), "the model stays as it is"


# ---- what is made by name -------------------------------------------------------------------------------------------


def test_forward_by_position_and_by_keyword() -> None:
    def two(a: int, b: int) -> int:
        return 10 * a + b

    call: Callable[..., Any] = forward
    assert call(two, (1, 2)) == 12
    assert call(two, {"b": 1, "a": 2}) == 21
    assert call(lambda x: x + 1, 3) == 4


def test_losses_are_one_number_a_sample() -> None:
    outputs, targets = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    losses, _ = per_sample_loss("mse_loss", {})(outputs, targets)
    assert torch.allclose(losses, (outputs - targets).square().mean(dim=(1, 2)))
    smooth = per_sample_loss("cross_entropy", {"label_smoothing": 0.1})
    logits, classes = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert torch.allclose(
        smooth(logits, classes)[0], nn.functional.cross_entropy(logits, classes, label_smoothing=0.1, reduction="none")
    )


def test_accuracy() -> None:
    outputs, targets = torch.tensor([[0.1, 0.9], [2.0, 1.0]]), torch.tensor([1, 1])
    assert accuracy(outputs, targets)[0].tolist() == [1.0, 0.0]
    (metric,) = read_metrics("eval.metrics", {"acc": "accuracy"})
    assert isinstance(metric, SampleMean) and is_accuracy(metric.function) and not is_accuracy(None)


@pytest.mark.parametrize(("make", "key", "text"), [
    (lambda: per_sample_loss("crossentropy", {}), "train.loss", "torch.nn.functional"),
    (lambda: per_sample_loss("nosuch:thing", {}), "train.loss", "no module named"),
    (lambda: read_metrics("eval.metrics", {"m": "acuracy"}), "eval.metrics.m", "accuracy or"),
    (lambda: optimizer_maker("Sgd", 0.1, {}), "train.optimizer", "SGD"),
    (lambda: optimizer_maker("lr_scheduler", 0.1, {}), "train.optimizer", "SGD"),
    (lambda: worker_with_optimizer({"momentun": 0.9}), "train.optimizer_args", "momentun"),
    (lambda: worker_with_optimizer({"momentum": -1}), "train.optimizer_args", "-1"),
    (lambda: scheduler_maker("MultiStep", {}), "train.scheduler", "MultiStepLR"),
    (lambda: worker_with_scheduler({"milestone": [1]}), "train.scheduler_args", "milestone"),
])
def test_a_name_or_argument_that_is_not_there(make: Callable[[], Any], key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.key == key
    assert text in str(caught.value)


def worker_with_optimizer(args: dict[str, Any]) -> Worker:
    return Worker(network(), per_sample_loss("cross_entropy", {}), optimizer_maker("SGD", 0.1, args), None)


def worker_with_scheduler(args: dict[str, Any]) -> Worker:
    loss: Callable[[Any, Tensor], Tensor] = per_sample_loss("cross_entropy", {})
    return Worker(network(), loss, optimizer_maker("SGD", 0.1, {}), scheduler_maker("MultiStepLR", args))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_samples_that_weigh_differently(micro_batches: int) -> None:
    """The gradient is the mean of w l over the batch's samples; losses are noted as they are."""
    inputs, targets = torch.randn(4, 6), torch.tensor([0, 1, 1, 0])
    weighs, plain = worker(), worker()
    weighs.micro_batches = micro_batches
    for made in (weighs, plain):
        made.model.eval()
    weighs.gradient(inputs, Weighted(targets, torch.tensor([0.0, 1.0, 2.0, 5.0])))
    losses = nn.functional.cross_entropy(plain.model(inputs), targets, reduction="none")
    (losses * torch.tensor([0.0, 1.0, 2.0, 5.0])).mean().backward()
    for own, other in zip(weighs.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    assert weighs.pop_losses()[0].tolist() == pytest.approx(losses.tolist())
