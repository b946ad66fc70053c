"""The plan of a run: what every device class does in a round. Pure arithmetic (no torch, no Horovod).

Notation of the paper: class g has m_g workers of batch size B_g that take tau_g local steps in a round.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.errors import ConfigError

TRAIN, IDLE, SERVER = "train", "idle", "server"
BY_STEPS, UNIFORM, NORMALISED = "steps", "uniform", "normalised"
SHORT = 8
"""Local steps of a round up to which the progress of ranks is added up as far as ``aggregation.max_extrapolation``."""
HALVINGS = 100
"""Of an interval, until it is as small as a float can tell."""
LESS = "set a smaller train.tau or train.batch_size, or use more data"


@dataclass(frozen=True)
class ClassPlan:
    """What one device class does in a round.

    Attributes:
        tau: local steps of one rank in a round; 0 if it does not train.
        batch_size: samples of one step of one rank; their mean where the ranks of the class differ.
        weight: share of one rank in the aggregation (their mean); over all ranks of all classes they sum to 1.
        step_sec: measured seconds of one local step, if they were measured.
        role: ``train``; ``idle``, or ``server``, which sums what others computed.
        batch_sizes: by rank of the class, where they differ.
    """

    name: str
    ranks: tuple[int, ...]
    tau: int
    batch_size: int
    weight: float
    step_sec: float | None = None
    role: str = TRAIN
    batch_sizes: tuple[int, ...] = ()

    @property
    def round_samples(self) -> int:
        return self.tau * (sum(self.batch_sizes) or len(self.ranks) * self.batch_size)

    def one(self, rank: int) -> ClassPlan:
        """The part of one rank of the class."""
        if not self.batch_sizes:
            return self
        batch_size = self.batch_sizes[self.ranks.index(rank)]
        weight = self.weight * len(self.ranks) * batch_size / sum(self.batch_sizes)
        return replace(self, ranks=(rank,), batch_size=batch_size, weight=weight, batch_sizes=())

    @property
    def speed(self) -> float:
        """Samples one rank takes per unit of time, up to a common factor: tau B a round, or B a measured step."""
        return self.tau * self.batch_size if self.step_sec is None else self.batch_size / self.step_sec


@dataclass(frozen=True)
class Plan:
    """All classes, and how many rounds an epoch over the data has."""

    classes: tuple[ClassPlan, ...]
    rounds: int

    @property
    def training(self) -> tuple[ClassPlan, ...]:
        """The classes that take steps."""
        return tuple(c for c in self.classes if c.role == TRAIN)

    @property
    def fastest(self) -> ClassPlan:
        return max(self.training, key=_step_rate)

    @property
    def slowest(self) -> ClassPlan:
        return min(self.training, key=_step_rate)

    def biased(self, bias_to: str) -> str:
        """The class that gets the hard samples: by its name, or as the ``fast``est or ``slow``est one."""
        if bias_to in (c.name for c in self.classes):
            return bias_to
        return (self.fastest if bias_to == "fast" else self.slowest).name

    def of_rank(self, rank: int) -> ClassPlan:
        return next(c for c in self.classes if rank in c.ranks).one(rank)

    def epoch_samples(self) -> dict[str, int]:
        """N_g: samples that each class consumes in one epoch."""
        return {c.name: self.rounds * c.round_samples for c in self.classes}

    def by_rank(self) -> list[ClassPlan]:
        owners = {rank: c for c in self.classes for rank in c.ranks}
        return [owners[rank].one(rank) for rank in range(len(owners))]

    def without_step_times(self) -> Plan:
        """Return the plan without step times, for a job of one class, whose speed is not measured."""
        return replace(self, classes=tuple(replace(c, step_sec=None) for c in self.classes))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        tuples = ("ranks", "batch_sizes")
        classes = [ClassPlan(**{**c, **{name: tuple(c[name]) for name in tuples}}) for c in content["classes"]]
        return cls(tuple(classes), content["rounds"])

    def digest(self) -> str:
        """A hash by which ranks make sure that they follow the same plan."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def make_plan(
    cluster: Cluster,
    samples: int,
    tau: Mapping[str, int],
    batch_size: Mapping[str, int],
    *,
    weights: str = "steps",
    epoch_length: str = "dataset",
    step_sec: Mapping[str, float] | None = None,
    whole_batch: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of a local-SGD run; classes of tau 0 are idle.

    Args:
        samples: n, training samples.
        tau: local steps in a round, by class.
        batch_size: of one rank, by class.
        weights: ``steps``, w_i = tau_i / sum_j tau_j (paper, eq. 4); ``normalised``, the same, after
            :func:`progress_factors`; or ``uniform``, w_i = 1/m.
        epoch_length: ``dataset``, floor(n / sum_g m_g B_g tau_g) rounds, or ``fast_steps``, the paper's
            floor(n / (B m tau_fast)) rounds, with B and tau of the fastest class and all m workers.
        step_sec: measured seconds of a local step, by class.
        whole_batch: batches of which those of some classes are only a part; their steps weigh less by as much.

    Raises:
        ConfigError: fewer samples than one round consumes.
    """
    part = {name: size / (whole_batch or batch_size)[name] for name, size in batch_size.items()}
    shares = {name: steps * part[name] if weights != UNIFORM else float(steps > 0) for name, steps in tau.items()}
    total = sum(shares[c.name] * len(c.ranks) for c in cluster.classes)
    classes = tuple(
        ClassPlan(
            c.name,
            c.ranks,
            tau[c.name],
            batch_size[c.name],
            shares[c.name] / total,
            None if step_sec is None else step_sec[c.name],
            TRAIN if tau[c.name] else IDLE,
        )
        for c in cluster.classes
    )
    plan = Plan(classes, 0)
    fastest = plan.fastest
    in_round = sum(c.round_samples for c in classes)
    counted = in_round if epoch_length == "dataset" else fastest.batch_size * fastest.tau * cluster.size
    rounds = samples // max(counted, in_round)
    if rounds < 1:
        problem = f"one round takes {max(counted, in_round)} samples, the training set has {samples}"
        raise ConfigError("train.tau", dict(tau), problem, LESS)
    return Plan(classes, rounds)


def lockstep_plan(
    cluster: Cluster,
    samples: int,
    batches: Mapping[int, int],
    *,
    others: str = IDLE,
    epoch_length: str = "dataset",
    tau: int = 1,
) -> Plan:
    """The plan of a method whose ranks take every step together: a round is one step, weights go by batch size.

    Args:
        samples: n, training samples.
        batches: samples of one step, by rank; the classes that train are those whose ranks are in it.
        others: role of all other classes.
        epoch_length: ``dataset``, all samples once, or ``fast_steps``, as many steps as a fast worker of a local-SGD
        run takes
            in the paper's epoch of floor(n / (B m tau)) rounds, with all m workers.
        tau: of that run; for ``fast_steps`` only.

    Raises:
        ConfigError: fewer samples than one step (or that epoch) consumes.
    """
    global_batch = sum(batches.values())
    classes = []
    for c in cluster.classes:
        sizes = tuple(batches[r] for r in c.ranks if r in batches)
        if not sizes:
            classes.append(ClassPlan(c.name, c.ranks, 0, 0, 0.0, role=others))
            continue
        mean = sum(sizes) / len(sizes)
        uneven = sizes if len(set(sizes)) > 1 else ()
        classes.append(ClassPlan(c.name, c.ranks, 1, round(mean), mean / global_batch, batch_sizes=uneven))
    of_epoch = global_batch * cluster.size * tau // len(batches)
    counted, steps = (global_batch, 1) if epoch_length == "dataset" else (of_epoch, tau)
    if samples < counted:
        problem = f"an epoch takes at least {counted} samples, the training set has {samples}"
        raise ConfigError("train.batch_size", global_batch, problem, LESS)
    return Plan(tuple(classes), samples // counted * steps)


def check_least_round(
    cluster: Cluster, samples: int, tau_fastest: int, batch_size: Mapping[str, int], epoch_length: str = "dataset"
) -> None:
    """Checks, before any speed is known, that some plan with this tau can have a round at all.

    Raises:
        ConfigError: even the smallest round, one step on every class but the fastest, takes more samples; or, with
            ``fast_steps``, even the smallest epoch of one round does.
    """
    step = {c.name: batch_size[c.name] * len(c.ranks) for c in cluster.classes}
    least = min(sum(step.values()) + (tau_fastest - 1) * step_sec for step_sec in step.values())
    if epoch_length == "fast_steps":
        least = max(least, min(batch_size.values()) * tau_fastest * cluster.size)
    if least > samples:
        problem = f"one round takes at least {least} samples, the training set has {samples}"
        raise ConfigError("train.tau", tau_fastest, problem, LESS)


def progress_factors(plan: Plan, most: float) -> dict[str, float]:
    """Return f by class: a rank's progress counts f times in a normalised average, x + sum_i w_i f_i (x_i - x).

    With w_i by steps, f_i = tau_max / tau_i gives every local gradient the same coefficient, and the average moves as
    far as the class of tau_max alone would (FedNova, Wang et al. 2020, with tau_eff = tau_max). The coefficients
    w_i f_i add up to S > 1 then. Along directions in which a local optimizer arrives within a round, all ranks make the
    same way, so that the sum has to stay below 2: it is at most 1 + (most - 1) min(1, 8 / tau_max), since the longer a
    round is, the more such directions there are. Where S is more, f_i lies between 1, the average by steps, and
    tau_max / tau_i, as far from 1 as the bound allows. To scale all f_i down instead would take from the progress of
    the class of tau_max too, and a round could move less than the average by steps.

    Args:
        most: ``aggregation.max_extrapolation``.
    """
    longest = max(c.tau for c in plan.training)
    factors = {c.name: longest / c.tau for c in plan.training}
    total = sum(len(c.ranks) * c.weight * factors[c.name] for c in plan.training)
    bound = 1 + (most - 1) * min(1.0, SHORT / longest)
    part = 1.0 if total <= bound else (bound - 1) / (total - 1)
    return {name: 1 + part * (factor - 1) for name, factor in factors.items()}


def annealed_weight(weight: float, ranks: int, fraction: float, start: float) -> float:
    """Return a rank's weight on its way to the unbiased one: (1 - a) w + a / m.

    a = max(0, (t - s) / (1 - s)), where t is the share of the run that is done, and s where it starts. The weights of
    all ranks add up to 1 at any time.

    Args:
        ranks: m, those that train.
        fraction: t; ``start``, s, ``aggregation.anneal_from``.
    """
    a = min(1.0, max(0.0, (fraction - start) / (1 - start)))
    return (1 - a) * weight + a / ranks


def round_way(plan: Plan, weights: str, most: float) -> float:
    """Return how far a round's average moves, over the way of a rank of the class that takes the most samples.

    All local gradients are taken to be about equal: sum_i w_i f_i tau_i B_i / max_j tau_j B_j, with f of
    :func:`progress_factors` for normalised weights, else 1. A class with few steps is averaged in as if it had stood
    still for the rest of the round.

    Args:
        weights: ``aggregation.weights``, and ``most`` its ``max_extrapolation``.
    """
    factors = progress_factors(plan, most) if weights == NORMALISED else {}
    moved = sum(len(c.ranks) * c.weight * factors.get(c.name, 1.0) * c.tau * c.batch_size for c in plan.training)
    return moved / max(c.tau * c.batch_size for c in plan.training)


def check_bias_to(bias_to: str, names: Sequence[str]) -> None:
    """Checks ``sampling.bias_to``: ``fast``, ``slow``, or the name of a class.

    Raises:
        ConfigError: it is none of these.
    """
    if bias_to not in ("fast", "slow", *names):
        remedy = f"give fast, slow or one of {', '.join(names)}"
        raise ConfigError("sampling.bias_to", bias_to, "names no device class", remedy)


def apportion(total: int, shares: Sequence[float], at_least: int = 0) -> list[int]:
    """Divides ``total`` into integers in proportion to ``shares``, exactly (largest remainder, ties to the first).

    Args:
        at_least: what everyone gets, at the cost of the largest.
    """
    assert total >= at_least * len(shares)
    total_shares = sum(shares)
    exact = [total * share / total_shares for share in shares]
    counts = [math.floor(x) for x in exact]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    while min(counts) < at_least:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(min(counts))] += 1
    return counts


def controlled(batches: Sequence[int], times: Sequence[float], deadband: float) -> list[float]:
    """Return the batches that take all the mean of the times, unless that is a small change (OmniLearn's controller).

    Args:
        deadband: changes that are a smaller share of the new batch are not made.
    """
    mean = sum(times) / len(times)
    wanted = [batch * mean / sec for batch, sec in zip(batches, times, strict=True)]
    return [batch if abs(new - batch) < deadband * new else new for batch, new in zip(batches, wanted, strict=True)]


def bounded(
    values: Sequence[float], total: float, least: float, most: float, in_proportion: bool = True
) -> list[float]:  # fmt: skip
    """Make positive values add up to ``total`` with each between two bounds: one factor for all, then cut off.

    Args:
        least: of a value; ``least`` and ``most`` of all values enclose the total.
        in_proportion: False: one number is added to all.
    """

    def moved(number: float) -> list[float]:
        return [min(max(v * number if in_proportion else v + number, least), most) for v in values]

    low, high = (0.0, most / min(values)) if in_proportion else (least - max(values), most - min(values))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(moved(middle)) < total else (low, middle)
    return moved(high)


def _step_rate(c: ClassPlan) -> float:
    return c.tau if c.step_sec is None else 1 / c.step_sec
