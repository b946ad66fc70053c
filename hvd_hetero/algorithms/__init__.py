"""The training methods, by name."""

from __future__ import annotations

import importlib

from hvd_hetero.algorithms.base import Algorithm
from hvd_hetero.config import Method, nearest
from hvd_hetero.errors import ConfigError

REGISTRY = {
    "biased_local_sgd": "BiasedLocalSGD",
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
