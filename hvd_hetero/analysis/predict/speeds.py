"""The inputs of a prediction: step times by class and batch, their jitter, the link, the sizes of model and data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd_hetero.analysis.predict.link import Link, fitted
from hvd_hetero.analysis.predict.simulator import DISTRIBUTIONS, LOGNORMAL
from hvd_hetero.cluster.device_classes import Cluster, DeviceClass, assign, integers
from hvd_hetero.cluster.hardware import RankFacts, usable_cores
from hvd_hetero.cluster.hosts import parse_hosts
from hvd_hetero.config.load import device_classes, per_class
from hvd_hetero.config.schema import AUTO, Config
from hvd_hetero.errors import ConfigError, nearest
from hvd_hetero.planning.speed_profile import Profile, load_profile

BYTES_OF_A_PARAMETER = 4
MOST_JITTER = 2.0


@dataclass(frozen=True)
class Assumptions:
    """The options of the command line."""

    profile: str | None = None
    step_ms: str | None = None
    jitter: str | None = None
    jitter_law: str | None = None
    latency_ms: float | None = None
    bandwidth_mbit: float | None = None
    params: int | None = None
    model_mb: float | None = None
    samples: int | None = None
    test_samples: int | None = None
    cores: int | None = None


@dataclass(frozen=True)
class Speed:
    """Step times of one class, by batch size.

    Attributes:
        points: seconds of a step by batch size, as measured, the smallest batch first.
        jitter: standard deviation of a step over its mean.
    """

    points: tuple[tuple[int, float], ...]
    jitter: float = 0.0

    def step_sec(self, batch: float) -> float:
        """Interpolate between measured batches, and prolong the outer lines; through 0 where there is one point."""
        (a, start), *rest = self.points
        for b, end in rest:
            if batch <= b or b == self.points[-1][0]:
                sec = start + (batch - a) * (end - start) / (b - a)
                return sec if sec > 0 else end * batch / b
            a, start = b, end
        return start * batch / a


@dataclass(frozen=True)
class Inputs:
    """All inputs of a prediction.

    Attributes:
        samples: n, training samples.
        notes: what had to be assumed.
        jitter_law: how steps vary around their mean, one of ``simulator.DISTRIBUTIONS``.
        cores: of each host.
    """

    cluster: Cluster
    speeds: dict[str, Speed]
    link: Link
    model_bytes: float
    samples: int
    notes: tuple[str, ...]
    jitter_law: str = LOGNORMAL
    cores: int = 1


def gather(config: Config, assumed: Assumptions) -> Inputs:
    """Gather configuration, profile and command line; the command line wins.

    Raises:
        ConfigError: something is missing, or cannot be.
    """
    for option, value in (("--latency-ms", assumed.latency_ms), ("--bandwidth-mbit", assumed.bandwidth_mbit),
                          ("--params", assumed.params), ("--model-mb", assumed.model_mb),
                          ("--samples", assumed.samples), ("--test-samples", assumed.test_samples),
                          ("--cores", assumed.cores)):  # fmt: skip
        if value is not None:
            _number(option, value, above=None if value is assumed.latency_ms else 0.0)
    distribution = assumed.jitter_law or LOGNORMAL
    if distribution not in DISTRIBUTIONS:
        remedy = nearest(distribution, DISTRIBUTIONS)
        raise ConfigError("--jitter-law", distribution, "is no distribution of steps", remedy)
    profile = None if assumed.profile is None else _checked(assumed.profile, load_profile(Path(assumed.profile)))
    cluster = _cluster(config, profile)
    names = [c.name for c in cluster.classes]
    notes: list[str] = []
    speeds = _speeds(names, per_class("train.batch_size", config.train.batch_size, names), assumed, profile, notes)
    model_bytes = _model_bytes(assumed, profile)
    link = _link(assumed, profile, notes)
    samples = assumed.samples or (profile.samples if profile is not None else None)
    if samples is None:
        raise ConfigError("--samples", None, "nothing says how large the training set is", "give --samples N")
    if assumed.cores is None:
        notes.append(f"Hosts are taken to have the {usable_cores()} cores that there are here (--cores).")
    for c in profile.classes if profile is not None else ():
        ranks = next((len(other.ranks) for other in cluster.classes if other.name == c.name), c.ranks)
        if ranks != c.ranks:
            notes.append(f"Class {c.name} was measured with {c.ranks} ranks and is planned with {ranks}.")
    cores = assumed.cores or usable_cores()
    return Inputs(cluster, speeds, link, model_bytes, samples, tuple(notes), distribution, cores)


def _checked(path: str, profile: Profile) -> Profile:
    numbers: list[tuple[str, object]] = [("samples", profile.samples), ("parameter_bytes", profile.parameter_bytes)]
    for c in profile.classes:
        numbers += [(f"{c.name}.ranks", c.ranks), (f"{c.name}.batch_size", c.batch_size),
                    (f"{c.name}.step_sec", c.step_sec)]
        numbers += [(f"{c.name}.by_batch.{batch}", sec) for batch, sec in c.by_batch.items()]
        numbers += [(f"{c.name}.by_batch", int(batch) if batch.isdigit() else None) for batch in c.by_batch]
        _number(f"{path}: {c.name}.jitter", c.jitter)
    for key, value in numbers:
        _number(f"{path}: {key}", value, above=0.0)
    _number(f"{path}: average_sec", profile.average_sec)
    if not profile.classes:
        raise ConfigError(path, [], "has no classes", "make one with hvd-hetero profile")
    return profile


def _number(key: str, value: object, above: float | None = None) -> None:
    """Refuse what is no finite number of at least 0, or above a limit."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (fits and isinstance(value, (int, float)) and (value >= 0 if above is None else value > above)):
        wanted = "0 or more" if above is None else f"a number above {above:g}"
        raise ConfigError(key, value, f"is not {wanted}", f"give {wanted}")


