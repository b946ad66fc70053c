"""Add up over epochs where every rank's time went, and what every device class did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.stop_criteria import RunProgress
from hvd_hetero.telemetry.emulation import emulation_reasons
from hvd_hetero.telemetry.staleness import PartialAccounts
from hvd_hetero.telemetry.stopwatch import KINDS, split_waiting

ADDED = ("excluded", "sent", "dropped")
"""Counts of an epoch; others are of the run so far."""


class Accounts:
    """Adds up, over epochs, where every rank's time went and what every class did.

    Args:
        delayed: whether steps are delayed on purpose.

    Attributes:
        emulation: why the times are not those of real devices, in earlier jobs too.
    """

    def __init__(self, cluster: Cluster, delayed: bool = False) -> None:
        self._cluster = cluster
        self.emulation = emulation_reasons(cluster.emulated, delayed)
        self.seconds = [dict.fromkeys(KINDS, 0.0) for _ in range(cluster.size)]
        self.steps = [0] * cluster.size
        self.samples = [0] * cluster.size
        self.excluded = [0] * cluster.size
        self.sent, self.dropped = [0] * cluster.size, [0] * cluster.size
        self.overflows, self.memory = [0] * cluster.size, [0] * cluster.size
        self.rounds = 0
        self.epochs = 0
        self.partial = PartialAccounts()
        self.earlier = RunProgress()

    def enter(
        self,
        plan: Plan,
        rounds: int,
        steps: Sequence[int],
        kinds: Sequence[Mapping[str, float]],
        collectives: Sequence[Sequence[float]],
        counts: Mapping[str, Sequence[int]] | None = None,
    ) -> float:
        """Enters one epoch; returns its seconds.

        Args:
            rounds: averages that were made.
            steps: local steps, by rank.
            kinds: seconds of each kind, by rank.
            collectives: durations ``[ranks][collectives]`` in the order in which ranks met in them, NaN: not in it.
            counts: of the epoch, by rank: ``sent``, bytes given to sums and averages; ``dropped``, samples left out
                of steps; ``excluded``, contributions that were, because a rank's values were non-finite. Of the run so
                far: ``overflows`` of gradients in float16; ``memory``, the most bytes.
        """
        blocked, comm = split_waiting(collectives)
        for rank, mine in enumerate(plan.by_rank()):
            together = {"blocked": blocked[rank], "comm": comm[rank]}
            for kind in KINDS:
                self.seconds[rank][kind] += kinds[rank][kind] + together.get(kind, 0.0)
            self.steps[rank] += steps[rank]
            self.samples[rank] += steps[rank] * mine.batch_size
        for name, numbers in (counts or {}).items():
            before = getattr(self, name) if name in ADDED else [0] * len(numbers)
            setattr(self, name, [a + b for a, b in zip(before, numbers, strict=True)])
        self.rounds += rounds
        self.epochs += 1
        return sum(kinds[0].values()) + blocked[0] + comm[0]

    def state_dict(self) -> dict[str, Any]:
        names = ("seconds", "steps", "samples", "excluded", "sent", "dropped", "overflows", "rounds", "epochs")
        counts = {name: getattr(self, name) for name in names}
        return {**counts, "partial": self.partial.state_dict(), "earlier": asdict(self.earlier),
                "emulation": list(self.emulation)}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seconds = [dict(mine) for mine in state["seconds"]]
        self.steps, self.samples = list(state["steps"]), list(state["samples"])
        self.excluded, self.overflows = list(state["excluded"]), list(state["overflows"])
        self.sent, self.dropped = list(state["sent"]), list(state["dropped"])
        self.rounds, self.epochs = state["rounds"], state["epochs"]
        self.partial.load_state_dict(state["partial"])
        self.earlier = RunProgress(**state["earlier"])
        self.emulation = emulation_reasons(before=(*self.emulation, *state["emulation"]))

    def carry_over(self, state: Mapping[str, Any], rounds: int | None = None) -> None:
        """Continue from the totals of other ranks' accounts; the figures of single classes are dropped.

        Args:
            rounds: so far, with those of an epoch that was under way and is begun anew; None: there is none.
        """
        other = Accounts(self._cluster)
        other.load_state_dict(state)
        self.rounds = other.rounds if rounds is None else rounds
        self.epochs, self.earlier = other.epochs, other.done
        self.emulation = emulation_reasons(before=(*self.emulation, *other.emulation))

    @property
    def done(self) -> RunProgress:
        steps = self.earlier.fast_steps + max(self.steps)
        return RunProgress(self.epochs, self.rounds, steps, self.samples_seen, self.train_sec)

    @property
    def samples_seen(self) -> int:
        return self.earlier.samples + sum(self.samples)

    @property
    def train_sec(self) -> float:
        return self.earlier.train_sec + sum(self.seconds[0].values())

    def row(self, plan: Plan) -> dict[str, Any]:
        """What ``metrics.jsonl`` has of the accounts, after an epoch by this plan."""
        return {
            "epoch": self.epochs,
            "round": self.rounds,
            "samples_seen": self.samples_seen,
            "train_sec": self.train_sec,
            "tau": {c.name: c.tau for c in plan.classes},
            "batch_size": {c.name: c.batch_size for c in plan.classes},
            "blocked_fraction": self.blocked_fractions(),
            "excluded": self.by_class(self.excluded),
            "overflows": self.by_class(self.overflows),
            "memory_bytes": {c.name: max(self.memory[r] for r in c.ranks) for c in self._cluster.classes},
            "emulation": list(self.emulation),
        }

    def blocked_fractions(self) -> dict[str, float]:
        """By class, the share of its time that its ranks waited for others."""
        return {c.name: fraction_of(self._times(c.ranks), "blocked") for c in self._cluster.classes}

    def by_class(self, counts: Sequence[int]) -> dict[str, int]:
        """Counts by rank, added up by class."""
        return {c.name: sum(counts[r] for r in c.ranks) for c in self._cluster.classes}

    def classes(self, plan: Plan) -> list[dict[str, Any]]:
        """The ``classes`` of summary.json; seconds are means over a class's ranks, steps and samples sums."""
        result = []
        for item, planned in zip(self._cluster.classes, plan.classes, strict=True):
            times = self._times(item.ranks)
            steps = sum(self.steps[r] for r in item.ranks)
            busy = (times["compute"] + times["data"]) * len(item.ranks)
            result.append(
                {
                    "name": item.name,
                    "device": item.device,
                    "ranks": list(item.ranks),
                    "tau": planned.tau,
                    "batch_size": planned.batch_size,
                    "weight": planned.weight,
                    "slowdown": item.slowdown,
                    "step_sec": busy / steps if steps else None,
                    "steps": steps,
                    "samples": sum(self.samples[r] for r in item.ranks),
                    "excluded": self.by_class(self.excluded)[item.name],
                    "dropped": self.by_class(self.dropped)[item.name],
                    "overflows": self.by_class(self.overflows)[item.name],
                    "sent_bytes": sum(self.sent[r] for r in item.ranks) / len(item.ranks),
                    "time_sec": times,
                    "blocked_fraction": fraction_of(times, "blocked"),
                }
            )
        return result

    def _times(self, ranks: Sequence[int]) -> dict[str, float]:
        return {kind: sum(self.seconds[r][kind] for r in ranks) / len(ranks) for kind in KINDS}


def fraction_of(times: Mapping[str, float], kind: str) -> float:
    total = sum(times.values())
    return times[kind] / total if total else 0.0
