"""What an evaluation is called, how good it is, and which one the best checkpoint goes by."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.config.load import device_classes
from hvd_hetero.config.schema import EvalConfig
from hvd_hetero.data import TensorSource
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import make_plan
from hvd_hetero.training.best import BestEvaluation
from hvd_hetero.training.evaluation import evaluate
from hvd_hetero.worker.factories import per_sample_loss
from hvd_hetero.worker.index_feed import check_number
from hvd_hetero.worker.metrics import read_metrics
from hvd_hetero.worker.worker import Worker

pytestmark = pytest.mark.horovod


class Alone:
    """The communication of a rank that has nobody to add up with."""

    rank, size = 0, 1

    @staticmethod
    def sum(values: Any, name: str) -> list[float]:
        return list(values)


def evaluated(metrics: Any, targets: Tensor, loss: Any = None) -> dict[str, float]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    loss = loss or per_sample_loss("cross_entropy", {})
    worker = Worker(model, loss, lambda params: torch.optim.SGD(params, lr=0.1), None,
                    metrics=read_metrics("eval.metrics", metrics))
    cluster = assign(device_classes({"a": {"ranks": [0]}}), [RankFacts(0, "here", 0, (), "cpu", (0,))])
    plan = make_plan(cluster, 10, {"a": 1}, {"a": 2})
    test = TensorSource(torch.randn(len(targets), 4, generator=torch.Generator().manual_seed(1)), targets)
    return evaluate(Alone(), worker, test, plan, EvalConfig(batch_size=3))  # type: ignore[arg-type]


def outputs_of(count: int) -> Tensor:
    torch.manual_seed(0)
    outputs: Tensor = nn.Linear(4, 3)(torch.randn(count, 4, generator=torch.Generator().manual_seed(1)))
    return outputs.detach()


ACCURACY = {"accuracy": "accuracy"}


def test_figures_are_means_over_what_counts() -> None:
    targets = torch.tensor([0, -100, 2, 1, -100, -100, 1])
    known = targets[targets != -100]
    figures = evaluated(ACCURACY, targets)
    outputs = outputs_of(7)[targets != -100]
    assert figures["eval_loss"] == pytest.approx(nn.functional.cross_entropy(outputs, known).item(), rel=1e-5)
    assert figures["eval_accuracy"] == pytest.approx(float((outputs.argmax(1) == known).float().mean()))


def test_where_nothing_counts_there_is_no_figure() -> None:
    figures = evaluated(ACCURACY, torch.full((4,), -100))
    assert all(math.isnan(value) for value in figures.values()) and len(figures) == 2


def of_all(outputs: Any, targets: Tensor, more: float = 0.0) -> dict[str, Any]:
    """A function of the whole set: what it was given, as numbers; what is no number is none of its figures."""
    return {"outputs": outputs.sum(), "targets": targets.double().mean(), "more": more, "vector": outputs[0]}


def test_several_metrics_of_every_kind() -> None:
    """In three batches, of 3, 3 and 1."""
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    targets = torch.tensor([0, 1, 2, 1, 0, 1, 1])
    f1 = torchmetrics.classification.MulticlassF1Score
    figures = evaluated({
        "ones": lambda outputs, targets: targets == 1,
        "all": {"target": of_all, "over": "dataset", "args": {"more": 0.5}},
        "f1": {"target": "torchmetrics.classification:MulticlassF1Score", "args": {"num_classes": 3}},
        "own": f1(num_classes=3, average="micro"),
    }, targets)  # fmt: skip
    outputs = outputs_of(7)
    assert figures.keys() == {
        "eval_loss", "eval_ones", "eval_all_outputs", "eval_all_targets", "eval_all_more", "eval_f1", "eval_own"
    }  # fmt: skip
    assert figures["eval_ones"] == pytest.approx(4 / 7) and figures["eval_all_more"] == 0.5
    assert figures["eval_all_outputs"] == pytest.approx(float(outputs.sum()), rel=1e-5)
    assert figures["eval_all_targets"] == pytest.approx(float(targets.double().mean()))
    assert figures["eval_f1"] == pytest.approx(float(f1(num_classes=3)(outputs, targets)))
    assert figures["eval_own"] == pytest.approx(float((outputs.argmax(1) == targets).float().mean()))


def test_arrays_are_joined_and_what_cannot_be_sent_is_refused_on_trial() -> None:
    """What ranks send to one of them is unpickled there by torch, which takes plain values alone."""
    (metric,) = read_metrics("eval.metrics", {"m": {"target": lambda out, y: float(len(out["a"])), "over": "dataset"}})
    metric.begin(torch.device("cpu"))
    for count in (3, 4):
        metric.add({"a": np.ones(count), "name": "head", "none": None}, torch.zeros(count), None)
    assert metric.figures() == {"m": 7.0}
    metric.begin(torch.device("cpu"))
    metric.add({"a": np.ones(3), "cache": SimpleNamespace(keys=1)}, torch.zeros(3), None)
    with pytest.raises(ConfigError, match="eval.metrics.m=.* go to one rank, and may only hold tensors"):
        metric.figures()


def test_batches_of_containers_and_of_lists_are_joined() -> None:
    """A list has an entry for each sample, as boxes have."""
    seen: list[Any] = []
    (metric,) = read_metrics("eval.metrics", {"m": {"target": lambda *both: seen.append(both) or 1, "over": "dataset"}})
    metric.begin(torch.device("cpu"))
    for start, stop in ((0, 2), (2, 3)):
        outputs = {"logits": torch.arange(start, stop), "boxes": [torch.ones(i) for i in range(start, stop)]}
        metric.add(outputs, (torch.arange(start, stop), torch.tensor(start)), None)
    assert metric.figures() == {"m": 1.0}
    ((outputs, targets),) = seen
    assert outputs["logits"].tolist() == [0, 1, 2] and [len(box) for box in outputs["boxes"]] == [0, 1, 2]
    assert targets[0].tolist() == [0, 1, 2] and targets[1].tolist() == [0, 2]


# ---- which one is the best ------------------------------------------------------------------------------------------


def judge(best: Any, *names: str) -> BestEvaluation:
    return BestEvaluation(best, read_metrics("eval.metrics", {name: "accuracy" for name in names}))


@pytest.mark.parametrize(("by", "row", "score"), [
    (judge(None, "accuracy"), {"train_loss": 1.0}, None),
    (judge(None), {"eval_loss": 0.5}, -0.5),
    (judge(None, "f1"), {"eval_loss": 0.5, "eval_f1": 3.0}, -0.5),
    (judge(None, "f1", "accuracy"), {"eval_loss": 0.5, "eval_accuracy": 0.75}, 0.75),
    (judge(None, "accuracy"), {"eval_loss": math.inf, "eval_accuracy": 0.75}, 0.75),
    (judge(None, "accuracy"), {"eval_loss": math.nan, "eval_accuracy": 0.75}, None),
    (judge({"metric": "f1", "mode": "max"}, "f1"), {"eval_loss": 0.5, "eval_f1": math.nan}, None),
    (judge({"metric": "f1", "mode": "max"}, "f1", "accuracy"), {"eval_loss": 0.5, "eval_f1": 0.25}, 0.25),
    (judge({"metric": "rmse", "mode": "min"}, "rmse"), {"eval_loss": 0.5, "eval_rmse": 2.0}, -2.0),
])  # fmt: skip
def test_score_of_an_evaluation(by: BestEvaluation, row: dict[str, Any], score: float | None) -> None:
    assert by.score(row) == score


def test_the_best_one_is_never_nan_and_the_others_are_counted() -> None:
    best, since = judge({"metric": "rmse", "mode": "min"}, "rmse"), []
    for value in (math.nan, 0.5, math.nan, 0.75, 0.5, 0.25):
        best.enter({"eval_loss": 1.0, "eval_rmse": value})
        since.append(best.since)
    assert since == [1, 0, 1, 2, 3, 0]
    assert best.summary() == {"final_loss": 1.0, "final_rmse": 0.25, "best_rmse": 0.25}
    best.enter({"eval_loss": 1.0, "eval_rmse": math.nan, "averaged_loss": 2.0})
    assert best.summary() == {"final_loss": 1.0, "final_rmse": None, "averaged_loss": 2.0, "best_rmse": 0.25}
    again, other = judge({"metric": "rmse", "mode": "min"}, "rmse"), judge({"metric": "loss", "mode": "min"}, "rmse")
    for one in (again, other):
        one.load_state_dict(best.state_dict())
    assert (again.value, again.since) == (0.25, 1) and (other.value, other.since) == (None, 0)


def test_losses_of_another_number_than_there_were_samples() -> None:
    check_number(120, 120)
    with pytest.raises(ConfigError, match=r"119 losses: there were 120 samples"):
        check_number(119, 120)
