"""The methods and their settings: the ranks run them, an oracle recomputes them; and those that are resumed."""

from __future__ import annotations

from typing import Any

import numpy as np
from ranks_methods.problem import ADAMW, BY_THE_CLOCK, NESTEROV, PLAIN, TAU31, UNEVEN, Case

from hvd_hetero.algorithms import REGISTRY

TAU1 = {"train.tau": {"every": 1}, **PLAIN}
SEPARATE = {"sampling.scheme": "separate", "sampling.high_loss_ratio": 0.0}
UNIFIED = {"sampling.scheme": "unified", "sampling.high_loss_ratio": 0.4}
TO_SLOW = {"sampling.high_loss_ratio": 1.0, "sampling.bias_to": "slow"}
WEIGHTED = {"sampling.sample_weights": "ranks_methods.problem:weights"}
ALIKE = {"aggregation.weights": "normalised"}
GROUPS: dict[str, Any] = {
    "train.groups": [
        {"match": "*.bias", "weight_decay": 0, "lr_scale": 3.0, "frozen": True},
        {"match": "0.bias", "frozen": False},
        {"match": "2.weight", "lr_scale": 0.5},
    ],
    "train.optimizer_args": {"momentum": 0.9, "weight_decay": 0.2},
}
DASO = {
    "algorithm.group_size": 2, "algorithm.warmup_epochs": 0, "algorithm.cooldown_epochs": 1,
    "algorithm.stability_level": 1.0, "algorithm.patience": 0, "train.epochs": 5,
}
"""The loss never falls by all of it, so that the cadence is another one in every epoch."""
IN_STEP = {"aggregation.sync_every": 1, "aggregation.patience_sec": 60}

