"""The methods as data: what a configuration may say of each. The methods themselves import torch.

tests/analysis/test_predict_command.py compares this with the registry of hvd_hetero/algorithms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from hvd_hetero.config.load import Method
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.errors import ConfigError, nearest

ALL, FAST = "all", "fast"
PLAIN = {"sampling.scheme": "uniform", "aggregation.weights": "uniform"}
BIASED = {"sampling.scheme": "separate", "aggregation.weights": "steps"}


@dataclass(frozen=True)
class Lockstep(AlgorithmConfig):
    participants: str = ALL


@dataclass(frozen=True)
class DLB(Lockstep):
    global_batch: Optional[int] = None  # noqa: UP045 (OmegaConf reads the annotations at run time)
    min_local_batch: int = 1


@dataclass(frozen=True)
class BytePS(Lockstep):
    participants: str = FAST
    partition_bytes: int = 4096000


METHODS: dict[str, Method] = {
    "biased_local_sgd": (AlgorithmConfig, BIASED),
    "unbalanced_local_sgd": (AlgorithmConfig, PLAIN),
    "balanced_local_sgd": (AlgorithmConfig, PLAIN),
    "sync_sgd": (Lockstep, PLAIN),
    "byteps": (BytePS, PLAIN),
    "dlb": (DLB, PLAIN),
    "eager_sgd": (AlgorithmConfig, PLAIN),
}


def method(name: str) -> Method:
    """As ``hvd_hetero.algorithms.method``, for :func:`hvd_hetero.config.load.load`.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in METHODS:
        raise ConfigError("algorithm.name", name, "is not a known method", nearest(name, METHODS))
    return METHODS[name]
