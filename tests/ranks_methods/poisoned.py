"""Cases in which samples spoil gradients: what is non-finite on some ranks is to enter no average."""

from __future__ import annotations

from typing import Any

from ranks_methods.problem import ADAMW, NESTEROV, PLAIN, TAU31, UNEVEN, Case

from hvd_hetero.algorithms import REGISTRY

POISONED: dict[str, Case] = {
    name: Case(method, {"train.epochs": 3, **settings}, poisoned=(17,), **layout)
    for name, method, settings, layout in (
        ("biased, BatchNorm", "biased_local_sgd", TAU31, {"classes": "of three", "model": "norm"}),
        ("hierarchical", "biased_local_sgd", TAU31, {"classes": "of three", "model": "norm", "path": "hierarchical"}),
        ("uniform weights, Nesterov", "unbalanced_local_sgd", {**TAU31, **NESTEROV}, {"classes": "of three"}),
        ("momentum averaged", "biased_local_sgd", {**TAU31, "aggregation.optimizer_state": "average"},
         {"classes": "of three"}),
        ("AdamW averaged", "biased_local_sgd", {**TAU31, **ADAMW, "aggregation.optimizer_state": "average"},
         {"classes": "of three"}),
        ("momentum reset", "biased_local_sgd", {**TAU31, "aggregation.optimizer_state": "reset"},
         {"classes": "of three"}),
        ("AdamW", "balanced_local_sgd", {"train.tau": 2, **ADAMW}, {"classes": "of three"}),
        ("delayed, BatchNorm", "biased_local_sgd", {**TAU31, "aggregation.delayed": True},
         {"classes": "of three", "model": "norm"}),
        ("sync, uneven batches", "sync_sgd", {**UNEVEN, "train.clip_norm": 0.3}, {"classes": "of three"}),
        ("sync, float16", "sync_sgd", {"aggregation.wire": "float16"}, {"classes": "of three", "model": "norm"}),
        ("float16", "biased_local_sgd", {**TAU31, "aggregation.wire": "float16"},
         {"classes": "of three", "model": "norm"}),
        ("sync, micro-batches", "sync_sgd", {"train.micro_batches": 2}, {"classes": "of three"}),
        ("sync, BatchNorm", "sync_sgd", UNEVEN, {"classes": "of three", "model": "norm"}),
        ("sync, fast", "sync_sgd", {"algorithm.participants": "fast"}, {"classes": "of three"}),
        ("byteps, BatchNorm", "byteps", {"algorithm.partition_bytes": 80}, {"classes": "of three", "model": "norm"}),
        ("dlb", "dlb", {"algorithm.global_batch": 10}, {"classes": "of three"}),
        ("two, biased", "biased_local_sgd", TAU31, {"classes": "of two"}),
        ("two, sync, BatchNorm", "sync_sgd", {}, {"classes": "of two", "model": "norm"}),
        ("two, sync, float16", "sync_sgd", {"aggregation.wire": "float16", "train.batch_size": {"fast": 5, "slow": 3}},
         {"classes": "of two", "model": "norm"}),
        ("two, float16", "biased_local_sgd", {**TAU31, "aggregation.wire": "float16"},
         {"classes": "of two", "model": "norm"}),
    )
}
"""In each epoch some rank is given a sample that its gradient cannot stand; an oracle knows what comes of it."""
POISONED_SLOW = {
    "hierarchical", "momentum averaged", "momentum reset", "AdamW", "sync, float16", "sync, BatchNorm", "sync, fast",
    "two, biased", "two, float16",
}  # fmt: skip
"""Of these, the ones that others stand for."""

ASKED: dict[str, dict[str, Any]] = {
    "dlb": {"algorithm.min_local_batch": 2}, "nonblocking_sgd": {"algorithm.micro_batches": 2},
    "wagma_sgd": {"algorithm.group_size": 3}, "decentlam": {"algorithm.topology": "complete"},
    "bvr_l_sgd": {**PLAIN, "train.tau": 3, "algorithm.stage_rounds": 2},
    "omnilearn_asp": {"algorithm.min_local_batch": 2},
}  # fmt: skip
"""By method. BatchNorm cannot train on one sample, which a busy machine may leave a rank; three is no power of 2."""

POISONED |= {
    f"every, {name}, {mode}": Case(
        name, {"train.epochs": 4, **ASKED.get(name, {}), **({} if mode == "as it is" else {"aggregation.mode": mode})},
        "of three", "mlp" if name == "bvr_l_sgd" else "norm", poisoned=(17, 40),
    )
    for name in REGISTRY
    for mode in ("as it is", *(("solo", "majority") if name == "biased_local_sgd" else ()))
}
"""Every method; who trains on what is not known beforehand with all of them."""