CASES: dict[str, Case] = {
    # step by step together
    "sync": Case("sync_sgd"),
    "sync, uneven batches": Case("sync_sgd", UNEVEN),
    "sync, clipped": Case("sync_sgd", {"train.clip_norm": 0.3}),
    "sync, plain SGD": Case("sync_sgd", PLAIN),
    "sync, warm-up and cosine": Case("sync_sgd", {
        "train.epochs": 3, "train.scheduler": "CosineAnnealingLR", "train.scheduler_args": {"T_max": 3},
        "train.warmup_rounds": 5,
    }),
    "sync, label smoothing": Case("sync_sgd", {"train.loss_args": {"label_smoothing": 0.2}}),
    "sync, fast": Case("sync_sgd", {"algorithm.participants": "fast", "run.trace_rounds": 4}),
    "sync, rank 0 idle": Case("sync_sgd", {"algorithm.participants": "fast"}, "rank0_slow", "norm"),
    "sync, one rank": Case("sync_sgd", {"algorithm.participants": "fast"}, "alone"),
    "sync, BatchNorm": Case("sync_sgd", UNEVEN, model="norm"),
    "sync, BatchNorm, hierarchical": Case("sync_sgd", UNEVEN, model="norm", path="hierarchical"),
    "byteps, two servers": Case("byteps", {"algorithm.partition_bytes": 80}),
    "byteps, one server": Case("byteps", {"algorithm.partition_bytes": 80}, "three_fast"),
    "byteps, one worker": Case("byteps", {"algorithm.partition_bytes": 128, "train.clip_norm": 0.3}, "alone"),
    "byteps, more servers than partitions": Case("byteps", {}, "rank0_slow", "norm"),
    "dlb": Case("dlb", {"algorithm.global_batch": 13, "train.epochs": 4}),
    "dlb, BatchNorm, hierarchical": Case(
        "dlb", {"train.epochs": 3, "algorithm.global_batch": 13, "algorithm.min_local_batch": 2},
        model="norm", path="hierarchical",
    ),
    "sync, micro-batches": Case("sync_sgd", {**UNEVEN, "train.micro_batches": {"fast": 3, "slow": 1}}),
    "byteps, micro-batches": Case("byteps", {"train.micro_batches": 2}),
    "dlb, micro-batches": Case("dlb", {"algorithm.global_batch": 13, "train.epochs": 3, "train.micro_batches": 4}),
    "drop_compute, nothing left out": Case("drop_compute", {
        **UNEVEN, "train.micro_batches": 2, "algorithm.threshold": 60, "algorithm.normalise": "done",
    }),
    "sync, samples that weigh": Case("sync_sgd", WEIGHTED),
    # local SGD
    "balanced": Case("balanced_local_sgd", {"train.tau": 3}),
    "unbalanced, equal tau": Case("unbalanced_local_sgd"),
    "unbalanced": Case("unbalanced_local_sgd", TAU31),
    "unbalanced, separate": Case("unbalanced_local_sgd", {**TAU31, **SEPARATE}),
    "biased, nothing biased": Case("biased_local_sgd", {
        **TAU31, "sampling.high_loss_ratio": 0.0, "aggregation.weights": "uniform",
    }),
    "biased, weights": Case("biased_local_sgd", {**TAU31, "sampling.scheme": "uniform"}),
    "biased, samples that weigh": Case("biased_local_sgd", {**TAU31, **WEIGHTED}),
    "biased, sampling": Case("biased_local_sgd", {**TAU31, "aggregation.weights": "uniform"}),
    "biased": Case("biased_local_sgd", {**TAU31, "train.clip_norm": 0.5}),
    "separate, to slow": Case("biased_local_sgd", {**TAU31, **TO_SLOW}),
    "unified, to slow": Case("biased_local_sgd", {**TAU31, **TO_SLOW, "sampling.scheme": "unified"}),
    "unified, to fast": Case("biased_local_sgd", {**TAU31, **UNIFIED}),
    "biased, hierarchical": Case("biased_local_sgd", TAU31, path="hierarchical"),
    "one class, tau 1": Case("biased_local_sgd", TAU1, "one"),
    "balanced, one class, tau 1": Case("balanced_local_sgd", TAU1, "one"),
    "outer, lr 1": Case("biased_local_sgd", {**TAU31, "train.clip_norm": 0.5, "aggregation.outer_lr": 1.0}),
    "outer, lr 0.5": Case("biased_local_sgd", {**TAU31, "aggregation.outer_lr": 0.5}),
    "outer, momentum": Case("unbalanced_local_sgd", {**TAU31, "aggregation.outer_momentum": 0.5}),
    "outer, Nesterov": Case("biased_local_sgd", {**TAU31, **NESTEROV}),
    "outer, Nesterov, BatchNorm": Case("biased_local_sgd", {**TAU31, **NESTEROV}, model="norm"),
    "momentum averaged": Case("biased_local_sgd", {**TAU31, "aggregation.optimizer_state": "average"}),
    "normalised": Case("biased_local_sgd", {**TAU31, **ALIKE}),
    "normalised, bounded, BatchNorm": Case(
        "unbalanced_local_sgd", {**TAU31, **ALIKE, "aggregation.max_extrapolation": 1.25}, model="norm"
    ),
    "normalised, outer, hierarchical": Case(
        "biased_local_sgd", {**TAU31, **ALIKE, "aggregation.outer_lr": 0.5}, path="hierarchical"
    ),
    "normalised, delayed": Case("biased_local_sgd", {**TAU31, **ALIKE, "aggregation.delayed": True}),
    "momentum reset": Case("biased_local_sgd", {**TAU31, "aggregation.optimizer_state": "reset"}),
    "solo, nobody late": Case("biased_local_sgd", {**TAU31, **IN_STEP, "aggregation.mode": "solo"}),
    "majority, nobody late, Nesterov, BatchNorm": Case(
        "biased_local_sgd", {**TAU31, **IN_STEP, **NESTEROV, "aggregation.mode": "majority"}, model="norm"
    ),
    "solo, nobody late, momentum reset": Case("unbalanced_local_sgd", {
        **TAU31, **IN_STEP, "aggregation.mode": "solo", "aggregation.optimizer_state": "reset",
    }),
    "delayed": Case("biased_local_sgd", {**TAU31, "aggregation.delayed": True}),
    "delayed, momentum reset, BatchNorm, hierarchical": Case(
        "unbalanced_local_sgd", {**TAU31, "aggregation.delayed": True, "aggregation.optimizer_state": "reset"},
        model="norm", path="hierarchical",
    ),
    "delayed by 2 steps of 3": Case("biased_local_sgd", {**TAU31, "aggregation.delayed": True,
                                                         "aggregation.delay_steps": 2}, model="norm"),
    "delayed by nothing": Case("biased_local_sgd", {**TAU31, "aggregation.delayed": True,
                                                    "aggregation.delay_steps": 0}),
    "delayed by 1 step, own weight": Case("unbalanced_local_sgd", {
        **TAU31, "aggregation.delayed": True, "aggregation.delay_steps": 1, "aggregation.own_weight": 0.25,
    }),
    "wire float16": Case("biased_local_sgd", {**TAU31, "aggregation.wire": "float16", **NESTEROV}, model="norm"),
    "wire int8": Case("biased_local_sgd", {**TAU31, "aggregation.wire": "int8"}, model="norm", path="hierarchical"),
    "delayed, wire float16": Case("biased_local_sgd", {
        **TAU31, "aggregation.wire": "float16", "aggregation.delayed": True, "aggregation.delay_steps": 2,
    }),
    "sync, wire float16": Case("sync_sgd", {**UNEVEN, "aggregation.wire": "float16"}, model="norm"),
    "sync, wire int8": Case("sync_sgd", {"aggregation.wire": "int8", "algorithm.participants": "fast"}),
    "drop_compute_local, in time": Case("drop_compute_local", {**TAU31, "algorithm.threshold": 60}, model="norm"),
    "drop_compute_local, done, hierarchical": Case("drop_compute_local", {
        **TAU31, "algorithm.threshold": 60, "algorithm.normalise": "done", "aggregation.outer_lr": 0.5,
    }, path="hierarchical"),
    "BVR-L-SGD": Case("bvr_l_sgd", {**PLAIN, "train.tau": 3, "algorithm.stage_rounds": 2}),
    "BVR-L-SGD, a large anchor, three ranks": Case("bvr_l_sgd", {
        **PLAIN, "train.tau": 2, "algorithm.anchor_batches": 4, "algorithm.stage_rounds": 3,
    }, "three_fast", path="hierarchical"),
    "micro-batches": Case("biased_local_sgd", {**TAU31, "train.micro_batches": {"fast": 3, "slow": 2}}),
    "AdamW": Case("biased_local_sgd", {**TAU31, **ADAMW}),
    # averages in groups
    "wagma, nobody late": Case("wagma_sgd", {"aggregation.sync_every": 1}, model="norm"),
    "wagma, code, nobody late": Case("wagma_sgd", {"aggregation.sync_every": 1, "algorithm.mode": "code"}),
    "daso": Case("daso", DASO, model="norm"),
    "daso, blocking": Case("daso", {"algorithm.group_size": 2}),
    "daso, a host a rank": Case("daso", {**DASO, "algorithm.group_size": 1, "train.epochs": 3}),
    "decentlam": Case("decentlam", {"train.optimizer_args": {"momentum": 0.9, "weight_decay": 0.1}}, model="norm"),
    "decentlam, warm-up and cosine": Case("decentlam", {
        "train.epochs": 3, "train.scheduler": "CosineAnnealingLR", "train.scheduler_args": {"T_max": 3},
        "train.warmup_rounds": 5, "train.clip_norm": 0.5,
    }),
    "decentlam, without momentum": Case("decentlam", PLAIN),
    "decentlam, complete": Case("decentlam", {"algorithm.topology": "complete"}),
    # some parameters otherwise
    "sync, groups, warm-up and cosine": Case("sync_sgd", {
        "train.epochs": 3, "train.scheduler": "CosineAnnealingLR", "train.scheduler_args": {"T_max": 3},
        "train.warmup_rounds": 5, "train.clip_norm": 0.3, **GROUPS,
    }),
    "byteps, groups": Case("byteps", {"algorithm.partition_bytes": 80, **GROUPS}),
    "dlb, groups": Case("dlb", {"algorithm.global_batch": 13, "train.epochs": 4, **GROUPS}),
    "groups, delayed": Case("biased_local_sgd", {**TAU31, **GROUPS, "aggregation.delayed": True}),
    "groups, solo, nobody late": Case("biased_local_sgd", {
        **TAU31, **IN_STEP, **GROUPS, "aggregation.mode": "solo",
    }),
    "groups, AdamW averaged": Case("biased_local_sgd", {
        **TAU31, **GROUPS, **ADAMW, "train.optimizer_args": {"weight_decay": 0.2},
        "aggregation.optimizer_state": "average",
    }),
    "FedLALR": Case("balanced_local_sgd", {
        **ADAMW, "train.tau": 3, "train.optimizer": "Adam", "train.optimizer_args": {"amsgrad": True},
        "aggregation.optimizer_state": "average_seed",
    }),
    "AdamW averaged": Case("biased_local_sgd", {**TAU31, **ADAMW, "aggregation.optimizer_state": "average"}),
}

