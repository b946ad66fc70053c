"""The training methods, by name."""

from __future__ import annotations

import importlib

from hvd_hetero.algorithms.base import Algorithm
from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.config.load import Method
from hvd_hetero.config.schema import Config
from hvd_hetero.errors import ConfigError, nearest

REGISTRY = {
    "biased_local_sgd": "BiasedLocalSGD",
    "unbalanced_local_sgd": "UnbalancedLocalSGD",
    "balanced_local_sgd": "BalancedLocalSGD",
    "sync_sgd": "SyncSGD",
    "byteps": "BytePS",
    "dlb": "DLB",
    "eager_sgd": "EagerSGD",
}


def get(name: str) -> type[Algorithm]:
    """The class of a method; its file is named after it.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in REGISTRY:
        raise ConfigError("algorithm.name", name, "is not a known method", nearest(name, list(REGISTRY)))
    found: type[Algorithm] = getattr(importlib.import_module(f"hvd_hetero.algorithms.{name}"), REGISTRY[name])
    return found


def method(name: str) -> Method:
    """What the configuration needs to know of a method: its options, and its meaning of settings left null."""
    found = get(name)
    return found.Options, found.defaults


def build(config: Config, cluster: Cluster, samples: int, min_batch: int = 1) -> Algorithm:
    """The configured method, for these device classes and n training samples.

    Args:
        min_batch: samples that the model needs in a step.

    Raises:
        ConfigError: a setting does not fit the classes.
    """
    made = get(config.algorithm.name)
    sections = (config.algorithm, config.train, config.aggregation)
    return made(*sections, cluster, samples, config.run.seed, config.cluster.too_slow, min_batch)
