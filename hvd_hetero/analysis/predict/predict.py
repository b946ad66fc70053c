"""Predict what each method would take for the work that a configuration asks for, by the plans of its own policy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from hvd_hetero import algorithms
from hvd_hetero.algorithms.drop_compute import DropCompute
from hvd_hetero.algorithms.drop_compute_local import DropComputeLocal
from hvd_hetero.algorithms.grouped import Grouped
from hvd_hetero.algorithms.local_sgd import BLOCKING, LocalSGD
from hvd_hetero.algorithms.m_sync_sgd import MSyncOptions
from hvd_hetero.algorithms.policy import FLOAT32, MAJORITY, SOLO, WIRE_BYTES, Policy
from hvd_hetero.algorithms.synchronous import ALL, FAST, LockstepOptions, choose
from hvd_hetero.analysis.predict.delaying import delaying
from hvd_hetero.analysis.predict.dropping import dropping
from hvd_hetero.analysis.predict.grouped import simulate as grouped
from hvd_hetero.analysis.predict.link import sent_bytes
from hvd_hetero.analysis.predict.simulator import Group, Outcome, Spent, blocking, draw_works, partial, served
from hvd_hetero.analysis.predict.speeds import Inputs
from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.config.load import per_class
from hvd_hetero.config.schema import AUTO, AggregationConfig, Config
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import IDLE, SERVER, ClassPlan, Plan, round_way
from hvd_hetero.planning.quorum import QUORUM, best_quorum
from hvd_hetero.planning.schedules import next_rate
from hvd_hetero.planning.stop_criteria import RunProgress, check_limits, next_rounds, round_samples

SERVED = ("asgd", "ringmaster_asgd", "rennala_sgd", "malenia_sgd", "ringleader_asgd", "async_diloco",
          "omnilearn_asp")  # fmt: skip
GROUPED = ("wagma_sgd", "daso", "decentlam")
PLAIN = {"delayed": False, "delay_steps": None, "own_weight": 0.0, "wire": FLOAT32}
"""What averages that nobody waits for are."""
MOST_ROUNDS = 1000
MOST_DRAWS = 1_000_000
MOST_EVENTS = 30_000
"""Of a run, no more is simulated; the rest of it is taken to be alike."""


@dataclass(frozen=True)
class Prediction:
    """What one method would take.

    Attributes:
        label: as people call it, ``method``: ``algorithm.name``.
        tau: local steps in a round, by class, at the end of the run, as ``batch_size``.
        samples: trained on, over all ranks; ``averages``: collectives that were made.
        sent_bytes: by each rank that trains; ``comm_sec``: spent on all collectives.
        classes: seconds by kind, and steps.
        round_way: how far a round's average moves, see :func:`hvd_hetero.planning.plan.round_way`.
        problem: why the method cannot run; the rest is empty then.
    """

    label: str
    method: str
    tau: dict[str, int]
    batch_size: dict[str, int]
    seconds: float = 0.0
    samples: float = 0.0
    averages: float = 0.0
    sent_bytes: float = 0.0
    comm_sec: float = 0.0
    classes: Mapping[str, Spent] | None = None
    round_way: float = 1.0
    problem: str | None = None

    @property
    def samples_per_sec(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def blocked(self) -> dict[str, float]:
        return {name: spent.blocked_share for name, spent in (self.classes or {}).items()}


class Scenario:
    """A configuration on a cluster whose speeds are known.

    Args:
        scale: of all batch sizes.
    """

    def __init__(self, config: Config, inputs: Inputs, scale: float = 1.0) -> None:
        self.config, self.inputs, self.cluster = config, inputs, inputs.cluster
        names = [c.name for c in self.cluster.classes]
        batch = per_class("train.batch_size", config.train.batch_size, [*inputs.speeds])
        self.batch_size = {name: max(1, round(scale * batch[name])) for name in names}
        self.scale = scale
        self.step_sec = {name: inputs.speeds[name].step_sec(self.batch_size[name]) for name in names}
        self.fastest = min(names, key=lambda name: self.step_sec[name])
        tau = config.train.tau
        self.affordable = self._affordable()
        every = per_class("train.tau", self.affordable if tau == AUTO else tau, [*inputs.speeds])
        self.taus = {name: every[name] for name in names} if isinstance(tau, Mapping) else None
        self.tau = max(every.values())
        try:
            self._fast = choose(self.cluster, FAST)[0].name
        except ConfigError:  # a run could not tell which class is the fast one; here the speeds do
            self._fast = self.fastest

    def _affordable(self) -> int:
        """Return tau of the fastest class that a run with ``train.tau=auto`` would take at these speeds."""
        train = replace(self.config.train, tau=AUTO, batch_size=self.batch_size)
        policy = LocalSGD(replace(self.config, train=train), self.cluster, self.inputs.samples)
        policy.average_sec = self.inputs.link.sum_sec(self.cluster.size, self.inputs.model_bytes)
        return policy.tau_fastest(self.step_sec)

    @property
    def capacity(self) -> float:
        """Samples a second if no rank waited or communicated."""
        return sum(len(c.ranks) * self.batch_size[c.name] / self.step_sec[c.name] for c in self.cluster.classes)

    def without(self, name: str) -> Scenario:
        """Return the same scenario without a class."""
        left = [c for c in self.cluster.classes if c.name != name]
        ends = [0, *accumulate(len(c.ranks) for c in left)]
        ranks = [tuple(range(*ends)) for ends in pairwise(ends)]
        classes = tuple(DeviceClass(c.name, c.device, ranks_left) for c, ranks_left in zip(left, ranks, strict=True))
        cluster = Cluster(classes, self.cluster.facts[: ends[-1]])
        return Scenario(self.config, replace(self.inputs, cluster=cluster), self.scale)

    def methods(self) -> list[Prediction]:
        """Predict every method at the configuration's own tau and batch."""
        m = self.best_quorum
        return [
            self._predict("sync_sgd, all", "sync_sgd", participants=ALL),
            self._predict("sync_sgd, fast", "sync_sgd", participants=FAST),
            self._predict("balanced local SGD", "balanced_local_sgd", aggregation={"mode": BLOCKING}),
            self.local(self.tau, self.taus),
            self._predict("dlb", "dlb"),
            self._predict("byteps", "byteps"),
            self._predict("eager_sgd, solo", "eager_sgd", mode=SOLO),
            self._predict("eager_sgd, majority", "eager_sgd", mode=MAJORITY),
            self._predict("biased local SGD, solo", "biased_local_sgd", self.taus, {**PLAIN, "mode": SOLO}),
            *([self._predict("biased local SGD, quorum", "biased_local_sgd", self.taus, PLAIN)]
              if self.config.aggregation.mode == QUORUM else []),
            *(self._predict(name, name, self.taus) for name in SERVED),
            self._predict("nonblocking_sgd", "nonblocking_sgd"),
            self._predict("stl_sgd", "stl_sgd", self.taus),
            self._predict("bvr_l_sgd", "bvr_l_sgd"),
            self._predict("drop_compute", "drop_compute"),
            self._predict("drop_compute_local", "drop_compute_local", self.taus),
            *(self._predict(name, name) for name in GROUPED),
            self._predict(f"m_sync_sgd, {m:g} of {self.cluster.size}", "m_sync_sgd", quorum=m),
        ]

    @property
    def best_quorum(self) -> float:
        """The ranks that m-Synchronous SGD waits for: as configured, or those with which it takes the least time."""
        options, rng, size = self.config.algorithm, np.random.default_rng(self.config.run.seed), self.cluster.size
        options = options if isinstance(options, MSyncOptions) else MSyncOptions()
        ranks = [Group(c.name, len(c.ranks), self.step_sec[c.name], 1, self.inputs.speeds[c.name].jitter)
                 for c in self.cluster.classes]  # fmt: skip
        drawn = [draw_works(g, max(1, MOST_DRAWS // 10 // size), rng, self.inputs.jitter_law) for g in ranks]
        noise = size if options.noise is None else options.noise
        return options.quorum or best_quorum(np.concatenate(drawn, axis=1), noise)

    def local(self, tau: int, taus: Mapping[str, int] | None = None) -> Prediction:
        """Predict local SGD whose fastest class takes tau steps in a round, the others by their speed or as given."""
        return self._predict("unbalanced, biased local SGD", "biased_local_sgd", taus or tau, {"mode": BLOCKING})

    def _predict(
        self, label: str, name: str, tau: int | Mapping[str, int] | None = None,
        aggregation: Mapping[str, Any] | None = None, **options: Any,
    ) -> Prediction:  # fmt: skip
        """Predict one method, configured as it is but for these, and without what is for methods of another kind."""
        method, config = algorithms.get(name), self.config
        is_own = config.algorithm.name == name
        method_options = replace(config.algorithm if is_own else method.Options(name=name), **options)
        if isinstance(method_options, LockstepOptions) and method_options.participants == FAST:
            method_options = replace(method_options, participants=self._fast)
        train = replace(config.train, **({} if is_own else method.unused_train))
        train = replace(train, tau=tau or self.tau, batch_size=self.batch_size)
        spec = replace(config.aggregation, **{**({} if is_own else method.unused), **(aggregation or {})})
        if spec.mode != QUORUM:
            spec = replace(spec, quorum=None)
        if self._has_default_weights:
            spec = replace(spec, weights=method.defaults_for(self._settings(spec)).get("aggregation.weights"))
        config = replace(config, algorithm=method_options, train=train, aggregation=spec)
        try:
            return replace(self._run(method(config, self.cluster, self.inputs.samples)), label=label)
        except ConfigError as error:
            return Prediction(label, name, {}, dict(self.batch_size), problem=f"{error.problem}; {error.remedy}")

    def _settings(self, aggregation: AggregationConfig) -> Mapping[str, Mapping[str, Any]]:
        train, cluster = self.config.train, self.config.cluster
        return {"train": vars(train), "aggregation": vars(aggregation), "cluster": vars(cluster)}

    @property
    def _has_default_weights(self) -> bool:
        """Whether the configured weights are its method's default, so that another method has its own."""
        defaults = algorithms.get(self.config.algorithm.name).defaults_for(self._settings(self.config.aggregation))
        return self.config.aggregation.weights == defaults.get("aggregation.weights")

    # ---- plans and time ---------------------------------------------------------------------------------------------

    def _run(self, policy: Policy) -> Prediction:
        """Go through the epochs as the trainer does, with times as simulated.

        Raises:
            ConfigError: the policy refuses the settings, or has no plan at these speeds.
        """
        policy.check()
        plan = policy.make_plan(self.step_sec if policy.needs_speeds else None)
        policy.start(plan)
        check_limits(self.config.train, plan)
        outcome, step_sec = self._simulate(policy, plan), self._step_sec(policy, plan)
        done, seconds, averages, samples, pushes, sent = RunProgress(), 0.0, 0.0, 0.0, 0.0, 0.0
        spent = {c.name: np.zeros(5) for c in plan.classes}
        policy.follow_rate(next_rate(self.config.train, plan, done))
        seen, settled = set[str](), ""  # the policy's states with this plan: one that comes back does so for ever
        while rounds := next_rounds(self.config.train, plan, done):
            times = rounds / _plan_rounds(policy, plan, outcome)
            seconds += times * outcome.seconds
            averages += times * outcome.rounds
            pushes, sent = pushes + times * outcome.pushes, sent + times * outcome.sent_bytes
            samples += times * _samples(plan, outcome)
            for name, s in outcome.classes.items():
                spent[name] += times * np.array([s.compute, s.blocked, s.comm, s.steps, s.dropped])
            done = replace(done.after(replace(plan, rounds=rounds)), train_sec=seconds)
            policy.follow_rate(next_rate(self.config.train, plan, done))
            if str(policy.state_dict()) == settled:
                continue
            rhythm, new = policy.rhythm, policy.replan(step_sec)
            if (new is not plan and new != plan) or policy.rhythm != rhythm:
                plan, outcome, step_sec = new, self._simulate(policy, new), self._step_sec(policy, new)
                seen.clear()
            state = str(policy.state_dict())
            settled = state if state in seen else ""
            seen.add(state)
        training = [c.name for c in plan.training]
        return Prediction(
            "", policy.options.name, {c.name: c.tau for c in plan.classes},
            {c.name: c.batch_size for c in plan.classes}, seconds, samples, averages,
            pushes * self.inputs.model_bytes or sent or averages * self._collective(policy, plan)[1],
            max(spent[name][2] for name in training),
            {name: Spent(*map(float, s)) for name, s in spent.items()},
            round_way(plan, str(policy.aggregation.weights), policy.aggregation.max_extrapolation),
        )  # fmt: skip

    def _step_sec(self, policy: Policy, plan: Plan) -> list[float]:
        """Return what a local step of each rank takes on average; NaN for those that take none."""
        found = {rank: policy.gradients_of_step * self.inputs.speeds[c.name].step_sec(size) if c.tau else math.nan
                 for c in plan.classes for rank, size in _batches(c)}  # fmt: skip
        return [found[rank] for rank in sorted(found)]

    def _collective(self, policy: Policy, plan: Plan) -> tuple[float, float]:
        """Return seconds of one collective, and the bytes that each rank sends in it."""
        link, part = self.inputs.link, WIRE_BYTES[policy.aggregation.wire] / WIRE_BYTES[FLOAT32]
        nbytes = part * policy.collectives_of_round * self.inputs.model_bytes
        servers = sum(len(c.ranks) for c in plan.classes if c.role == SERVER)
        ranks = sum(len(c.ranks) for c in plan.classes if _joins(policy, c)) - servers
        if servers:
            return link.served_sec(ranks, servers, nbytes), nbytes
        return link.sum_sec(ranks, nbytes), sent_bytes(ranks, nbytes)

    def _simulate(self, policy: Policy, plan: Plan) -> Outcome:
        """Simulate rounds of a plan, by the collectives that its ranks meet in."""
        size, spec, distribution = self.cluster.size, policy.aggregation, self.inputs.jitter_law
        gradients = policy.gradients_of_step
        comm_sec, rng = self._collective(policy, plan)[0], np.random.default_rng(self.config.run.seed)
        groups = [
            Group(c.name, ranks, gradients * self.inputs.speeds[c.name].step_sec(batch) if c.tau else 0.0, c.tau,
                  self.inputs.speeds[c.name].jitter, _joins(policy, c))
            for c in plan.classes for batch, ranks in Counter(batch for _, batch in _batches(c)).items()
        ]  # fmt: skip
        if (rule := policy.server_rule()) is not None:
            groups = [replace(g, tau=policy.steps_of_push or g.tau) for g in groups]
            return served(groups, rule, self.inputs.link.exchange_sec(self.inputs.model_bytes), rng,
                          pushes=max(MOST_EVENTS // 3, 10 * size), distribution=distribution)  # fmt: skip
        mode, is_random = policy.partial_mode(self.step_sec), any(g.jitter for g in groups)
        if isinstance(policy, Grouped):
            ranks, most = [r for c in plan.classes for r in c.ranks], min(MOST_ROUNDS, max(100, MOST_DRAWS // size))
            return grouped(policy, groups, ranks, min(plan.rounds, most if is_random else 100), self.inputs.link,
                           self.inputs.model_bytes, rng, distribution)  # fmt: skip
        if mode is None:
            is_late = spec.delayed and isinstance(policy, LocalSGD)
            rounds = max(20, min(MOST_ROUNDS, MOST_DRAWS // size)) if is_late or is_random else 1
            if isinstance(policy, DropCompute | DropComputeLocal):
                parts = [(g.tau if isinstance(policy, DropComputeLocal) else policy.micro_batches[g.name]) or 1
                         for g in groups]  # fmt: skip
                return dropping(groups, rounds, comm_sec, rng, distribution, micro_batches=parts,
                                threshold=policy.options.threshold_of)  # fmt: skip
            if is_late and isinstance(policy, LocalSGD):
                shares = {c.name: policy.delay_of(c) / c.tau if c.tau else 1.0 for c in plan.classes}
                return delaying(groups, rounds, comm_sec, rng, distribution, shares=[shares[g.name] for g in groups])
            return blocking(groups, rounds, comm_sec, rng, distribution)
        quorum, apart = policy.quorum(), 1
        if quorum is not None:  # ranks come class by class here, whatever their numbers are
            quorum = replace(quorum, weights=tuple(quorum.weights[rank] for c in plan.classes for rank in c.ranks))
            apart = max(g.tau for g in groups)
        # gradients go with what each rank contributes, models with what a class does
        until: dict[str, Any] = {"contributions": max(MOST_EVENTS, 5 * size)} if policy.claims_samples else {
            "by_class": True, "rounds": max(20, MOST_EVENTS // size // (4 * apart)), "patience_sec": spec.patience_sec}
        return partial(groups, comm_sec, rng, mode=MAJORITY if mode == MAJORITY else SOLO, quorum=quorum,
                       sync_every=policy.sync_every, max_lag=spec.max_lag, distribution=distribution,
                       drops_late=policy.drops_late, micro_batches=policy.micro_batch_count,
                       **until)  # fmt: skip


def _batches(c: ClassPlan) -> Iterator[tuple[int, int]]:
    """Yield each rank of a class, and the samples of its step."""
    return zip(c.ranks, c.batch_sizes or (c.batch_size,) * len(c.ranks), strict=True)


def _joins(policy: Policy, c: ClassPlan) -> bool:
    """Tell whether a class meets the others in collectives: all average models, idle ranks have no gradients."""
    return policy.has_blocking_average or c.role != IDLE


def _samples(plan: Plan, outcome: Outcome) -> float:
    """Return the samples of all ranks; where batches of a class differ, its ranks take the same number of steps."""
    return sum(outcome.classes[c.name].steps * c.round_samples / c.tau for c in plan.training)


def _plan_rounds(policy: Policy, plan: Plan, outcome: Outcome) -> float:
    """Return the plan's rounds that a simulation stands for; where ranks claim samples, these alone count."""
    if policy.claims_samples:
        return _samples(plan, outcome) / round_samples(plan)
    return max(outcome.classes[c.name].steps / c.tau for c in plan.training)