CASES_SLOW = {
    "sync, BatchNorm", "sync, one rank", "byteps, more servers than partitions", "byteps, micro-batches",
    "dlb, micro-batches", "unified, to slow", "outer, Nesterov", "normalised, outer, hierarchical",
    "solo, nobody late, momentum reset", "delayed, wire float16", "daso, a host a rank",
    "decentlam, warm-up and cosine", "byteps, groups", "dlb, groups", "groups, solo, nobody late",
    "digits, half, byteps", "digits, half, eager_sgd", "digits, biased_local_sgd, majority", "digits, byteps",
    "digits, balanced_local_sgd", "digits, unbalanced_local_sgd", "digits, stl_sgd", "digits, drop_compute_local",
    "digits, ringmaster_asgd", "digits, rennala_sgd", "digits, ringleader_asgd", "digits, omnilearn_asp",
    "digits, decentlam", "digits, eager_sgd, micro-batches", "digits, eager_sgd, majority",
}  # fmt: skip
"""Of these, and of those on digits, the ones that others stand for."""

RESUMED = {name: CASES[name] for name in (
    "sync, fast", "sync, rank 0 idle", "byteps, one server", "byteps, more servers than partitions", "balanced",
    "biased", "biased, hierarchical", "unified, to fast", "outer, Nesterov, BatchNorm",
    "momentum averaged", "AdamW", "normalised, delayed", "groups, AdamW averaged", "wire int8", "sync, wire int8",
    "delayed by 2 steps of 3", "drop_compute, nothing left out",
    "drop_compute_local, in time", "daso", "decentlam",
)}  # fmt: skip
RESUMED["sync, fast, warm-up and cosine"] = Case(
    "sync_sgd", {**CASES["sync, warm-up and cosine"].settings, "algorithm.participants": "fast"}
)
RESUMED["biased, cosine by rounds, averaged iterates"] = Case("biased_local_sgd", {
    **TAU31, "eval.average": "ema", "eval.half_life": 5.0,
    "train.scheduler": "cosine", "train.scheduler_args": {"warmup": 0.2, "floor": 0.1},
})  # fmt: skip
RESUMED["balanced, a scheduler that steps by rounds"] = Case("balanced_local_sgd", {
    "train.tau": 3, "train.scheduler": "ExponentialLR", "train.scheduler_args": {"gamma": 0.9},
    "train.scheduler_unit": "round",
})  # fmt: skip
RESUMED["BVR-L-SGD, in stages"] = Case("bvr_l_sgd", {
    **PLAIN, "train.tau": 2, "train.epochs": 4, "algorithm.stage_rounds": 5,
})  # fmt: skip
RESUMED["stl_sgd, StepLR"] = Case("stl_sgd", {
    **TAU31, "train.epochs": 4, "train.scheduler": "StepLR", "train.scheduler_args": {"step_size": 1, "gamma": 0.5},
})  # fmt: skip
RESUMED["unbalanced, separate, noisy"] = Case("unbalanced_local_sgd", {**TAU31, **SEPARATE}, model="noisy")
"""Interrupted again and again they come to the same, to the last bit. (Horovod joins the gradients of synchronous SGD
as they come: from three ranks on their sums are rounded differently from run to run.)"""
RESUMED_SLOW = ("momentum averaged", "sync, rank 0 idle", "byteps, more servers than partitions",
                "biased, hierarchical", "unified, to fast", "AdamW",
                "sync, fast, warm-up and cosine", "balanced, a scheduler that steps by rounds")
