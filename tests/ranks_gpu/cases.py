"""What is tried where there is a GPU: rank 0 has it, rank 2 is on the CPU, rank 1 on either, as the group says.

Cases that have an oracle are of the kind of those of ``ranks_methods``, in float32: two rounds, after which rounding
has not gone far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ranks_methods.cases import IN_STEP, OWN
from ranks_methods.poisoned import ASKED
from ranks_methods.problem import ADAMW, NESTEROV, TAU31, UNEVEN, Case

from hvd_hetero.algorithms import REGISTRY

SIZE = 3
BESIDE = {"classes": "one beside two"}
SHORT = {"train.epochs": None, "train.max_fast_steps": 6}
THREE = {**SHORT, "train.tau": {"fast": 3, "slow": 1, "other": 1}}

def mixed(method: str, settings: Mapping[str, Any], epochs: int | None = None, **more: Any) -> Case:
    """Two rounds, or so many epochs, of the GPU rank beside two CPU ranks."""
    return Case(method, {**({"train.epochs": epochs} if epochs else SHORT), **settings}, "one beside two", **more)


DELAYED = {"aggregation.delayed": True}
AVERAGED, RESET = {"aggregation.optimizer_state": "average"}, {"aggregation.optimizer_state": "reset"}
BAD = {"epochs": 1, "poisoned": (17, 40)}
ORACLE: Mapping[str, Case] = {
    "sync": mixed("sync_sgd", UNEVEN),
    "sync, BatchNorm": mixed("sync_sgd", UNEVEN, model="norm"),
    "byteps": mixed("byteps", {"algorithm.partition_bytes": 80, "train.clip_norm": 0.3}),
    "dlb": mixed("dlb", {"algorithm.global_batch": 10}),
    "balanced": mixed("balanced_local_sgd", {"train.tau": 3}),
    "unbalanced": mixed("unbalanced_local_sgd", TAU31),
    "biased": mixed("biased_local_sgd", {**TAU31, "train.clip_norm": 0.5}),
    "outer": mixed("biased_local_sgd", {**TAU31, "aggregation.outer_lr": 0.5}),
    "outer, Nesterov, BatchNorm": mixed("biased_local_sgd", {**TAU31, **NESTEROV}, model="norm"),
    "momentum averaged": mixed("biased_local_sgd", {**TAU31, **AVERAGED}),
    "momentum reset": mixed("biased_local_sgd", {**TAU31, **RESET}),
    "AdamW averaged": mixed("biased_local_sgd", {**TAU31, **ADAMW, **AVERAGED}),
    "solo": mixed("biased_local_sgd", {**TAU31, **IN_STEP, "aggregation.mode": "solo"}),
    "majority, Nesterov, BatchNorm": mixed(
        "biased_local_sgd", {**TAU31, **IN_STEP, **NESTEROV, "aggregation.mode": "majority"}, model="norm"
    ),
    "delayed": mixed("biased_local_sgd", {**TAU31, **DELAYED}),
    "delayed, reset, BatchNorm": mixed("unbalanced_local_sgd", {**TAU31, **DELAYED, **RESET}, model="norm"),
    "NaN, biased": mixed("biased_local_sgd", TAU31, **BAD),
    "NaN, delayed": mixed("biased_local_sgd", {**TAU31, **DELAYED}, **BAD),
    "NaN, sync": mixed("sync_sgd", {**UNEVEN, "train.clip_norm": 0.3}, **BAD),
}
DIGITS: Mapping[str, Case] = {
    f"digits, {name}": Case(
        name, {"profile.seconds": 0.2, "cluster.too_slow": "shrink_batch", **ASKED.get(name, {}), **OWN.get(name, {})},
        model="digits", **BESIDE,
    )
    for name in REGISTRY
} | {
    f"digits, {kind}": Case(
        "biased_local_sgd", {"train.autocast": kind, "train.tau": {"fast": 8, "slow": 2}}, model="digits", **BESIDE
    )
    for kind in ("bf16", "fp16")
} | {"digits, fp16, sync": Case("sync_sgd", {"train.autocast": "fp16"}, model="digits", **BESIDE)}
SHARED: Mapping[str, Case] = {
    "two classes, biased": Case("biased_local_sgd", THREE, "three classes"),
    "two classes, sync": Case("sync_sgd", SHORT, "three classes"),
    "two classes, byteps": Case("byteps", {**SHORT, "algorithm.partition_bytes": 80}, "three classes"),
    "two classes, solo": Case("biased_local_sgd", {**THREE, **IN_STEP, "aggregation.mode": "solo"}, "three classes"),
    "two classes, delayed": Case("biased_local_sgd", {**THREE, "aggregation.delayed": True}, "three classes"),
    "two classes, digits": Case(
        "biased_local_sgd", {"profile.seconds": 1.0, "train.tau": 16, "train.epochs": 6}, "three classes", "digits"
    ),
}
ALL_ON_ONE: Mapping[str, Case] = {
    "one class, biased": mixed("biased_local_sgd", TAU31),
    "one class, sync": mixed("sync_sgd", UNEVEN),
    "one class, BatchNorm, hierarchical": mixed("unbalanced_local_sgd", TAU31, model="norm", path="hierarchical"),
}


@dataclass(frozen=True)
class Group:
    """The cases of one job.

    Attributes:
        gpus: the ranks that are on the GPU.
        slowdown: of rank 1.
        small: those of its cases that also stand for it where there is no GPU.
    """

    cases: Mapping[str, Case]
    gpus: Sequence[int]
    small: Sequence[str]
    slowdown: float = 1.0

    def chosen(self, device: str) -> list[str]:
        return list(self.cases if device == "cuda" else self.small)


GROUPS = {
    "oracle": Group(ORACLE, [0], ("biased", "sync", "NaN, biased", "outer, Nesterov, BatchNorm")),
    "digits": Group(DIGITS, [0], ("digits, biased_local_sgd",)),
    "shared": Group(SHARED, [0, 1], ("two classes, biased",), slowdown=4.0),
    "all on one": Group(ALL_ON_ONE, [0, 1, 2], ("one class, sync",)),
}
"""One after another in one job, which makes all process sets at its start."""


def settings_of(name: str, group: Group, device: str) -> dict[str, Any]:
    """The configuration of a case, with its classes on their devices."""
    case = group.cases[name]
    given = case.overrides()
    for ranks in given["cluster.classes"].values():
        on_gpu = ranks["ranks"][0] in group.gpus
        ranks |= {"device": device if on_gpu else "cpu"}
        if 1 in ranks["ranks"] and case.model == "digits":
            ranks["slowdown"] = group.slowdown
    return given
