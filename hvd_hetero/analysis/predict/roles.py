"""Judge which role a slow class is worth most in: training, or evaluating for those that train (``role``)."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_hetero.analysis.predict.advice import Worth
from hvd_hetero.analysis.predict.predict import Scenario
from hvd_hetero.config.schema import EVALUATE, TRAIN

FORWARD = 1 / 3
"""Of a step's time, what a forward pass over its batch takes: the backward pass is taken to cost twice as much."""
TEST_SHARE = 1 / 6
"""Of the training set's samples, those of the test set, where nothing tells their number."""


@dataclass(frozen=True)
class RoleWorth:
    """What an epoch with its evaluation takes for each role of a class.

    Attributes:
        without_sec: where the class is left out; ``train_sec``, where it trains and evaluates with all others;
            ``evaluate_sec``, where it evaluates alone, beside those that train.
        evaluations: of one epoch, that the class is done with while it lasts.
        scored: share of the training samples that it would score in an epoch.
    """

    name: str
    without_sec: float
    train_sec: float
    evaluate_sec: float
    evaluations: float
    scored: float

    @property
    def best(self) -> str:
        return TRAIN if self.train_sec <= self.evaluate_sec else EVALUATE

    @property
    def sentence(self) -> str:
        gains = {TRAIN: self.without_sec / self.train_sec - 1, EVALUATE: self.without_sec / self.evaluate_sec - 1}
        listed = ", ".join(f"role {role} {gain:+.1%}" for role, gain in gains.items())
        return (
            f"Class {self.name} changes the epochs per second, evaluations included, over a run without it: {listed}. "
            f"It is worth most with role {self.best}. With role evaluate it finishes {self.evaluations:.2g} of them an "
            f"epoch; with role score it scores {self.scored:.2g} of the samples an epoch, which speeds up no epoch."
        )


def roles(scenario: Scenario, worth: list[Worth], test_samples: int | None = None) -> list[RoleWorth]:
    """Compare the roles of each class but the fastest, by what it adds to training and by what an evaluation takes.

    Args:
        worth: samples a second with each class and without it.
        test_samples: of the test set; None: as :data:`TEST_SHARE` has it.
    """
    samples, every = scenario.inputs.samples, scenario.config.eval.every_epochs
    test = test_samples if test_samples is not None else samples * TEST_SHARE
    speeds = {c.name: len(c.ranks) * scenario.batch_size[c.name] / scenario.step_sec[c.name] / FORWARD
              for c in scenario.cluster.classes}  # fmt: skip
    total, found = sum(speeds.values()), []
    for one in worth:
        training, speed = samples / one.without_it, speeds[one.name]
        found.append(RoleWorth(
            one.name, training + test / (total - speed) / every, samples / one.with_it + test / total / every, training,
            training * speed / test, training * speed / samples,
        ))  # fmt: skip
    return found
