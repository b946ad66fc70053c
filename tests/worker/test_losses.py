"""What losses come to, sample by sample, and that batches and test sets have PyTorch's mean of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_hetero.data import TensorSource
from hvd_hetero.errors import ConfigError
from hvd_hetero.worker.factories import accuracy, per_sample_loss
from hvd_hetero.worker.loss_checks import Batched, closely, try_loss
from hvd_hetero.worker.loss_modules import SampleLosses, loss_of_module
from hvd_hetero.worker.losses import NOT_COUNTED, PerSample, concat, mean, per_sample
from hvd_hetero.worker.metrics import SampleMean, read_metrics
from hvd_hetero.worker.worker import Worker

F = nn.functional
CLASSES, TOKENS = 4, 6
WEIGHTS = [1.0, 2.0, 0.5, 3.0]


class Tagger(nn.Module):
    """``[B, T]`` tokens to ``[B, C, T]``, or the first one to ``[B, C]``."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.embed, self.out = tokens, nn.Embedding(20, 8), nn.Linear(8, CLASSES)

    def forward(self, text: Tensor) -> Tensor:
        outputs: Tensor = self.out(self.embed(text)).transpose(1, 2)
        return outputs if self.tokens else outputs[:, :, 0]


def texts(count: int = 12) -> Tensor:
    return torch.randint(20, (count, TOKENS), generator=torch.Generator().manual_seed(1))


def worker(model: nn.Module, loss: PerSample, metric: PerSample | None = None) -> Worker:
    metrics = [] if metric is None else read_metrics("eval.metrics", {"m": metric})
    return Worker(model, loss, lambda params: torch.optim.SGD(params, lr=0.1), None, metrics=metrics)


