"""What would be wrong in silence with a loss or a metric is refused, and nothing else is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_hetero.errors import ConfigError
from hvd_hetero.worker.factories import accuracy, per_sample_loss
from hvd_hetero.worker.loss_checks import Batched, closely, try_loss, try_metric
from hvd_hetero.worker.metrics import Metric, SampleMean, read_metrics

F = nn.functional
Shape = tuple[int, ...]


def batched(outputs: Any, targets: Any, batch: int = 4) -> Batched:
    return Batched(outputs, targets, 2, batch)


def numbers(*shapes: Shape) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(shape, generator=generator) for shape in shapes)


def tried(loss: Any, outputs: Any, targets: Any, args: Any = None) -> None:
    """As the dry run does; a name is one of torch.nn.functional."""
    if isinstance(loss, str):
        made = per_sample_loss(loss, args or {})
        try_loss("train.loss", loss, made, args or {}, batched(outputs, targets))
    else:
        try_loss("train.loss", "m:own", loss, {}, batched(outputs, targets))


# ---- losses by name -------------------------------------------------------------------------------------------------

ELEMENTWISE = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "kl_div",
               "binary_cross_entropy_with_logits", "poisson_nll_loss", "soft_margin_loss", "hinge_embedding_loss",
               "multilabel_soft_margin_loss")  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize(("outputs", "targets"), [
    ((2, 1), (2,)), ((2,), (2, 1)), ((2, 5, 1), (2, 5)), ((2, 5), (2, 5, 1)), ((2, 1, 3, 3), (2, 3, 3)),
    ((2, 1), (2, 5)), ((2, 2, 1), (2, 2)), ((2, 3, 2, 2), (2, 2, 2)),
])  # fmt: skip
def test_elements_need_one_shape(name: str, outputs: Shape, targets: Shape) -> None:
    with pytest.raises(ConfigError) as caught:
        tried(name, *numbers(outputs, targets))
    assert caught.value.key == "train.loss" and caught.value.value == name
    for shape in (outputs, targets):
        assert str([4, *shape[1:]]) in caught.value.problem, "as the batches of the run are"


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("shape", [(2, 1), (2, 5), (2, 5, 3), (2, 1, 3, 3)])
def test_equal_shapes_are_right(name: str, shape: Shape) -> None:
    tried(name, *numbers(shape, shape))


@pytest.mark.parametrize(("outputs", "targets"), [((2, 3), (2,)), ((2, 3, 5), (2, 5)), ((2, 3, 4, 4), (2, 4, 4))])
def test_class_numbers_have_another_shape(outputs: Shape, targets: Shape) -> None:
    tried("cross_entropy", numbers(outputs)[0], torch.ones(targets, dtype=torch.int64))
    tried("cross_entropy", *numbers(outputs, outputs))


@pytest.mark.parametrize("targets", [torch.zeros(2, dtype=torch.int64), torch.rand(2, 1)])
def test_a_single_class_teaches_nothing(targets: Tensor) -> None:
    with pytest.raises(ConfigError, match="single class"):
        tried("cross_entropy", numbers((2, 1))[0], targets)


@pytest.mark.parametrize(("shape", "weights", "fits"), [
    ((2, 3), [1.0, 2.0, 3.0], True), ((2, 3), [1.0], True), ((2, 3), 2.0, True), ((2,), [1.0], True), ((2,), 2.0, True),
    ((2,), [1.0, 2.0], False), ((2, 3), [1.0, 2.0], False), ((2, 3), [[1.0] * 3, [2.0] * 3], False),
    ((2, 3, 4), [1.0] * 4, True), ((2, 3, 4), [[1.0], [2.0], [3.0]], True), ((2, 3, 4), [1.0] * 3, False),
])  # fmt: skip
def test_weights_of_elements_are_those_of_a_sample(shape: Shape, weights: Any, fits: bool) -> None:
    """Not of the two samples that happen to be tried."""
    words = ("binary_cross_entropy_with_logits", *numbers(shape, shape), {"pos_weight": weights})
    if fits:
        tried(*words)
        return
    with pytest.raises(ConfigError) as caught:
        tried(*words)
    assert caught.value.key == "train.loss_args.pos_weight"


# ---- losses of one's own --------------------------------------------------------------------------------------------


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    column = F.mse_loss(outputs, targets[:, None], reduction="none")
    return (column * (1 + targets)).mean(1)


def by_expansion(outputs: Tensor, targets: Tensor) -> Tensor:
    """As functions of torch do; they warn of it."""
    return F.mse_loss(*torch.broadcast_tensors(outputs, targets), reduction="none").flatten(1).mean(1)


BROADCAST: list[tuple[str, Callable[[Any, Tensor], Tensor], Shape, Shape]] = [
    ("difference", lambda o, y: ((o - y) ** 2).mean(1), (2, 1), (2,)),
    ("the other way", lambda o, y: ((y - o) ** 2).mean(0), (2, 1), (2,)),
    ("targets are a column", lambda o, y: (o - y).abs().mean(0), (2,), (2, 1)),
    ("function of torch", lambda o, y: F.smooth_l1_loss(o, y, reduction="none").mean(1), (2, 1), (2,)),
    ("expanded", by_expansion, (2, 1), (2,)),
    ("images", lambda o, y: ((o - y) ** 2).flatten(1).mean(1), (2, 1, 3, 3), (2, 3, 3)),
    ("binary", lambda o, y: -(y * F.logsigmoid(o) + (1 - y) * F.logsigmoid(-o)).mean(1), (2, 1), (2,)),
    ("chosen", lambda o, y: torch.where(y > 0.5, o, 1 - o).sum(1), (2, 1), (2,)),
    ("weights of samples", weighted, (2, 1), (2,)),
    ("among others", lambda o, y: ((o["mean"][0] - y["y"]) ** 2).mean(1), (2, 1), (2,)),
]


@pytest.mark.parametrize(("own", "outputs", "targets"), [case[1:] for case in BROADCAST],
                         ids=[case[0] for case in BROADCAST])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_pairs_all_samples_unnoticed_is_refused(own: Any, outputs: Shape, targets: Shape) -> None:
    first, second = numbers(outputs, targets)
    given: Any = first
    if own is BROADCAST[-1][1]:
        given, second = {"mean": (first,), "name": "head", "none": None}, {"y": second, "names": ["a", "b"]}  # type: ignore
    for call in (lambda: tried(own, given, second), lambda: try_metric("metric", "own", own, batched(given, second))):
        with pytest.raises(ConfigError) as caught:
            call()
        for shape in (outputs, targets):
            assert str([4, *shape[1:]]) in caught.value.problem


def of_set(function: Any, *shapes: Shape) -> Metric:
    """A metric of the whole set as the dry run has it, filled with two batches."""
    entry = {"target": function, "over": "dataset"}
    metric = closely(read_metrics("eval.metrics", {"own": entry})[0], lambda targets: Batched(None, targets, 4, 8))
    metric.begin(torch.device("cpu"))
    for _ in range(2):
        metric.add(*numbers(*shapes), None)
    return metric


def rmse(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).mean().sqrt()


@pytest.mark.parametrize("shapes", [((2, 1), (2,)), ((2,), (2, 1))])
def test_a_metric_of_the_whole_set_that_pairs_all_samples_is_refused(shapes: tuple[Shape, Shape]) -> None:
    with pytest.raises(ConfigError, match="broadcasts outputs .* against each other") as caught:
        of_set(rmse, *shapes).figures()
    assert caught.value.key == "eval.metrics.own"
    assert all(str([8, *shape[1:]]) in caught.value.problem for shape in shapes)


@pytest.mark.parametrize(("function", "shapes"), [
    (rmse, ((2, 1), (2, 1))), (rmse, ((2,), (2,))), (lambda o, y: rmse(o.squeeze(1), y), ((2, 1), (2,))),
    (lambda o, y: (o.argmax(1) == y).float().mean(), ((2, 3), (2,))),
    (lambda o, y: (o[y > 0.5][:, None] > o[y <= 0.5]).float().mean(), ((2, 1), (2,))),
])  # fmt: skip
def test_a_metric_of_the_whole_set_that_is_meant_is_taken(function: Any, shapes: tuple[Shape, Shape]) -> None:
    assert set(of_set(function, *shapes).figures()) == {"own"}


def pairwise(outputs: Tensor, targets: Tensor) -> Tensor:
    """Ranks all pairs of samples."""
    scores = outputs.flatten()
    return F.softplus(-(scores[:, None] - scores) * (targets[:, None] - targets).sign()).mean(1)


def pairwise_as_it_comes(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.softplus(-(outputs - outputs[:, 0]) * (targets[:, None] - targets).sign()).mean(1)


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    same = (targets[:, None] == targets).float()
    return -(same * (outputs @ outputs.T).log_softmax(1)).mean(1)


def retrieval(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each of the predictions is to be nearest to its own target."""
    distances = ((outputs[:, None] - targets) ** 2).sum(-1)
    return F.cross_entropy(-distances, torch.arange(len(outputs)), reduction="none")


