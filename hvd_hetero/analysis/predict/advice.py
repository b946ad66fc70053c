"""Derive advice from predictions: which tau, which batch, and whether a slow class is worth having."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hvd_hetero.analysis.predict.predict import Prediction, Scenario
from hvd_hetero.planning.local_steps import planned_step_sec

LARGEST_TAU = 4096
WHOLE_STEPS = 8
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Advice:
    """One tau, and why."""

    tau: int
    prediction: Prediction
    reason: str


@dataclass(frozen=True)
class Worth:
    """What a class adds: samples a second with it and without it."""

    name: str
    with_it: float
    without_it: float

    @property
    def worth_having(self) -> bool:
        return self.with_it > self.without_it

    @property
    def sentence(self) -> str:
        figures = f"{self.with_it:.4g} samples/s with class {self.name}, {self.without_it:.4g} without it"
        gain = self.with_it / self.without_it - 1
        judged = "worth having: it adds" if gain > 0 else "better left out: it costs"
        return f"{figures}; {judged} {abs(gain):.1%}."


@dataclass(frozen=True)
class Together:
    """What all classes together come to, beside the fastest one alone: samples a second, and how far a round moves."""

    fastest: str
    with_all: float
    alone: float
    round_way: float
    weights: str

    @property
    def sentence(self) -> str:
        ratio = self.with_all / self.alone
        text = f"Worth it? All classes together process {self.with_all:.4g} samples/s, {ratio:.2f} times what class "
        text += f"{self.fastest} could alone ({self.alone:.4g})"
        text += ", so the run would be SLOWER than without the others" if ratio < 1 else ""
        way = f"a round moves the model {self.round_way:.2f} times as far as a {self.fastest} rank alone"
        return f"{text}; with aggregation.weights={self.weights} {way}."


def taus(scenario: Scenario) -> list[int]:
    """List powers of two, the set and the affordable tau, and the least at which the slowest class takes 1, 2, ...

    A margin asks for a little more than whole multiples of the slowest class's step, or rounding takes one away.
    """
    fastest, slowest = min(scenario.step_sec.values()), max(scenario.step_sec.values())
    planned = max(planned_step_sec(scenario.step_sec, scenario.config.train.tau_margin).values())
    found = {2**i for i in range(LARGEST_TAU.bit_length())} | {scenario.tau, scenario.affordable}
    in_all = (
        max(round(steps * slowest / fastest), math.ceil((steps - 0.5) * planned / fastest * (1 - 1e-9)))
        for steps in range(1, WHOLE_STEPS + 1)
    )
    return sorted(found | {tau for tau in in_all if tau <= LARGEST_TAU})


def sweep(scenario: Scenario) -> list[tuple[int, Prediction]]:
    """Predict local SGD at each tau of the fastest class."""
    return [(tau, scenario.local(tau)) for tau in taus(scenario)]


def recommended(scenario: Scenario, rows: Sequence[tuple[int, Prediction]]) -> Advice | None:
    """Recommend the tau that ``train.tau=auto`` takes, or the least one above it that is possible; None if none is."""
    possible = [(tau, row) for tau, row in rows if row.problem is None]
    if not possible:
        return None
    best = max(row.samples_per_sec for _, row in possible)
    tau, row = next(((tau, row) for tau, row in possible if tau >= scenario.affordable), possible[-1])
    taus_text = ", ".join(f"{name} {steps}" for name, steps in row.tau.items())
    blocked = ", ".join(f"{name} {ratio:.1%}" for name, ratio in row.blocked.items())
    sizes = ", ".join(f"{name} {size}" for name, size in row.batch_size.items())
    reason = (
        f"tau {tau} ({taus_text} local steps; batches {sizes}): {row.samples_per_sec:.4g} samples/s, "
        f"{row.samples_per_sec / scenario.capacity:.1%} of what the classes could process without waiting and "
        f"communication; blocked: {blocked}. train.tau=auto chooses it: the shortest round that spends at most "
        f"{scenario.config.train.tau_overhead:.0%} on waiting and averages if all steps take equally long, or the "
        f"cheapest if none does. Longer rounds let the models drift further apart (the fastest tau tried: {best:.4g} "
        "samples/s)."
    )
    return Advice(tau, row, reason)


def batches(scenario: Scenario) -> list[tuple[float, Advice]]:
    """Recommend the best tau with smaller and larger batches, by the scale of all of them."""
    found = ((scale, Scenario(scenario.config, scenario.inputs, scale)) for scale in SCALES)
    return [(scale, best) for scale, other in found if (best := recommended(other, sweep(other))) is not None]


def worth(scenario: Scenario, tau: int) -> list[Worth]:
    """Compute what each class but the fastest adds to local SGD at this tau."""
    with_all = scenario.local(tau)
    others = [c.name for c in scenario.cluster.classes if c.name != scenario.fastest]
    rest = {name: scenario.without(name).local(tau) for name in others}
    return [Worth(name, with_all.samples_per_sec, row.samples_per_sec) for name, row in rest.items() if not row.problem]


def together(scenario: Scenario, tau: int) -> Together | None:
    """Compare local SGD of all classes at this tau with the fastest class alone; None if there is no other."""
    alone, others = scenario, [c.name for c in scenario.cluster.classes if c.name != scenario.fastest]
    for name in others:
        alone = alone.without(name)
    both = [one.local(tau) for one in (scenario, alone)]
    if not others or any(row.problem for row in both):
        return None
    weights = scenario.config.aggregation.weights or "steps"
    return Together(
        scenario.fastest, both[0].samples_per_sec, both[1].samples_per_sec, both[0].round_way, weights)  # fmt: skip
