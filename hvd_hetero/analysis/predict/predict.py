"""Predict what each method would take for the work that a configuration asks for, by a run's own plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from hvd_hetero.analysis.predict.link import sent_bytes
from hvd_hetero.analysis.predict.methods import ALL, FAST
from hvd_hetero.analysis.predict.prediction import Prediction
from hvd_hetero.analysis.predict.simulator import MAJORITY, SOLO, Group, Outcome, Spent, blocking, partial
from hvd_hetero.analysis.predict.speeds import Known
from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.config.load import per_class
from hvd_hetero.config.schema import Config
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.local_steps import SHRINK, WAIT_AVOIDING, derive_tau, shrink_batches, too_slow_classes
from hvd_hetero.planning.plan import IDLE, SERVER, Plan, apportion, lockstep_plan, make_plan
from hvd_hetero.planning.stop_criteria import RunProgress, check_limits, next_rounds, round_samples

MOST_ROUNDS = 1000
MOST_DRAWS = 1_000_000
MOST_EVENTS = 30_000
"""So much is simulated of a run at most; the rest of it is taken to go on like that."""


class Scenario:
    """A configuration on a cluster whose speeds are known.

    Args:
        scale: of all batch sizes.
    """

    def __init__(self, config: Config, known: Known, scale: float = 1.0) -> None:
        self.config, self.known, self.cluster = config, known, known.cluster
        names = [c.name for c in self.cluster.classes]
        batch = per_class("train.batch_size", config.train.batch_size, [*known.speeds])
        self.batch_size = {name: max(1, round(scale * batch[name])) for name in names}
        self.scale = scale
        self.step_sec = {name: known.speeds[name].step_sec(self.batch_size[name]) for name in names}
        self.fastest = min(names, key=lambda name: self.step_sec[name])
        tau = config.train.tau
        self.taus = per_class("train.tau", tau, [*known.speeds]) if isinstance(tau, Mapping) else None
        self.tau = max(self.taus.values()) if self.taus is not None else int(tau)

    @property
    def capacity(self) -> float:
        """Samples a second if no rank waited or communicated."""
        return sum(len(c.ranks) * self.batch_size[c.name] / self.step_sec[c.name] for c in self.cluster.classes)

    def without(self, name: str) -> Scenario:
        """The same without a class."""
        left, first = [], 0
        for c in self.cluster.classes:
            if c.name != name:
                left.append(DeviceClass(c.name, c.device, tuple(range(first, first + len(c.ranks)))))
                first += len(c.ranks)
        cluster = Cluster(tuple(left), self.cluster.facts[:first])
        return Scenario(self.config, replace(self.known, cluster=cluster), self.scale)

    def methods(self) -> list[Prediction]:
        """Every method at the configuration's own tau and batch."""
        return [
            self._try("sync_sgd, all", "sync_sgd", lambda: self._lockstep(ALL)),
            self._try("sync_sgd, fast", "sync_sgd", lambda: self._lockstep(FAST)),
            self._try("balanced local SGD", "balanced_local_sgd", self._balanced),
            self.local(self.tau, self.taus),
            self._try("dlb", "dlb", self._dlb),
            self._try("byteps", "byteps", lambda: self._lockstep(FAST, SERVER)),
            self._try("eager_sgd, solo", "eager_sgd", lambda: self._eager(SOLO)),
            self._try("eager_sgd, majority", "eager_sgd", lambda: self._eager(MAJORITY)),
            self._try("biased local SGD, solo", "biased_local_sgd", lambda: self._local(self.tau, self.taus, SOLO)),
        ]

    def local(self, tau: int, taus: Mapping[str, int] | None = None) -> Prediction:
        """Local SGD whose fastest class takes tau steps in a round, the others by their speed or as given."""
        return self._try("unbalanced, biased local SGD", "biased_local_sgd", lambda: self._local(tau, taus))

    def _try(self, label: str, method: str, predict: Callable[[], Prediction]) -> Prediction:
        try:
            return replace(predict(), label=label, method=method)
        except ConfigError as error:
            return Prediction(label, method, {}, dict(self.batch_size), problem=f"{error.problem}; {error.remedy}")

    # ---- methods ----------------------------------------------------------------------------------------------------

    def _lockstep(self, participants: str, others: str = IDLE) -> Prediction:
        chosen = self._chosen(participants)
        if others == SERVER and len(chosen) == len(self.cluster.classes):
            problem = "there is no rank left to be a summation server"
            raise ConfigError("algorithm.name", "byteps", problem, "add a second class")
        batches = {rank: self.batch_size[c.name] for c in chosen for rank in c.ranks}
        plan = self._plan_of(batches, others)
        if others == SERVER:
            servers = self.cluster.size - len(batches)
            comm = self.known.link.served_sec(len(batches), servers, self.known.model_bytes)
            return self._follow(lambda _: plan, lambda p: self._blocking(p, comm), self.known.model_bytes)
        return self._follow(lambda _: plan, lambda p: self._blocking(p, self._sum_sec(len(batches)), IDLE),
                            sent_bytes(len(batches), self.known.model_bytes))

    def _chosen(self, participants: str) -> tuple[DeviceClass, ...]:
        """As ``algorithm.participants``; where no class is called fast, the measured speeds say which one is."""
        names = [c.name for c in self.cluster.classes]
        if participants == ALL:
            return self.cluster.classes
        return (self.cluster.classes[names.index(FAST if FAST in names else self.fastest)],)

    def _dlb(self) -> Prediction:
        ranks = self.cluster.size
        whole: int = getattr(self.config.algorithm, "global_batch", None) or sum(
            len(c.ranks) * self.batch_size[c.name] for c in self.cluster.classes)
        least = getattr(self.config.algorithm, "min_local_batch", 1)
        if whole < least * ranks:
            problem = f"{ranks} ranks share it, and each gets {least} at least"
            raise ConfigError("algorithm.global_batch", whole, problem, f"set {least * ranks} or more")
        class_of = [name for _, name in sorted((rank, c.name) for c in self.cluster.classes for rank in c.ranks)]

        def following(old: Plan | None) -> Plan:
            if old is None:
                batches = apportion(whole, [1 / ranks] * ranks, least)
            else:
                batches = self._batches(old)
                speeds = [b / self.known.speeds[name].step_sec(b) for b, name in zip(batches, class_of, strict=True)]
                if (new := apportion(whole, speeds, least)) == batches:
                    return old
                batches = new
            return self._plan_of(dict(enumerate(batches)))

        return self._follow(following, lambda p: self._blocking(p, self._sum_sec(ranks)),
                            sent_bytes(ranks, self.known.model_bytes))

    def _balanced(self) -> Prediction:
        tau = {c.name: self.tau for c in self.cluster.classes}
        return self._averaging(self._plan(tau, self.batch_size))

    def _local(self, tau: int, taus: Mapping[str, int] | None = None, mode: str | None = None) -> Prediction:
        if taus is not None:
            own = {c.name: taus[c.name] for c in self.cluster.classes}
            return self._averaging(self._plan(own, self.batch_size), mode)
        batch, step, policy = self.batch_size, self.step_sec, self.config.cluster.too_slow
        late = too_slow_classes(tau, step)
        mode = SOLO if late and policy == WAIT_AVOIDING else mode
        margin = self.config.train.tau_margin if mode is None else 0.0
        if policy == SHRINK:
            batch = shrink_batches(tau, step, batch, margin)
            step = {name: sec * batch[name] / self.batch_size[name] for name, sec in step.items()}
        return self._averaging(self._plan(derive_tau(tau, step, policy, margin), batch), mode)

    def _averaging(self, plan: Plan, mode: str | None = None) -> Prediction:
        comm = self._sum_sec(self.cluster.size)
        sent = sent_bytes(self.cluster.size, self.known.model_bytes)
        if mode is None:
            return self._follow(lambda _: plan, lambda p: self._blocking(p, comm), sent)
        self._check_several()
        spec, rng = self.config.aggregation, self._rng()
        groups = [g for g in self._groups(plan) if g.tau]
        outcome = partial(
            groups, comm, rng, mode=mode, by_class=True, patience_sec=spec.patience_sec,
            rounds=max(20, MOST_EVENTS // self.cluster.size // 4), sync_every=spec.sync_every, max_lag=spec.max_lag,
            law=self.known.jitter_law,
        )
        local_rounds = max(outcome.classes[c.name].steps / c.tau for c in plan.training)
        return self._follow(lambda _: plan, lambda p: outcome, sent, local_rounds)

    def _eager(self, mode: str) -> Prediction:
        self._check_several()
        if self.config.train.max_fast_steps is not None:
            problem = "eager_sgd hands out samples as ranks ask for them, so nobody knows who takes how many steps"
            raise ConfigError("train.max_fast_steps", self.config.train.max_fast_steps, problem, "set train.epochs")
        plan = self._plan_of({rank: self.batch_size[c.name] for c in self.cluster.classes for rank in c.ranks})
        spec, ranks = self.config.aggregation, self.cluster.size
        outcome = partial(
            self._groups(plan), self._sum_sec(ranks), self._rng(), mode=mode, contributions=max(MOST_EVENTS, 5 * ranks),
            sync_every=spec.sync_every, max_lag=spec.max_lag, law=self.known.jitter_law,
        )
        # the rounds of an epoch are only what its samples come to
        return self._follow(lambda _: plan, lambda p: outcome, sent_bytes(ranks, self.known.model_bytes),
                            self._samples(plan, outcome) / round_samples(plan))

    # ---- plans and time ---------------------------------------------------------------------------------------------

    def _plan(self, tau: Mapping[str, int], batch: Mapping[str, int]) -> Plan:
        return make_plan(self.cluster, self.known.samples, tau, batch, epoch_length=self.config.train.epoch_length)

    def _plan_of(self, batches: Mapping[int, int], others: str = IDLE) -> Plan:
        length = self.config.train.epoch_length
        samples = self.known.samples
        return lockstep_plan(self.cluster, samples, batches, others=others, epoch_length=length, tau=self.tau)

    def _batches(self, plan: Plan) -> list[int]:
        """By rank."""
        found: dict[int, int] = {}
        for c in plan.classes:
            found |= dict(zip(c.ranks, c.batch_sizes or (c.batch_size,) * len(c.ranks), strict=True))
        return [found[rank] for rank in range(len(found))]

    def _check_several(self) -> None:
        if self.cluster.size == 1:
            raise ConfigError("cluster.classes", 1, "one rank has nobody to run ahead of", "add more ranks")

    def _sum_sec(self, ranks: int) -> float:
        return self.known.link.sum_sec(ranks, self.known.model_bytes)

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(self.config.run.seed)

    def _groups(self, plan: Plan) -> list[Group]:
        """Ranks of one class whose batches differ are groups of their own."""
        groups = []
        for c in plan.classes:
            speed, sizes = self.known.speeds[c.name], c.batch_sizes or (c.batch_size,) * len(c.ranks)
            for size, ranks in Counter(sizes).items():
                step_sec = speed.step_sec(size) if c.tau else 0.0
                groups.append(Group(c.name, ranks, step_sec, c.tau, speed.jitter))
        return groups

    def _blocking(self, plan: Plan, comm_sec: float, absent: str | None = None) -> Outcome:
        """Args: absent: the role of classes that take no part in the collectives."""
        away = {c.name for c in plan.classes if c.role == absent}
        groups = [replace(g, joins=g.name not in away) for g in self._groups(plan)]
        rounds = max(20, min(MOST_ROUNDS, MOST_DRAWS // self.cluster.size)) if any(g.jitter for g in groups) else 1
        return blocking(groups, rounds, comm_sec, self._rng(), self.known.jitter_law)

    @staticmethod
    def _samples(plan: Plan, outcome: Outcome) -> float:
        """Of all ranks; where batches of a class differ, its ranks take the same number of steps."""
        return sum(outcome.classes[c.name].steps * c.round_samples / c.tau for c in plan.training)

    def _follow(
        self, following: Callable[[Plan | None], Plan], simulate: Callable[[Plan], Outcome], sent: float,
        rounds_of: float | None = None,
    ) -> Prediction:
        """Goes through the epochs as the trainer does, with times as simulated.

        Args:
            following: the plan of the next epoch from that of the last one; the same object if nothing changes.
            sent: bytes, of one rank in one collective.
            rounds_of: the plan's rounds that a simulation stands for, where those are not its collectives.
        """
        plan = following(None)
        check_limits(self.config.train, plan)
        outcome = simulate(plan)
        done, seconds, averages, samples = RunProgress(), 0.0, 0.0, 0.0
        spent = {c.name: np.zeros(4) for c in plan.classes}
        while rounds := next_rounds(self.config.train, plan, done):
            times = rounds / (rounds_of or outcome.rounds)
            seconds += times * outcome.seconds
            averages += times * outcome.rounds
            samples += times * self._samples(plan, outcome)
            for name, s in outcome.classes.items():
                spent[name] += times * np.array([s.compute, s.blocked, s.comm, s.steps])
            done = replace(done.after(replace(plan, rounds=rounds)), train_sec=seconds)
            new = following(plan)
            if new is not plan:
                plan, outcome = new, simulate(new)
        training = [c.name for c in plan.training]
        return Prediction(
            "", "", {c.name: c.tau for c in plan.classes}, {c.name: c.batch_size for c in plan.classes},
            seconds, samples, averages, averages * sent, max(spent[name][2] for name in training),
            {name: Spent(*map(float, s)) for name, s in spent.items()},
        )
