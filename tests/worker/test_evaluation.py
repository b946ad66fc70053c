"""What an evaluation is called, how good it is, and which one the best checkpoint goes by."""

from __future__ import annotations

import math
from typing import Any

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
from hvd_hetero.training.evaluation import evaluate
from hvd_hetero.training.run_records import how_good, note
from hvd_hetero.worker.factories import metric_by_name, per_sample_loss
from hvd_hetero.worker.index_feed import check_number
from hvd_hetero.worker.worker import Worker

pytestmark = pytest.mark.horovod


class Alone:
    """The communication of a rank that has nobody to add up with."""

    rank = 0

    @staticmethod
    def sum(values: Any, name: str) -> list[float]:
        return list(values)


def evaluated(metric: Any, targets: Tensor, loss: Any = None) -> dict[str, float | None]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    loss = loss or per_sample_loss("cross_entropy", {})
    worker = Worker(model, loss, lambda params: torch.optim.SGD(params, lr=0.1), None, metric=metric)
    cluster = assign(device_classes({"a": {"ranks": [0]}}), [RankFacts(0, "here", 0, (), "cpu", (0,))])
    plan = make_plan(cluster, 10, {"a": 1}, {"a": 2})
    test = TensorSource(torch.randn(len(targets), 4, generator=torch.Generator().manual_seed(1)), targets)
    return evaluate(Alone(), worker, test, plan, EvalConfig(batch_size=3))  # type: ignore[arg-type]


def test_figures_are_means_over_what_counts() -> None:
    targets = torch.tensor([0, -100, 2, 1, -100, -100, 1])
    known = targets[targets != -100]
    figures = evaluated(metric_by_name("accuracy"), targets)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    inputs = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    outputs = model(inputs[targets != -100])
    assert figures["eval_loss"] == pytest.approx(nn.functional.cross_entropy(outputs, known).item(), rel=1e-5)
    assert figures["eval_accuracy"] == pytest.approx(float((outputs.argmax(1) == known).float().mean()))


def test_where_nothing_counts_there_is_no_figure() -> None:
    figures = evaluated(metric_by_name("accuracy"), torch.full((4,), -100))
    assert all(math.isnan(value) for value in figures.values() if value is not None) and len(figures) == 2


def test_a_metric_of_ones_own_is_no_accuracy() -> None:
    """An error in place of an accuracy would keep the worst checkpoint."""
    figures = evaluated(lambda outputs, targets: targets == 1, torch.tensor([1, 0, 1, 1]))
    assert figures["eval_metric"] == 0.75 and "eval_accuracy" not in figures
    assert how_good(figures) == -float(figures["eval_loss"] or 0)


@pytest.mark.parametrize(("row", "good"), [
    ({"train_loss": 1.0}, None),
    ({"eval_loss": 0.5}, -0.5),
    ({"eval_loss": 0.5, "eval_metric": 3.0}, -0.5),
    ({"eval_loss": 0.5, "eval_accuracy": 0.75}, 0.75),
    ({"eval_loss": math.inf, "eval_accuracy": 0.75}, 0.75),
    ({"eval_loss": math.nan, "eval_accuracy": 0.75}, None),
    ({"eval_loss": math.nan}, None),
])  # fmt: skip
def test_how_good_an_evaluation_is(row: dict[str, Any], good: float | None) -> None:
    assert how_good(row) == good


def test_the_best_accuracy_is_never_nan() -> None:
    best: dict[str, float | None] = dict.fromkeys(("final_accuracy", "best_accuracy", "final_loss"))
    for accuracy in (math.nan, 0.5, math.nan, 0.25):
        note(best, {"eval_loss": 1.0, "eval_accuracy": accuracy})
    assert best["best_accuracy"] == 0.5 and best["final_accuracy"] == 0.25
    note(best, {"eval_loss": 1.0, "eval_accuracy": math.nan})
    assert best["best_accuracy"] == 0.5 and best["final_accuracy"] is None


def test_losses_of_another_number_than_there_were_samples() -> None:
    check_number(120, 120)
    with pytest.raises(ConfigError, match=r"119 losses: there were 120 samples"):
        check_number(119, 120)