"""Of these, those that others stand for."""

AFTER_UPDATES = ((0, 0.0), (60, 0.1), (90, 0.35), (120, 0.6), (240, 0.72), (350, 0.75))
"""Updates of the model, and the accuracy at least. Plain SGD on batches of 8 comes to 0.31, 0.41, 0.74, 0.85 and 0.94,
in the worst of three seeds, with the rates of these methods. How many updates come of the samples depends on how evenly
a busy machine lets the ranks run, and how late gradients are does too; what updates are good for does not."""
FEW_UPDATES = ("malenia_sgd", "ringleader_asgd")
"""They wait for a gradient of every rank."""
ACCURACY = {"bvr_l_sgd": 0.4}
"""At least, of what is not by the clock; of the others 0.6. It has few steps of its samples, and no momentum."""


def least_accuracy(method: str, updates: int) -> float:
    """Return what a method has to come to on digits, after so many updates of the model."""
    if method in BY_THE_CLOCK:
        return float(np.interp(updates, *zip(*AFTER_UPDATES, strict=True)))
    return ACCURACY.get(method, 0.6)


SMALLER = {"train.batch_size": 2, "train.lr": 0.05, "train.optimizer_args": {"momentum": 0.0}}  # with it they diverge
OWN = {**dict.fromkeys(FEW_UPDATES, SMALLER), "bvr_l_sgd": {
    "train.lr": 0.2, "train.optimizer_args": {}, "train.tau": 4, "algorithm.anchor_batches": 2,
}}  # fmt: skip
CASES |= {
    f"digits, {name}": Case(name, {
        "profile.seconds": 0.2, **OWN.get(name, {}),
    }, model="digits")
    for name in REGISTRY
}
CASES |= {
    f"digits, biased_local_sgd, {mode}": Case(
        "biased_local_sgd", {"profile.seconds": 0.2, "aggregation.mode": mode}, model="digits"
    )
    for mode in ("solo", "majority")
}
CASES["digits, asgd, ordered momentum"] = Case("asgd", {
    "algorithm.ordered_momentum": 0.5, "train.optimizer_args": {},
}, model="digits")  # fmt: skip
CASES["digits, eager_sgd, micro-batches"] = Case("eager_sgd", {"train.micro_batches": 3}, model="digits")
HALF = ("sync_sgd", "byteps", "eager_sgd", "biased_local_sgd")
FOUR = {"biased_local_sgd": {"train.tau": {"fast": 8, "slow": 2}}}
CASES |= {f"digits, half, {name}": Case(name, FOUR.get(name, {}), model="digits", half=True) for name in HALF}
CASES["digits, eager_sgd, majority"] = Case("eager_sgd", {"algorithm.mode": "majority"}, model="digits")
