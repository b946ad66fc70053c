"""The plan of a run: what every device class does in a round. Pure arithmetic (no torch, no Horovod).

Notation of the paper: class g has m_g workers of batch size B_g that take tau_g local steps in a round.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hvd_hetero.cluster import Cluster
from hvd_hetero.errors import ConfigError

TRAIN, IDLE, SERVER = "train", "idle", "server"
ERROR, SHRINK, WAIT_AVOIDING, LEAVE_OUT = "error", "shrink_batch", "wait_avoiding", "leave_out"
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
        own = self.batch_sizes[self.ranks.index(rank)]
        weight = self.weight * len(self.ranks) * own / sum(self.batch_sizes)
        return replace(self, ranks=(rank,), batch_size=own, weight=weight, batch_sizes=())

    @property
    def speed(self) -> float:
        """Samples one rank takes per unit of time, up to a common factor: tau B a round, or B a measured step."""
        return self.tau * self.batch_size if self.step_sec is None else self.batch_size / self.step_sec


@dataclass(frozen=True)
class Plan:
    """All classes, and how many rounds a pass over the data has."""

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

    def pass_samples(self) -> dict[str, int]:
        """N_g: samples that each class consumes in one pass."""
        return {c.name: self.rounds * c.round_samples for c in self.classes}

    def by_rank(self) -> list[ClassPlan]:
        return [self.of_rank(rank) for rank in range(sum(len(c.ranks) for c in self.classes))]

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


def derive_tau(
    tau_fastest: int, step_sec: Mapping[str, float], too_slow: str = ERROR, margin: float = 0.0
) -> dict[str, int]:
    """tau_g = max(1, round(tau_fastest * t_fastest / t_g)) (method: local steps).

    Args:
        tau_fastest: local steps of the fastest class.
        step_sec: seconds of one local step, by class.
        too_slow: what becomes of a class that cannot finish one step in a round: ``error``; ``leave_out``, tau 0; else
            tau 1.
        margin: t_g is that of :func:`planned_step_sec`; 0: as measured, which is the method's own rule.

    Raises:
        ConfigError: there is such a class, and that is an error.
    """
    late = too_slow_classes(tau_fastest, step_sec)
    for name, times in late.items():
        if too_slow == ERROR:
            problem = f"class {name} is {times:.1f} times slower and cannot finish one step in a round"
            least = math.ceil(times * (1 - 1e-9))
            remedy = f"set train.tau={least} or more, a smaller train.batch_size for {name}, or cluster.too_slow"
            raise ConfigError("train.tau", tau_fastest, problem, remedy)
    fastest = min(step_sec.values())
    planned = planned_step_sec(step_sec, margin)
    taus = {name: max(1, math.floor(tau_fastest * fastest / sec + 0.5)) for name, sec in planned.items()}
    return taus | dict.fromkeys(late if too_slow == LEAVE_OUT else (), 0)


def planned_step_sec(step_sec: Mapping[str, float], margin: float) -> dict[str, float]:
    """t_g / (1 - margin (1 - r_g)): what a slower class's step is planned to take, so that it is done a little early.

    Rounds vary, and each lasts as long as its latest rank: planned by average times, fast ranks would wait in every
    other one. At equal batches a slow rank that waits costs the cluster less than a fast one, in the measure in which
    it is slower; a class that is as fast as the fastest gets no margin. (r_g = t_fastest / t_g, as measured.)
    """
    fastest = min(step_sec.values())
    return {name: sec / (1 - margin * (1 - fastest / sec)) for name, sec in step_sec.items()}


def too_slow_classes(tau_fastest: int, step_sec: Mapping[str, float]) -> dict[str, float]:
    """The classes that cannot finish one step while the fastest takes tau, and how many times slower they are."""
    ratios = {name: seconds / min(step_sec.values()) for name, seconds in step_sec.items()}
    # a ratio of 49 must not fail at tau 49 for a rounding error
    return {name: times for name, times in ratios.items() if tau_fastest < times * (1 - 1e-9)}


def shrink_batches(
    tau_fastest: int, step_sec: Mapping[str, float], batch_size: Mapping[str, int], margin: float = 0.0
) -> dict[str, int]:
    """Batches with which classes that are too slow finish one step in a round, if a step's time goes with its batch.

    The margin is that of :func:`planned_step_sec`.

    Raises:
        ConfigError: one sample takes too long.
    """
    shrunk = dict(batch_size)
    for name, times in too_slow_classes(tau_fastest, step_sec).items():
        planned = planned_step_sec(step_sec, margin)[name] / min(step_sec.values())
        shrunk[name] = math.floor(batch_size[name] * tau_fastest / planned)
        if shrunk[name] < 1:
            problem = f"class {name} is {times:.1f} times slower: not even a batch of one fits into a round"
            raise ConfigError("cluster.too_slow", SHRINK, problem, "set a larger train.tau, or leave_out")
    return shrunk


def make_plan(
    cluster: Cluster,
    samples: int,
    tau: Mapping[str, int],
    batch_size: Mapping[str, int],
    *,
    weights: str = "steps",
    epoch: str = "pass",
    step_sec: Mapping[str, float] | None = None,
    whole_batch: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of a local-SGD run; classes of tau 0 are idle.

    Args:
        samples: n, training samples.
        tau: local steps in a round, by class.
        batch_size: of one rank, by class.
        weights: ``steps``, w_i = tau_i / sum_j tau_j (paper, eq. 4), or ``uniform``, w_i = 1/m.
        epoch: ``pass``, floor(n / sum_g m_g B_g tau_g) rounds, or ``fast_steps``, the paper's
            floor(n / (B m tau_fast)) rounds, with B and tau of the fastest class and all m workers.
        step_sec: measured seconds of a local step, by class.
        whole_batch: batches of which those of some classes are only a part; their steps weigh less by as much.

    Raises:
        ConfigError: fewer samples than one round consumes.
    """
    part = {name: size / (whole_batch or batch_size)[name] for name, size in batch_size.items()}
    shares = {name: steps * part[name] if weights == "steps" else float(steps > 0) for name, steps in tau.items()}
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
    counted = in_round if epoch == "pass" else fastest.batch_size * fastest.tau * cluster.size
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
    epoch: str = "pass",
    tau: int = 1,
) -> Plan:
    """The plan of a method whose ranks take every step together: a round is one step, weights go by batch size.

    Args:
        samples: n, training samples.
        batches: samples of one step, by rank; the classes that train are those whose ranks are in it.
        others: role of all other classes.
        epoch: ``pass``, all samples once, or ``fast_steps``, as many steps as a fast worker of a local-SGD run takes
            in the paper's epoch of floor(n / (B m tau)) rounds, with all m workers.
        tau: of that run; for ``fast_steps`` only.

    Raises:
        ConfigError: fewer samples than one step (or that epoch) consumes.
    """
    whole = sum(batches.values())
    classes = []
    for c in cluster.classes:
        sizes = tuple(batches[r] for r in c.ranks if r in batches)
        if not sizes:
            classes.append(ClassPlan(c.name, c.ranks, 0, 0, 0.0, role=others))
            continue
        mean = sum(sizes) / len(sizes)
        uneven = sizes if len(set(sizes)) > 1 else ()
        classes.append(ClassPlan(c.name, c.ranks, 1, round(mean), mean / whole, batch_sizes=uneven))
    counted, steps = (whole, 1) if epoch == "pass" else (whole * cluster.size * tau // len(batches), tau)
    if samples < counted:
        problem = f"an epoch takes at least {counted} samples, the training set has {samples}"
        raise ConfigError("train.batch_size", whole, problem, LESS)
    return Plan(tuple(classes), samples // counted * steps)


def check_least_round(
    cluster: Cluster, samples: int, tau_fastest: int, batch_size: Mapping[str, int], epoch: str = "pass"
) -> None:
    """Checks, before any speed is known, that some plan with this tau can have a round at all.

    Raises:
        ConfigError: even the smallest round, one step on every class but the fastest, takes more samples; or, with
            ``fast_steps``, even the smallest epoch of one round does.
    """
    step = {c.name: batch_size[c.name] * len(c.ranks) for c in cluster.classes}
    least = min(sum(step.values()) + (tau_fastest - 1) * own for own in step.values())
    if epoch == "fast_steps":
        least = max(least, min(batch_size.values()) * tau_fastest * cluster.size)
    if least > samples:
        problem = f"one round takes at least {least} samples, the training set has {samples}"
        raise ConfigError("train.tau", tau_fastest, problem, LESS)


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
    whole = sum(shares)
    exact = [total * share / whole for share in shares]
    counts = [math.floor(x) for x in exact]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    while min(counts) < at_least:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(min(counts))] += 1
    return counts


def _step_rate(c: ClassPlan) -> float:
    return c.tau if c.step_sec is None else 1 / c.step_sec