def sums_of(mine: Worker, inputs: Tensor, targets: Tensor, batch_size: int = 5) -> Tensor:
    """Evaluate; return the sums of values and weights of the loss, then of the metric if there is one."""
    mine.evaluate(TensorSource(inputs, targets), np.arange(len(targets)), batch_size)
    return torch.cat([metric.sums for metric in mine.measures if isinstance(metric, SampleMean)])


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_as_in_pytorch(
    loss: PerSample, plain: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor, tokens: bool
) -> None:
    """Gradient of a batch, mean of the losses taken, and evaluation, in batches that do not divide the samples."""
    mine, model = worker(Tagger(tokens), loss), Tagger(tokens)
    mine.gradient(inputs, targets)
    expected = plain(model(inputs), targets)
    expected.backward()
    for ours, theirs in zip(gradients(mine.model), gradients(model), strict=True):
        torch.testing.assert_close(ours, theirs)
    losses, weights = mine.pop_losses()
    assert float(losses[weights > 0].sum() / weights.sum()) == pytest.approx(float(expected.detach()), rel=1e-5)
    sums = sums_of(mine, inputs, targets)
    assert mean(float(sums[0]), float(sums[1])) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("args", [
    {}, {"weight": WEIGHTS}, {"ignore_index": 2}, {"ignore_index": 2, "weight": WEIGHTS},
    {"ignore_index": -1, "weight": [0.0, 1.0, 1.0, 2.0]},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tokens", [False, True])
def test_a_batch_has_the_mean_of_pytorch(name: str, args: dict[str, Any], tokens: bool) -> None:
    """Where samples have equally many targets that count."""
    inputs = texts()
    targets = inputs % CLASSES if tokens else inputs[:, 0] % CLASSES
    if tokens:
        targets[:, 1] = args.get("ignore_index", -100)
        targets[:, [0, 2, 3, 4, 5]] = targets[:, [0, 2, 3, 4, 5]].clamp(min=3)  # one class: the same weights
    else:
        targets[3] = args.get("ignore_index", -100)
    given = {**args, "weight": torch.tensor(args["weight"])} if "weight" in args else args
    logs = (lambda outputs: outputs) if name == "cross_entropy" else partial(F.log_softmax, dim=1)
    ours = per_sample_loss(name, args)
    assert_as_in_pytorch(
        lambda outputs, y: ours(logs(outputs), y), lambda outputs, y: getattr(F, name)(logs(outputs), y, **given),
        inputs, targets, tokens,
    )  # fmt: skip


def test_label_smoothing_with_weights_and_probabilities_as_targets() -> None:
    inputs = texts()
    targets, args = inputs[:, 0] % CLASSES, {"label_smoothing": 0.2, "weight": WEIGHTS}
    targets[5] = -100
    plain = partial(F.cross_entropy, weight=torch.tensor(WEIGHTS), label_smoothing=0.2)
    assert_as_in_pytorch(per_sample_loss("cross_entropy", args), plain, inputs, targets, tokens=False)
    likely = torch.rand(12, CLASSES, generator=torch.Generator().manual_seed(0)).softmax(1)
    assert_as_in_pytorch(per_sample_loss("cross_entropy", args), plain, inputs, likely, tokens=False)


def test_targets_at_hand_are_looked_at_once_and_not_in_each_batch() -> None:
    outputs, targets = torch.randn(4, CLASSES, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    good, bad = torch.arange(CLASSES), torch.tensor([0, -100])
    for at_hand, looks in (([], True), ([good, good], False), ([good, bad], True), ([good, None], True)):
        for loss in (per_sample_loss("cross_entropy", {}, at_hand),
                     loss_of_module(nn.CrossEntropyLoss(reduction="none"), at_hand)):  # fmt: skip
            returned = loss(outputs, targets)
            assert isinstance(returned, tuple) and (returned[1] is not None) == looks
    assert per_sample_loss("cross_entropy", {"ignore_index": 2}, [good])(outputs, targets)[1] is not None


def ragged(pad: int = 0) -> tuple[Tensor, Tensor]:
    """Texts and targets of which 0 to T count in each."""
    inputs = texts()
    targets = inputs % CLASSES
    targets[torch.arange(TOKENS) >= torch.arange(12)[:, None] % (TOKENS + 1)] = -100
    more = torch.zeros(12, pad, dtype=torch.int64)
    return torch.cat([inputs, more], 1), torch.cat([targets, more - 100], 1)


@pytest.mark.parametrize("args", [{}, {"weight": WEIGHTS}], ids=str)
def test_ragged_samples_count_once_each_whatever_the_padding(args: dict[str, Any]) -> None:
    """A sample is the mean over what counts of it; the batch that over samples with anything; classes weigh in both."""
    of_class = torch.tensor(args.get("weight", [1.0] * CLASSES))
    found = []
    for pad in (0, 24):
        inputs, targets = ragged(pad)
        mine, model = worker(Tagger(True), per_sample_loss("cross_entropy", args), accuracy), Tagger(True)
        mine.gradient(inputs, targets)
        total, weight, expected = torch.zeros(()), torch.zeros(()), []
        for text, labels in zip(inputs, targets, strict=True):
            known = labels != -100
            if known.any():
                logits = model(text[None])[0].T[known]
                losses = F.cross_entropy(logits, labels[known], weight=of_class, reduction="none")
                total, weight = total + losses.mean(), weight + of_class[labels[known]].mean()
            expected.append(float(losses.detach().mean()) if known.any() else NOT_COUNTED)
        (total / weight).backward()
        for ours, theirs in zip(gradients(mine.model), gradients(model), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert mine.pop_losses()[0].tolist() == pytest.approx(expected, rel=1e-5)
        found.append((*gradients(mine.model), sums_of(mine, inputs, targets).float()))
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(plain, padded)


@pytest.mark.parametrize("tokens", [False, True])
def test_where_nothing_counts_there_is_no_gradient_and_no_nan(tokens: bool) -> None:
    inputs = texts()
    targets = torch.full_like(inputs, -100) if tokens else torch.full((12,), -100)
    mine = worker(Tagger(tokens), per_sample_loss("cross_entropy", {"weight": WEIGHTS}), accuracy)
    mine.gradient(inputs, targets)
    assert all(not gradient.any() for gradient in gradients(mine.model))
    losses, weights = mine.pop_losses()
    assert losses.tolist() == [NOT_COUNTED] * 12 and not weights.any()
    sums = sums_of(mine, inputs, targets)
    assert sums.tolist() == [0] * 4 and np.isnan(mean(0.0, 0.0))


def test_losses_of_elements_are_their_means() -> None:
    outputs, targets = torch.randn(4, 3, 5), torch.rand(4, 3, 5)
    for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits",
                 "poisson_nll_loss", "soft_margin_loss"):  # fmt: skip
        losses, weights = per_sample(name, name, per_sample_loss(name, {})(outputs, targets), {4})
        assert weights is None
        torch.testing.assert_close(losses.mean(), getattr(F, name)(outputs, targets))


# ---- what a function may return -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("returned", "samples", "values"), [
    (torch.tensor([1.0, 2.0]), 2, [1.0, 2.0]),
    (torch.tensor([[1.0], [2.0]]), 2, [1.0, 2.0]),
    (torch.tensor(3.0), 1, [3.0]),
    (torch.tensor([[3.0]]), 1, [3.0]),
    (torch.tensor([1, 2]), 2, [1.0, 2.0]),
    (torch.tensor([True, False]), 2, [1.0, 0.0]),
    (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), 2, [1.0, 2.0]),
    ((torch.tensor([1.0, 2.0]), torch.tensor([True, False])), 2, [1.0, 2.0]),
    ((torch.tensor([1.0, 2.0], dtype=torch.float64), None), 2, [1.0, 2.0]),
])  # fmt: skip
def test_one_number_a_sample_in_any_form(returned: Any, samples: int, values: list[float]) -> None:
    found, weights = per_sample("train.loss", "own", returned, {samples})
    assert found.tolist() == values and found.dtype in (torch.float32, torch.float64)
    assert weights is None or (weights.dtype == found.dtype and weights.tolist() == [1.0, 0.0])


