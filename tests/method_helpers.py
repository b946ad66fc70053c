"""What the tests of methods without a job share: device classes, and a policy made for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvd_hetero import algorithms
from hvd_hetero.algorithms.policy import Policy
from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.config.load import load

TWO = (DeviceClass("fast", "cpu", (0, 1)), DeviceClass("slow", "cpu", (2, 3, 4), slowdown=8.0))
ONE = (DeviceClass("every", "cpu", (0, 1)),)
TWINS = (DeviceClass("a", "cpu", (0,)), DeviceClass("b", "cpu", (1,)))
GPU = (DeviceClass("old", "cpu", (0,)), DeviceClass("new", "cuda", (1,), slowdown=2.0))


def of(classes: tuple[DeviceClass, ...]) -> Cluster:
    size = sum(len(c.ranks) for c in classes)
    return Cluster(classes, tuple(RankFacts(rank, "here", rank, (), "cpu", (0,)) for rank in range(size)))


def method(settings: Mapping[str, Any], classes: tuple[DeviceClass, ...] = TWO, samples: int = 1000) -> Policy:
    return algorithms.policy(load((), settings, algorithms.method), of(classes), samples)
