"""Which ways weighted sums can travel."""

from __future__ import annotations

from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.config.schema import AggregationConfig
from hvd_hetero.errors import ConfigError

FLAT, HIERARCHICAL = "flat", "hierarchical"


def paths_of(spec: AggregationConfig, cluster: Cluster) -> tuple[str, ...]:
    """The ways that weighted sums may take, ``flat`` and ``hierarchical``; both, where the faster is to be measured.

    Raises:
        ConfigError: these ranks cannot take it, or it does not go with the other settings.
    """
    on_cpu = all(c.device == "cpu" for c in cluster.classes)
    if spec.path == "flat" and not on_cpu:
        problem = "host and device tensors cannot be summed in one call"
        raise ConfigError("aggregation.path", spec.path, problem, "set aggregation.path=hierarchical or auto")
    differ = 1 < len(cluster.classes) < cluster.size
    if spec.path == "measured" and on_cpu and differ:
        return FLAT, HIERARCHICAL
    path = HIERARCHICAL if spec.path == HIERARCHICAL or not on_cpu else FLAT
    if spec.chunk_mb is not None and path == FLAT and spec.path != "measured":
        problem = "one global sum has no stages that could overlap"
        remedy = "set aggregation.path=hierarchical, or leave it null"
        raise ConfigError("aggregation.chunk_mb", spec.chunk_mb, problem, remedy)
    return (path,)