def standardized(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - (targets - targets.mean()) / (targets.std() + 1)) ** 2


def proportions(outputs: Tensor, targets: Tensor) -> Tensor:
    """Goes by what the batch has in common, on purpose."""
    return (outputs.mean() - targets.mean()).square().expand(len(targets))


def mixed(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.7 * (outputs[:, 0] - targets) ** 2 + 0.3 * (outputs[:, 0] - targets.flip(0)) ** 2


def halves(outputs: Tensor, targets: Tensor) -> Tensor:
    """Takes even batches only."""
    first, second = outputs.flatten().view(2, -1)
    return torch.cat([first - second, second - first]) * targets


MEANT: list[tuple[str, Callable[[Any, Tensor], Tensor], Shape, Shape]] = [
    ("first column", lambda o, y: (o[:, 0] - y) ** 2, (2, 1), (2,)),
    ("squeezed", lambda o, y: F.mse_loss(o.squeeze(1), y, reduction="none"), (2, 1), (2,)),
    ("unsqueezed", lambda o, y: F.mse_loss(o, y[:, None], reduction="none").mean(1), (2, 1), (2,)),
    ("viewed", lambda o, y: (o.view_as(y) - y).abs(), (2, 1), (2,)),
    ("targets of a column", lambda o, y: (o - y[:, 0]).abs(), (2,), (2, 1)),
    ("tokens", lambda o, y: ((o[..., 0] - y) ** 2).mean(1), (2, 5, 1), (2, 5)),
    ("images", lambda o, y: ((o[:, 0] - y) ** 2).flatten(1).mean(1), (2, 1, 3, 3), (2, 3, 3)),
    ("quantiles", lambda o, y: (y[:, None] - o).abs().mean(1), (2, 3), (2,)),
    ("quantiles of a column", lambda o, y: (y - o).abs().mean(1), (2, 3), (2, 1)),
    ("classes", lambda o, y: F.cross_entropy(o, (y > 0.5).long(), reduction="none"), (2, 2), (2,)),
    ("gathered", lambda o, y: -o.log_softmax(1).gather(1, (y > 0.5).long()[:, None])[:, 0], (2, 2), (2,)),
    ("mapped", lambda o, y: torch.vmap(lambda a, b: ((a - b) ** 2).sum())(o, y), (2, 1), (2,)),
    ("ordered", lambda o, y: o[y.argsort()][:, 0] * y, (2, 1), (2,)),
    ("scalar product", lambda o, y: o[:, 0] * (o.T @ y), (2, 1), (2,)),
    ("pairs", pairwise, (2, 1), (2,)),
    ("pairs as they come", pairwise_as_it_comes, (2, 1), (2,)),
    ("contrastive", contrastive, (2, 3), (2,)),
    ("contrastive, one number", contrastive, (2, 1), (2,)),
    ("retrieval", retrieval, (2, 3), (2, 3)),
    ("standardized", standardized, (2, 1), (2,)),
    ("proportions", proportions, (2, 1), (2,)),
    ("mixed", mixed, (2, 1), (2,)),
    ("halves", halves, (2, 1), (2,)),
    ("no targets", lambda o, y: (o**2).mean(1), (2, 1), (2,)),
]


@pytest.mark.parametrize(("own", "outputs", "targets"), [case[1:] for case in MEANT], ids=[case[0] for case in MEANT])
def test_what_is_meant_is_not_refused(own: Any, outputs: Shape, targets: Shape) -> None:
    tried(own, *numbers(outputs, targets))


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, math.nan], [math.inf, 1.0]])
def test_weights_that_make_no_mean_are_refused(weights: list[float]) -> None:
    def own(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return outputs[:, 0], torch.tensor(weights)

    metric, both = SampleMean("own", "eval.metrics.own", "m:own", own), numbers((2, 3), (2,))
    for tries in (lambda: tried(own, *both), lambda: metric.add(*both, None)):
        with pytest.raises(ConfigError, match="m:own.*weights from .* make no mean"):
            tries()


def test_a_loss_that_would_have_to_be_trained_itself_is_refused() -> None:
    class Margin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return self.scale * F.cross_entropy(outputs, targets, reduction="none")

    own = Margin()
    with pytest.raises(ConfigError, match="parameters of its own"):
        tried(own, torch.rand(2, 3), torch.ones(2, dtype=torch.int64))
    tried(own.requires_grad_(False), torch.rand(2, 3), torch.ones(2, dtype=torch.int64))


# ---- accuracy -------------------------------------------------------------------------------------------------------


def accuracy_of(outputs: Any, targets: Any) -> None:
    try_metric("eval.metrics.accuracy", "accuracy", accuracy, batched(outputs, targets))


@pytest.mark.parametrize(("outputs", "targets", "output"), [
    (torch.rand(2, 1), torch.rand(2), "[4] are float32"),
    (torch.rand(2), torch.rand(2), "[4] are float32"),
    (torch.rand(2, 3), torch.rand(2, 3), "[4, 3] are float32"),
    (torch.rand(2, 1), torch.ones(2, dtype=torch.int64), "outputs [4, 1] and targets [4]"),
    (torch.rand(2), torch.ones(2, dtype=torch.int64), "outputs [4] and targets [4]"),
    (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.int64), "outputs [4, 3] and targets [4, 3]"),
    (torch.rand(2, 5, 3), torch.ones(2, 5, dtype=torch.int64), "outputs [4, 5, 3] and targets [4, 5]"),
    (torch.rand(2, 3), torch.ones(2, 1, dtype=torch.int64), "outputs [4, 3] and targets [4, 1]"),
    ((torch.rand(2, 3), None), torch.ones(2, dtype=torch.int64), "takes tensors"),
    (torch.rand(2, 3), {"a": torch.ones(2)}, "takes tensors"),
])  # fmt: skip
def test_what_has_no_accuracy(outputs: Any, targets: Any, output: str) -> None:
    with pytest.raises(ConfigError) as caught:
        accuracy_of(outputs, targets)
    assert caught.value.key == "eval.metrics.accuracy" and output in caught.value.problem
    assert "set eval.metrics={}" in caught.value.remedy


@pytest.mark.parametrize(("outputs", "targets"), [((2, 3), (2,)), ((2, 3, 5), (2, 5)), ((2, 2, 4, 4), (2, 4, 4))])
def test_what_has_an_accuracy(outputs: Shape, targets: Shape) -> None:
    for kind in (torch.int64, torch.int32, torch.uint8, torch.bool):
        accuracy_of(torch.rand(outputs), torch.ones(targets, dtype=kind))
