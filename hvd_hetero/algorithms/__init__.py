"""The training methods, by name: a policy each, which needs neither torch nor Horovod, and what executes it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hvd_hetero.algorithms.policy import Policy
from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.config.load import Method
from hvd_hetero.config.schema import Config
from hvd_hetero.errors import ConfigError, nearest

if TYPE_CHECKING:
    from hvd_hetero.algorithms.execution.base import Executor

REGISTRY = {
    "biased_local_sgd": "BiasedLocalSGD",
    "unbalanced_local_sgd": "UnbalancedLocalSGD",
    "balanced_local_sgd": "BalancedLocalSGD",
    "stl_sgd": "STLSGD",
    "drop_compute_local": "DropComputeLocal",
    "bvr_l_sgd": "BVRLSGD",
    "sync_sgd": "SyncSGD",
    "byteps": "BytePS",
    "dlb": "DLB",
    "drop_compute": "DropCompute",
    "eager_sgd": "EagerSGD",
    "nonblocking_sgd": "NonBlockingSGD",
    "m_sync_sgd": "MSyncSGD",
    "wagma_sgd": "WAGMASGD",
    "daso": "DASO",
    "decentlam": "DecentLaM",
    "asgd": "ASGD",
    "ringmaster_asgd": "RingmasterASGD",
    "rennala_sgd": "RennalaSGD",
    "malenia_sgd": "MaleniaSGD",
    "ringleader_asgd": "RingleaderASGD",
    "async_diloco": "AsyncDiLoCo",
    "omnilearn_asp": "OmniLearnASP",
}


def get(name: str) -> type[Policy]:
    """Return the policy class of a method; its file is named after it.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in REGISTRY:
        raise ConfigError("algorithm.name", name, "is not a known method", nearest(name, list(REGISTRY)))
    found: type[Policy] = _imported(f"hvd_hetero.algorithms.{name}.{REGISTRY[name]}")
    return found


def method(name: str) -> Method:
    """Return a method's options and its meaning of settings left null, for :func:`hvd_hetero.config.load.load`."""
    found = get(name)
    return found.Options, found.defaults_for


def policy(config: Config, cluster: Cluster, samples: int, min_batch: int = 1) -> Policy:
    """Make the policy of the configured method, for these device classes and n training samples.

    Args:
        min_batch: samples that the model needs in a step.

    Raises:
        ConfigError: a setting does not fit the classes.
    """
    return get(config.algorithm.name)(config, cluster, samples, min_batch)


def build(config: Config, cluster: Cluster, samples: int, min_batch: int = 1) -> Executor:
    """Make what a rank runs: the executor of the configured method, with its policy as :func:`policy` makes it."""
    chosen = policy(config, cluster, samples, min_batch)
    executor: Executor = _imported(chosen.executor_path)(chosen)
    return executor


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