@pytest.mark.parametrize(("returned", "output"), [
    (torch.tensor(1.0), "[]"),
    (torch.ones(3), "[3]"),
    (torch.ones(4, 4), "[4, 4]"),
    (torch.ones(2, 2), "[2, 2]"),
    (torch.ones(4, dtype=torch.complex64), "[4]"),
    ((torch.ones(4), torch.ones(3)), "[3]"),
    ((torch.ones(4), 1.0), "float"),
    ((torch.ones(4),) * 3, "tuple"),
    ([1.0] * 4, "list"),
    (None, "NoneType"),
])  # fmt: skip
def test_anything_else_is_told_with_both_numbers(returned: Any, output: str) -> None:
    with pytest.raises(ConfigError) as caught:
        per_sample("train.loss", "own", returned, {4})
    assert caught.value.problem == f"is not per sample: a batch of 4 gives {output}"


def test_a_batch_that_loses_a_sample_is_refused_where_it_does() -> None:
    def drops(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")[targets != 3]

    inputs = texts()
    mine = worker(Tagger(False), drops, lambda outputs, targets: torch.ones(len(targets) - 1))
    with pytest.raises(ConfigError, match=r"drops.* a batch of 12 gives \[\d\]"):
        mine.gradient(inputs, inputs[:, 0] % CLASSES)
    mine.gradient(inputs, inputs[:, 0] % 3)
    with pytest.raises(ConfigError, match=r"eval.metrics.m=.*: a batch of 5 gives \[4\]"):
        mine.evaluate(TensorSource(inputs, inputs[:, 0] % 3), np.arange(12), 5)


def test_a_loss_that_comes_to_depend_on_nothing_is_named() -> None:
    mine = worker(Tagger(False), lambda outputs, targets: outputs.detach().sum(1))
    with pytest.raises(ConfigError, match="depend on the model's parameters"):
        mine.gradient(texts(), texts()[:, 0] % CLASSES)


def test_a_functions_own_weights_are_those_of_the_mean() -> None:
    """A sample of weight 0 has no say, whatever its loss is."""
    inputs = texts()
    targets = inputs[:, 0] % CLASSES
    counts = targets != 0

    def own(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return torch.where(targets != 0, losses, 1e9 * losses), targets != 0

    mine, model = worker(Tagger(False), own, own), Tagger(False)
    mine.gradient(inputs, targets)
    expected = F.cross_entropy(model(inputs[counts]), targets[counts])
    expected.backward()
    for ours, theirs in zip(gradients(mine.model), gradients(model), strict=True):
        torch.testing.assert_close(ours, theirs)
    again = mine.gradient_again(inputs, targets, 0.5)
    torch.testing.assert_close(again[0], 0.5 * gradients(model)[0])
    sums = sums_of(mine, inputs, targets, 12).tolist()
    number = int(counts.sum())
    assert sums == pytest.approx([expected.item() * number, number] * 2, rel=1e-5)


def test_weights_that_come_to_make_no_mean_end_the_run() -> None:
    inputs = texts()
    mine = worker(Tagger(False), lambda outputs, targets: (outputs.sum(1), 1.0 - targets.float()))
    mine.gradient(inputs, 0 * inputs[:, 0])
    mine.pop_losses()
    mine.gradient(inputs, inputs[:, 0] % CLASSES)
    with pytest.raises(ConfigError, match="train.loss=.*weights from -.* to 1 make no mean"):
        mine.pop_losses()
    with pytest.raises(ConfigError, match="train.loss=.*make no mean"):
        mine.evaluate(TensorSource(inputs, inputs[:, 0] % CLASSES), np.arange(12), 5)


def test_what_is_passed_on_tells_what_does_not_count_from_what_has_gone_bad() -> None:
    losses = torch.tensor([1.0, float("nan"), -float("inf"), 5.0])
    values, weights = concat([(losses, torch.tensor([1.0, 1.0, 2.0, 0.0])), (torch.tensor([7.0]), None)])
    assert values.tolist() == pytest.approx([1.0, float("nan"), float("nan"), NOT_COUNTED, 7.0], nan_ok=True)
    assert weights.tolist() == [1.0, 1.0, 2.0, 0.0, 1.0]


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_numbers_and_lists_become_tensors_of_the_outputs_kind() -> None:
    outputs, targets = torch.randn(3, 2), torch.randint(2, (3, 2)).float()
    for kind in (torch.float32, torch.float64):
        for value in (2.5, [3.0, 1.0], [3, 1]):
            loss = per_sample_loss("binary_cross_entropy_with_logits", {"pos_weight": value})
            losses, _ = per_sample("", "", loss(outputs.to(kind), targets.to(kind)), {3})
            expected = F.binary_cross_entropy_with_logits(
                outputs.to(kind), targets.to(kind), pos_weight=torch.tensor(value, dtype=kind)
            )
            assert losses.dtype == kind
            torch.testing.assert_close(losses.mean(), expected)


def test_a_number_stays_one_where_a_function_takes_numbers_too() -> None:
    outputs, targets = torch.randn(3, 2), torch.randn(3, 2)
    losses, _ = per_sample("", "", per_sample_loss("gaussian_nll_loss", {"var": 0.5})(outputs, targets), {3})
    torch.testing.assert_close(losses.mean(), F.gaussian_nll_loss(outputs, targets, 0.5))


def test_a_function_of_the_users_own_gets_tensors_where_it_declares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(outputs: Any, targets: Tensor, scale: Tensor, names: Any = None) -> Tensor:
        assert isinstance(scale, Tensor) and scale.dtype == torch.float64 and names == [1, 2]
        return scale.sum().expand(3)

    monkeypatch.setattr("hvd_hetero.worker.factories.import_target", lambda key, name: own)
    loss = per_sample_loss("m:own", {"scale": [1, 2], "names": [1, 2]})
    outputs = torch.ones(3, 2).double()
    for given in (outputs, {"name": "head", "logits": outputs}, [None, (outputs,)]):
        assert per_sample("", "", loss(given, None), {3})[0].tolist() == [3.0] * 3


@pytest.mark.parametrize(("name", "args", "key", "output"), [
    ("cross_entropy", {"weight": [1.0, "a"]}, "train.loss_args.weight", "makes no tensor"),
    ("cross_entropy", {"weight": [[1.0], [1.0, 2.0]]}, "train.loss_args.weight", "makes no tensor"),
    ("cross_entropy", {"weight": [1.0, float("nan")]}, "train.loss_args.weight", "finite"),
    ("nll_loss", {"weight": [1.0, -1.0]}, "train.loss_args.weight", "negative"),
    ("nll_loss", {"weight": [0.0, 0.0]}, "train.loss_args.weight", "all are 0"),
    ("mse_loss", {"reduction": "mean"}, "train.loss", "one number a batch"),
    ("kl_div", {"reduction": "batchmean"}, "train.loss", "one number a batch"),
])  # fmt: skip
def test_arguments_that_cannot_be_meant(name: str, args: Mapping[str, Any], key: str, output: str) -> None:
    with pytest.raises(ConfigError) as caught:
        per_sample_loss(name, args)
    assert caught.value.key == key and output in caught.value.problem


@pytest.mark.parametrize(("kind", "args"), [(nn.CrossEntropyLoss, {"label_smoothing": 0.1}), (nn.NLLLoss, {})])
def test_modules_of_torch_are_what_their_functions_are(kind: Any, args: dict[str, Any]) -> None:
    inputs, args = texts(), {"weight": torch.tensor(WEIGHTS), "ignore_index": 1, **args}
    ours, plain = loss_of_module(kind(reduction="none", **args)), kind(**args)
    assert_as_in_pytorch(ours, plain, inputs, inputs[:, 0] % CLASSES, tokens=False)
    other = nn.MSELoss(reduction="none")
    assert loss_of_module(other) is other


class Scaled(nn.Module):
    """A user's module as many are: a mean, or one number for each element; ``over`` what counts of it."""

    def __init__(self, by: float = 3.0, reduction: str = "mean", over: float = 1.0) -> None:
        super().__init__()
        self.reduction, self.over = reduction, over
        self.register_buffer("by", torch.tensor(by))

    def forward(self, outputs: Tensor, targets: Tensor, shift: float = 0.0) -> Tensor:
        losses: Tensor = self.by * (outputs - targets - shift) ** 2
        return losses.mean() / self.over if self.reduction == "mean" else losses


@pytest.mark.parametrize("plain", [
    nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(delta=0.3), nn.KLDivLoss(log_target=True), Scaled(),
    nn.BCEWithLogitsLoss(weight=torch.tensor([2.0, 1.0, 0.5, 1.0]), pos_weight=torch.tensor(WEIGHTS)),
], ids=lambda module: type(module).__name__)  # fmt: skip
def test_a_module_that_returns_the_mean_gives_each_sample_its_own_loss(plain: nn.Module) -> None:
    """Whose mean is that of the module, which stays as it is."""
    inputs, targets = texts(), torch.rand(12, CLASSES, generator=torch.Generator().manual_seed(2))
    ours = loss_of_module(plain)
    assert isinstance(ours, SampleLosses) and plain.reduction == "mean"
    assert_as_in_pytorch(ours, plain, inputs, targets, tokens=False)
    outputs = torch.randn(3, CLASSES)
    each = torch.stack([plain(outputs[i : i + 1], targets[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(ours(outputs, targets[:3]), each)
    tried("loss", "own", ours, outputs, targets[:3])


def tried(key: str, value: str, loss: PerSample, outputs: Tensor, targets: Tensor) -> None:
    try_loss(key, value, loss, {}, Batched(outputs, targets, len(targets), 8))


@pytest.mark.parametrize(("kind", "args"), [
    (nn.CrossEntropyLoss, {"label_smoothing": 0.1}), (nn.NLLLoss, {}),
    (type("Renamed", (nn.CrossEntropyLoss,), {}), {}),
])  # fmt: skip
def test_a_mean_over_classes_is_divided_by_what_counts(kind: Any, args: dict[str, Any]) -> None:
    inputs, plain = texts(), kind(torch.tensor(WEIGHTS), ignore_index=1, **args)
    ours = loss_of_module(plain)
    assert isinstance(ours, SampleLosses)
    assert_as_in_pytorch(ours, plain, inputs, inputs[:, 0] % CLASSES, tokens=False)


def of_one_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).mean()


class Focal(Scaled):
    """What its mean is divided by is in its code alone."""

    ignore_index = -1


class Fixed(Scaled):
    """Whose reduction cannot be set."""

    reduction = property(lambda self: "mean", lambda self, value: None)  # type: ignore[assignment]


@pytest.mark.parametrize("given", [
    of_one_sample, nn.MSELoss(reduction="sum"), nn.KLDivLoss(reduction="batchmean"), Focal(), Fixed(),
], ids=["function", "sum", "batchmean", "ignore_index", "fixed"])  # fmt: skip
def test_a_mean_that_cannot_be_taken_apart_is_refused(given: Any) -> None:
    outputs, targets = torch.randn(2, CLASSES), torch.rand(2, CLASSES)
    with pytest.raises(ConfigError, match="is not per sample"):
        tried("loss", "own", loss_of_module(given), outputs, targets)


def test_a_mean_of_something_else_is_refused() -> None:
    outputs, targets = torch.randn(2, CLASSES), torch.rand(2, CLASSES)
    with pytest.raises(ConfigError, match="its mean is another one") as caught:
        tried("loss", "own", loss_of_module(Scaled(over=2.0)), outputs, targets)
    assert "reduction='none'" in caught.value.remedy


def test_a_mean_over_pairs_of_samples_is_refused_as_other_losses_are() -> None:
    with pytest.raises(ConfigError, match="broadcasts"), pytest.warns(UserWarning, match="broadcasting"):
        tried("loss", "MSELoss", loss_of_module(nn.MSELoss()), torch.randn(2, 1), torch.rand(2))


def test_a_class_of_modules_is_made_with_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function, and a module that there is already, are called with them."""
    outputs, targets = torch.zeros(2, 3), torch.ones(2, 3)
    ours = per_sample_loss("torch.nn:BCEWithLogitsLoss", {"pos_weight": [1.0, 2.0, 4.0]})
    expected = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 4.0]))(outputs, targets)
    torch.testing.assert_close(ours(outputs, targets), expected.expand(2))
    mine = per_sample_loss("torch.nn:CrossEntropyLoss", {"weight": [1.0, 0.0, 0.0], "ignore_index": 2})
    values, weights = mine(torch.zeros(3, 3), torch.arange(3))
    assert isinstance(mine, SampleLosses) and weights.tolist() == [1.0, 0.0, 0.0] and values[1:].tolist() == [0.0, 0.0]
    with pytest.raises(ConfigError, match="train.loss_args.wieght"):
        per_sample_loss("torch.nn:CrossEntropyLoss", {"wieght": [1.0]})
    monkeypatch.setattr("hvd_hetero.worker.factories.import_target", lambda key, name: Scaled(by=1.0))
    assert per_sample_loss("m:own", {"shift": 1.0})(torch.ones(2, 3), torch.zeros(2, 3)).tolist() == [0.0, 0.0]


# ---- modules as metrics ---------------------------------------------------------------------------------------------


def metric_of(outputs: Tensor, targets: Tensor, entry: Any) -> float:
    """Try a metric on some samples as the dry run does, and compute it over two batches of unequal size."""
    (metric,) = read_metrics("eval.metrics", {"m": entry})
    some, *both = [(outputs[rows], targets[rows]) for rows in (slice(2), slice(5), slice(5, None))]
    tried = closely(metric, lambda targets: Batched(*some, 2, 8))
    for taken, parts in ((tried, [some]), (metric, both)):
        taken.begin(torch.device("cpu"))
        for part in parts:
            taken.add(*part, part[0])
    return metric.figures()["m"]


@pytest.mark.parametrize("over", ["samples", "dataset"])
@pytest.mark.parametrize(("entry", "plain"), [
    ({"target": nn.L1Loss()}, nn.L1Loss()),
    ({"target": "torch.nn:HuberLoss", "args": {"delta": 0.3}}, nn.HuberLoss(delta=0.3)),
    ({"target": "torch.nn:BCEWithLogitsLoss", "args": {"pos_weight": WEIGHTS}},
     nn.BCEWithLogitsLoss(pos_weight=torch.tensor(WEIGHTS))),
    ({"target": nn.CrossEntropyLoss(torch.tensor(WEIGHTS), ignore_index=1)},
     nn.CrossEntropyLoss(torch.tensor(WEIGHTS), ignore_index=1)),
], ids=["object", "class", "class with a tensor", "classes"])  # fmt: skip
def test_a_module_that_returns_a_mean_is_a_metric_too(entry: dict[str, Any], plain: nn.Module, over: str) -> None:
    generator = torch.Generator().manual_seed(3)
    outputs, targets = torch.randn(12, CLASSES, generator=generator), torch.rand(12, CLASSES, generator=generator)
    targets = targets.argmax(1) if isinstance(plain, nn.CrossEntropyLoss) else targets
    found = metric_of(outputs, targets, {**entry, "over": over})
    assert found == pytest.approx(float(plain(outputs, targets)), rel=1e-5)


def test_a_metric_whose_mean_is_of_something_else_is_refused_by_its_key() -> None:
    outputs, targets = torch.randn(12, CLASSES), torch.rand(12, CLASSES)
    for entry, key, said in (
        ({"target": Scaled(over=2.0)}, "eval.metrics.m", "its mean is another one"),
        ({"target": nn.MSELoss(reduction="sum")}, "eval.metrics.m", "is not per sample"),
        ({"target": nn.NLLLoss(torch.tensor([-1.0] * CLASSES))}, "eval.metrics.m.args.weight", "negative"),
        ({"target": "torch.nn:HuberLoss", "args": {"dleta": 1.0}}, "eval.metrics.m.args.dleta", "unknown"),
    ):
        with pytest.raises(ConfigError) as caught:
            metric_of(outputs, targets, entry)
        assert caught.value.key == key and said in caught.value.problem


# ---- accuracy -------------------------------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_what_counts() -> None:
    outputs = torch.eye(3)[torch.tensor([[0, 1, 2, 0], [1, 1, 0, 0]])].transpose(1, 2)
    targets = torch.tensor([[0, 1, 0, -100], [-100] * 4])
    values, weights = accuracy(outputs, targets)
    assert values.tolist() == pytest.approx([2 / 3, 0.0]) and weights is not None and weights.tolist() == [1.0, 0.0]
    values, weights = accuracy(outputs, targets.clamp(min=0), ignored=0)
    assert values.tolist() == [1.0, 0.0] and weights is not None and weights.tolist() == [1.0, 0.0]


def test_a_model_that_has_diverged_is_never_right() -> None:
    assert accuracy(torch.full((3, 2), torch.nan), torch.zeros(3, dtype=torch.int64))[0].tolist() == [0.0] * 3
