"""What roles of device classes have to do with each other and with all else that is set."""

from __future__ import annotations

from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.config.schema import SCORE, Config
from hvd_hetero.errors import ConfigError

UNIFORM, SEPARATE, UNIFIED = "uniform", "separate", "unified"


def check_roles(config: Config, cluster: Cluster) -> None:
    """Refuse a helper that nobody has a use for.

    Raises:
        ConfigError: it is to score samples, and no losses decide which ones are trained on.
    """
    spec = config.sampling
    is_unused = spec.scheme == UNIFORM or (spec.scheme in (SEPARATE, UNIFIED) and spec.high_loss_ratio == 0)
    for item in cluster.helpers:
        if item.role == SCORE and is_unused:
            suffix = "" if spec.scheme == UNIFORM else ", sampling.high_loss_ratio=0"
            problem = f"{config.algorithm.name} deals samples by no losses here (sampling.scheme={spec.scheme}{suffix})"
            remedy = "set a scheme that goes by them, where the method can (docs/methods.md), or another role"
            raise ConfigError(f"cluster.classes.{item.name}.role", SCORE, problem, remedy)
