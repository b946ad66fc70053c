"""The policy of the local-SGD methods: tau_g local steps of every rank, then the weighted average of all models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hvd_hetero.algorithms.policy import FLOAT32, SOLO, Policy
from hvd_hetero.config.load import per_class
from hvd_hetero.config.schema import AUTO
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning import local_steps
from hvd_hetero.planning.local_steps import LEAVE_OUT, SHRINK, WAIT_AVOIDING
from hvd_hetero.planning.plan import (
    BY_STEPS,
    NORMALISED,
    ClassPlan,
    Plan,
    annealed_weight,
    check_least_round,
    make_plan,
    progress_factors,
)
from hvd_hetero.planning.quorum import QUORUM, Quorum, check_quorum
from hvd_hetero.planning.rebalance import NEW_SHARE, Rebalancer

BLOCKING = "blocking"
ROUNDS = 1
"""Rounds of an epoch at least, where their length is chosen."""
FEW_ROUNDS = 4
"""With fewer rounds in an epoch, and no room for longer ones, that is told at the start."""
AVERAGED = ("average", "average_seed")
"""What ``aggregation.optimizer_state`` may be where the optimizers' state is averaged."""


class LocalSGD(Policy):
    """Derive local steps from speed, epoch by epoch, unless they are set for each class.

    Attributes:
        is_partial: whether no class is waited for, by the settings or by the speeds at the job's start; then it stays.
        late: from :meth:`start` on, the classes that are too slow for a step in a round, and how many times.
    """

    executor: ClassVar[str] = "hvd_hetero.algorithms.execution.local_sgd.LocalSGDExecutor"
    is_partial = False
    _rebalancer: Rebalancer | None = None

    @property
    def needs_speeds(self) -> bool:
        return not isinstance(self.train.tau, Mapping)

    @property
    def needs_average_sec(self) -> bool:
        return self.train.tau == AUTO

    @property
    def has_blocking_average(self) -> bool:
        return self.aggregation.mode == BLOCKING

    @property
    def needs_quiesce(self) -> bool:
        return not self.has_blocking_average or self.too_slow == WAIT_AVOIDING or self.aggregation.delayed

    @property
    def follows_plan(self) -> bool:
        return not self.is_partial

    def check(self) -> None:
        super().check()
        if self.aggregation.outer_nesterov and self.aggregation.outer_momentum == 0:
            remedy = "set aggregation.outer_momentum too"
            raise ConfigError("aggregation.outer_nesterov", True, "needs momentum", remedy)
        if self.aggregation.delayed:
            self._check_delayed()
        check_quorum("aggregation.quorum", self.aggregation.quorum, self.cluster.size, self.aggregation.mode)
        for key, neutral in (("delay_steps", None), ("own_weight", 0.0)) if not self.aggregation.delayed else ():
            if (value := getattr(self.aggregation, key)) != neutral:
                problem, remedy = "is of delayed averages", "set aggregation.delayed=true too"
                raise ConfigError(f"aggregation.{key}", value, problem, remedy)
        if not self.has_blocking_average or (self._may_avoid_waiting and self.cluster.size > 1):
            self._check_partial()
        if not self.has_blocking_average and self.needs_speeds and self.too_slow == LEAVE_OUT:
            problem = f"aggregation.mode={self.aggregation.mode} goes on without late classes already"
            raise ConfigError("cluster.too_slow", LEAVE_OUT, problem, "set cluster.too_slow=wait_avoiding")
        if self.aggregation.weights == NORMALISED and (not self.has_blocking_average or self._may_avoid_waiting):
            key, value = ("cluster.too_slow", self.too_slow) if self.has_blocking_average else (
                "aggregation.mode", self.aggregation.mode)  # fmt: skip
            problem = "adds up what ranks contribute as it comes, which aggregation.weights=normalised does not fit"
            raise ConfigError(key, value, problem, "set aggregation.weights=steps, or wait for all ranks")
        if self.aggregation.anneal_from is not None:
            self._check_annealing()
        if self.needs_speeds and self.too_slow == LEAVE_OUT and self.aggregation.optimizer_state in AVERAGED:
            problem = "a class that is left out has no optimizer state to be averaged"
            raise ConfigError("cluster.too_slow", LEAVE_OUT, problem, "set aggregation.optimizer_state=local or reset")
        if self.needs_speeds:
            least = 1 if self.train.tau == AUTO else self.train.tau
            check_least_round(self.cluster, self.samples, least, self.batch_size, self.train.epoch_length)

    def _check_delayed(self) -> None:
        """Refuse what needs the average of a round at its end."""
        steps, tau = self.aggregation.delay_steps, self.train.tau
        longest = max(tau.values()) if isinstance(tau, Mapping) else tau
        if steps is not None and longest != AUTO and steps > longest:
            problem, remedy = f"a round has {longest} steps of the fastest class", f"set {longest} or less, or null"
            raise ConfigError("aggregation.delay_steps", steps, problem, remedy)
        spec, kept, momentum = self.aggregation, self.aggregation.optimizer_state, self.aggregation.outer_momentum
        for key, value, fits, other in (
            ("aggregation.mode", spec.mode, spec.mode == BLOCKING, "aggregation.mode=blocking"),
            ("aggregation.outer_lr", spec.outer_lr, spec.outer_lr == 1, "aggregation.outer_lr=1.0"),
            ("aggregation.outer_momentum", momentum, momentum == 0, "aggregation.outer_momentum=0.0"),
            ("cluster.too_slow", self.too_slow, not self._may_avoid_waiting, "another cluster.too_slow"),
            ("aggregation.optimizer_state", kept, kept not in AVERAGED, "local or reset"),
        ):
            if not fits:
                remedy = f"set {other}, or aggregation.delayed=false"
                raise ConfigError(key, value, "does not go with aggregation.delayed", remedy)

    def _check_annealing(self) -> None:
        """Refuse to let a bias of weights end that is not there, or where ranks are in different rounds."""
        weights, start = self.aggregation.weights, self.aggregation.anneal_from
        if weights != BY_STEPS:
            problem = f"aggregation.weights={weights} has no bias by steps that could end"
            raise ConfigError("aggregation.anneal_from", start, problem, f"set aggregation.weights={BY_STEPS}, or null")
        if not self.has_blocking_average or (self._may_avoid_waiting and self.cluster.size > 1):
            problem = "needs all ranks to be in the same round, and some are not waited for"
            remedy = "set aggregation.mode=blocking and another cluster.too_slow than wait_avoiding, or null"
            raise ConfigError("aggregation.anneal_from", start, problem, remedy)

    def _check_partial(self) -> None:
        """Refuse what cannot be done without waiting for all ranks."""
        spec = self.aggregation
        if spec.wire != FLOAT32:
            ways = "aggregation.mode, cluster.too_slow"
            problem = f"without waiting ({ways}) there is no time at which ranks could agree on how to round"
            remedy = "set float32, or wait: aggregation.mode=blocking, another cluster.too_slow"
            raise ConfigError("aggregation.wire", spec.wire, problem, remedy)
        if self.cluster.size == 1:
            remedy = "set aggregation.mode=blocking, or start more ranks"
            raise ConfigError("aggregation.mode", spec.mode, "one rank has nobody to be late for", remedy)
        if spec.optimizer_state in AVERAGED:
            ways = "aggregation.mode, cluster.too_slow"
            problem = f"without waiting ({ways}) there is no time at which all ranks are there"
            remedy = "set local or reset, or wait: aggregation.mode=blocking, another cluster.too_slow"
            raise ConfigError("aggregation.optimizer_state", spec.optimizer_state, problem, remedy)

    @property
    def _may_avoid_waiting(self) -> bool:
        return self.needs_speeds and self.too_slow == WAIT_AVOIDING

    def _late(self, step_sec: Mapping[str, float]) -> dict[str, float]:
        longest = local_steps.LONGEST if self.train.tau == AUTO else self.train.tau
        return local_steps.too_slow_classes(longest, step_sec) if self.needs_speeds and step_sec else {}

    @property
    def mode(self) -> str:
        """What starts a round where no class is waited for."""
        return SOLO if self.has_blocking_average else self.aggregation.mode

    def quorum(self) -> Quorum | None:
        if self.aggregation.mode != QUORUM or self.aggregation.quorum is None:
            return None
        return Quorum.of(self.aggregation.quorum, [c.weight for c in self.plan.by_rank()])

    def partial_mode(self, step_sec: Mapping[str, float]) -> str | None:
        avoids_waiting = self.is_partial or (self.too_slow == WAIT_AVOIDING and self._late(step_sec))
        return self.mode if avoids_waiting or not self.has_blocking_average else None

    def taus(self, step_sec: Mapping[str, float] | None) -> dict[str, int]:
        """Return local steps by class: as set, or derived from the fastest class's tau and the measured step times."""
        if isinstance(self.train.tau, Mapping):
            return per_class("train.tau", self.train.tau, [c.name for c in self.cluster.classes])
        assert step_sec is not None
        return local_steps.derive_tau(self.tau_fastest(step_sec), step_sec, self.too_slow, self._margin(step_sec))

    def tau_fastest(self, step_sec: Mapping[str, float]) -> int:
        """Return local steps of the fastest class: as set, or of the shortest round that is affordable."""
        if self.train.tau != AUTO:
            return int(self.train.tau)
        if self.cluster.size == 1:  # nobody waits, and there is nobody to drift apart from
            return self._longest(step_sec)
        late = self._late(step_sec)
        if late and self.too_slow == SHRINK:
            return local_steps.LONGEST
        waited = {name: sec for name, sec in step_sec.items() if name not in late}
        return local_steps.shortest_round(
            waited, self._step_samples, self.average_sec, self.train.tau_overhead, margin=self._margin(step_sec),
            longest=self._longest(step_sec), delayed=self.aggregation.delayed,
        )  # fmt: skip

    @property
    def _step_samples(self) -> dict[str, float]:
        """Samples of one step of all ranks, by class."""
        return {c.name: float(len(c.ranks) * self.batch_size[c.name]) for c in self.cluster.classes}

    def _longest(self, step_sec: Mapping[str, float]) -> int:
        """Return local steps of the fastest class in the longest round for which epochs and limits have room."""
        fastest, train = min(step_sec, key=step_sec.__getitem__), self.train
        samples = min(self.samples / ROUNDS, train.max_samples or self.samples)
        in_step = {name: size * step_sec[fastest] / step_sec[name] for name, size in self._step_samples.items()}
        rounded = sum(size for name, size in self._step_samples.items() if name != fastest) / 2
        fits = [local_steps.LONGEST, (samples - rounded) / sum(in_step.values())]
        if train.epoch_length == "fast_steps":
            fits.append(self.samples / (ROUNDS * self.batch_size[fastest] * self.cluster.size))
        if train.max_fast_steps is not None:
            fits.append(train.max_fast_steps)
        return max(1, math.floor(min(fits)))

    def few_rounds(self, plan: Plan) -> str | None:
        step_sec = {c.name: c.step_sec for c in plan.training if c.step_sec is not None}
        tau = plan.fastest.tau
        if self.cluster.size == 1 or plan.rounds >= FEW_ROUNDS or tau >= local_steps.LONGEST:
            return None
        if 2 * tau <= self._longest(step_sec):  # it was chosen, though longer ones had room
            return None
        least = math.ceil(max(step_sec.values()) / min(step_sec.values()) * (1 - 1e-9))
        shorter = max(least, tau * plan.rounds // FEW_ROUNDS)
        remedy = f"set train.tau={shorter} for more averages, or " if 2 * shorter <= tau else ""
        rounds = "1 round" if plan.rounds == 1 else f"{plan.rounds} rounds"
        return (f"an epoch of {self.samples} samples has only {rounds}, because shorter rounds would cost more than "
                f"train.tau_overhead allows; {remedy}take a smaller train.batch_size or a larger dataset")  # fmt: skip

    def step_times(self) -> Mapping[str, float] | None:
        """Return the step times that the plan was made with, where :attr:`needs_speeds`; of one class alone, any."""
        if not self.needs_speeds:
            return None
        return {c.name: (c.step_sec or 1.0) * self.batch_size[c.name] / c.batch_size for c in self.plan.classes}

    def _margin(self, step_sec: Mapping[str, float]) -> float:
        """Return less of the margin, the more of the cluster waits when slower classes are early.

        It is 0 where they are half of the cluster, and where no rank waits for a late class: one that is early would
        end the epoch early, for all.
        """
        if not self.is_blocking(step_sec):
            return 0.0
        return self.train.tau_margin * max(0.0, 1 - 2 * local_steps.slower_share(step_sec, self._step_samples))

    def make_plan(self, step_sec: Mapping[str, float] | None) -> Plan:
        batch = self.batch_size
        if step_sec is not None and self.needs_speeds and self.too_slow == SHRINK:
            tau, margin = self.tau_fastest(step_sec), self._margin(step_sec)
            batch = local_steps.shrink_batches(tau, step_sec, batch, margin, self.min_batch)
            step_sec = {name: sec * batch[name] / self.batch_size[name] for name, sec in step_sec.items()}
        return make_plan(
            self.cluster, self.samples, self.taus(step_sec), batch, weights=str(self.aggregation.weights),
            epoch_length=self.train.epoch_length, step_sec=step_sec, whole_batch=self.batch_size,
        )  # fmt: skip

    def progress_factor(self, name: str) -> float:
        """Return how often the progress of a class's ranks counts in the average of a round."""
        if self.aggregation.weights != NORMALISED:
            return 1.0
        return progress_factors(self.plan, self.aggregation.max_extrapolation).get(name, 1.0)

    def weight_of(self, class_plan: ClassPlan) -> float:
        """Return the weight of a class's rank in the average of this round, see :func:`annealed_weight`."""
        if self.aggregation.anneal_from is None or not class_plan.tau:
            return class_plan.weight
        ranks = sum(len(c.ranks) for c in self.plan.training)
        return annealed_weight(class_plan.weight, ranks, self.fraction_done, self.aggregation.anneal_from)

    def delay_of(self, class_plan: ClassPlan) -> int:
        """Return the local steps after which a class takes in a delayed average: the same share of a round for all."""
        steps, longest = self.aggregation.delay_steps, max(c.tau for c in self.plan.training)
        return class_plan.tau if steps is None else min(class_plan.tau, round(steps * class_plan.tau / longest))

    def start(self, plan: Plan) -> None:
        super().start(plan)
        measured = {
            c.name: c.step_sec * self.batch_size[c.name] / c.batch_size for c in plan.classes if c.step_sec is not None
        }
        self.late, self.is_partial = self._late(measured), self.partial_mode(measured) is not None
        if self.train.adapt_tau and self.needs_speeds and len(measured) > 1:
            is_auto = self.train.tau == AUTO  # a round is chosen by measured times, and judged as it is chosen
            self._rebalancer = Rebalancer(
                measured, self.batch_size, 0.0 if is_auto else self._margin(measured), average_sec=self.average_sec,
                affordable=self.train.tau_overhead if is_auto else 0.0, delayed=self.aggregation.delayed,
            )  # fmt: skip

    @property
    def rebalances(self) -> bool:
        return self._rebalancer is not None and self.follows_plan and self.too_slow != SHRINK

    def replan(self, step_sec: Sequence[float], rounds: int | None = None) -> Plan:
        """Derive tau anew from the run's own step times, where that leaves clearly less of the cluster waiting."""
        judge = self._rebalancer
        if judge is None:
            return self.plan
        slowest = {c: max(step_sec[r] for r in c.ranks) for c in self.plan.training}
        worked = {c: sec for c, sec in slowest.items() if not math.isnan(sec)}
        epoch_sec = (rounds or self.plan.rounds) * min((c.tau * sec for c, sec in worked.items()), default=0.0)
        full_step = {c.name: sec * self.batch_size[c.name] / c.batch_size for c, sec in worked.items()}
        if not judge.observe(full_step, epoch_sec):
            return self.plan
        for times, is_gain in ((judge.latest, judge.is_obvious_gain), (judge.step_sec, judge.is_worth_it)):
            try:
                proposed = self.make_plan(times)
            except ConfigError:  # a class is too slow for one step now, or a round too large: the old plan still works
                continue
            if len(proposed.training) < len(self.plan.training):
                continue  # a class that is left out is measured no more, and could never come back
            if is_gain(self.plan, proposed):
                saved = judge.capacity_saved(self.plan, proposed, times)
                self.reason = f"{saved:.1%} of the cluster's capacity is no longer lost to waiting" if saved > 0 else (
                    "shorter rounds have become affordable (train.tau_overhead)")
                self.plan = proposed
                break
        return self.plan

    def note_average(self, seconds: float) -> None:
        # what travels beside the steps is not seen
        if self.needs_average_sec and not self.aggregation.delayed and not math.isnan(seconds):
            self.average_sec += NEW_SHARE * (seconds - self.average_sec)
            if self._rebalancer is not None:
                self._rebalancer.average_sec = self.average_sec

    def state_dict(self) -> dict[str, Any]:
        judged = {} if self._rebalancer is None else {"rebalancer": self._rebalancer.state_dict()}
        return {"is_partial": self.is_partial, "average_sec": self.average_sec, **judged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.is_partial, self.average_sec = state["is_partial"], state.get("average_sec", 0.0)
        if self._rebalancer is not None:
            self._rebalancer.load_state_dict(state["rebalancer"])
            self._rebalancer.average_sec = self.average_sec