def _cluster(config: Config, profile: Profile | None) -> Cluster:
    """Make the ranks of the configuration where it names them, else those of the profile."""
    classes, hosts = config.cluster.classes, config.cluster.hosts
    if classes != AUTO:
        chosen = device_classes(classes)
        if hosts is not None and (hosts == AUTO or "/" in hosts):
            hosts = None  # found out where the job starts
        places = parse_hosts(hosts) if hosts is not None else []
        if hosts is None and all(c.ranks is not None for c in chosen.values()):
            ranks = [rank for name, c in chosen.items() for rank in integers(f"cluster.classes.{name}.ranks", c.ranks)]
            places = [("localhost", max(ranks, default=-1) + 1)]
        if places:
            slots = [(host, slot, count) for host, count in places for slot in range(count)]
            return assign(chosen, [RankFacts(rank, host, slot, ("GPU",) * count, "", ())
                                   for rank, (host, slot, count) in enumerate(slots)])
    if profile is None:
        problem = "does not tell how many ranks each class has"
        raise ConfigError("cluster.classes", classes, problem, "name ranks, set cluster.hosts, or give a --profile")
    found, facts = [], list[RankFacts]()
    for c in profile.classes:
        numbers = range(len(facts), len(facts) + c.ranks)
        found.append(DeviceClass(c.name, c.device, tuple(numbers)))
        facts += [RankFacts(rank, "", rank, (), "", ()) for rank in numbers]
    return Cluster(tuple(found), tuple(facts))


def _speeds(
    names: Sequence[str], batch_size: Mapping[str, int], assumed: Assumptions, profile: Profile | None, notes: list[str]
) -> dict[str, Speed]:
    measured = {c.name: c for c in profile.classes} if profile is not None else {}
    step_ms, jitter = _by_class("--step-ms", assumed.step_ms, names), _by_class("--jitter", assumed.jitter, names)
    speeds = {}
    for name in names:
        if name not in step_ms and name not in measured:
            remedy = f"name every class: --step-ms {','.join(f'{n}=MILLISECONDS' for n in names)}"
            raise ConfigError("--step-ms", assumed.step_ms, f"gives nothing for class {name}", remedy)
        c = measured.get(name)
        spread = jitter.get(name, c.jitter if c is not None else 0.0)
        if name not in jitter and spread > MOST_JITTER:
            notes.append(f"Class {name}'s measured jitter of {spread:.2g} is taken as {MOST_JITTER:g}; "
                         "measure it again.")
            spread = MOST_JITTER
        if not 0 <= spread <= MOST_JITTER:
            problem = f"is not between 0 and {MOST_JITTER:g} for class {name}"
            raise ConfigError("--jitter", spread, problem, "give the standard deviation of a step over its mean")
        if name in step_ms:
            _number(f"--step-ms {name}", step_ms[name], above=0.0)
            points = {batch_size[name]: step_ms[name] / 1e3}
        else:
            assert c is not None
            points = {c.batch_size: c.step_sec} | {int(batch): sec for batch, sec in c.by_batch.items()}
        if len(points) == 1:
            notes.append(f"Class {name} was timed at one batch size: a step's time is taken to go with its batch.")
        speeds[name] = Speed(tuple(sorted(points.items())), spread)
    return speeds


def _by_class(option: str, text: str | None, names: Sequence[str]) -> dict[str, float]:
    """Read ``fast=6.4,slow=58``."""
    found: dict[str, float] = {}
    for item in text.split(",") if text is not None else ():
        name, _, number = (part.strip() for part in item.partition("="))
        if name not in names:
            raise ConfigError(option, text, f"{name!r} names no device class", nearest(name, names))
        if name in found:
            raise ConfigError(option, text, f"names {name} twice", "name each class once")
        try:
            found[name] = float(number)
        except ValueError as error:
            raise ConfigError(option, text, f"{item!r} is not CLASS=NUMBER", f"write {name}=NUMBER") from error
    return found


def _model_bytes(assumed: Assumptions, profile: Profile | None) -> float:
    if assumed.params is not None and assumed.model_mb is not None:
        raise ConfigError("--params", assumed.params, "--model-mb says the same", "give one of them")
    if assumed.params is not None:
        return assumed.params * BYTES_OF_A_PARAMETER
    if assumed.model_mb is not None:
        return assumed.model_mb * 1e6
    if profile is None:
        raise ConfigError("--params", None, "nothing says how large the model is", "give --params N or --model-mb MB")
    return profile.parameter_bytes


def _link(assumed: Assumptions, profile: Profile | None, notes: list[str]) -> Link:
    latency = None if assumed.latency_ms is None else assumed.latency_ms / 1e3
    rate = None if assumed.bandwidth_mbit is None else assumed.bandwidth_mbit * 1e6 / 8
    ranks = sum(c.ranks for c in profile.classes) if profile is not None else 0
    if profile is not None and ranks > 1 and profile.average_sec > 0 and (latency is None or rate is None):
        notes.append(f"Communication is fitted to the measured {1e3 * profile.average_sec:.3g} ms of an average.")
        return fitted(profile.average_sec, ranks, profile.parameter_bytes, latency, rate)
    free = [name for name, value in (("latency", latency), ("bandwidth", rate)) if value is None]
    if free:
        notes.append(f"Nothing is known of the link's {' and '.join(free)}: taken as free.")
    return Link(latency or 0.0, math.inf if rate is None else rate)
