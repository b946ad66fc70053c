"""Which way weighted sums travel."""

from __future__ import annotations

from hvd_hetero.cluster import Cluster
from hvd_hetero.errors import ConfigError
from hvd_hetero.schema import AggregationConfig


def path_of(spec: AggregationConfig, cluster: Cluster) -> str:
    """The way that weighted sums take: ``flat`` or ``hierarchical``.

    Raises:
        ConfigError: these ranks cannot take it, or it does not go with the other settings.
    """
    on_cpu = all(c.device == "cpu" for c in cluster.classes)
    if spec.path == "flat" and not on_cpu:
        problem = "host and device tensors cannot be summed in one call"
        raise ConfigError("aggregation.path", spec.path, problem, "set aggregation.path=hierarchical or auto")
    path = "flat" if spec.path == "flat" or (spec.path == "auto" and on_cpu) else "hierarchical"
    if spec.chunk_mb is not None and path == "flat":
        problem = "one global sum has no stages that could overlap"
        remedy = "set aggregation.path=hierarchical, or leave it null"
        raise ConfigError("aggregation.chunk_mb", spec.chunk_mb, problem, remedy)
    return path
