"""Classes that do something else than train (``cluster.classes.NAME.role``)."""

from __future__ import annotations

from typing import Any

import pytest

from hvd_hetero import algorithms
from hvd_hetero.cluster.device_classes import Cluster, assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.config.load import device_classes, has_helpers, load, without_roles
from hvd_hetero.errors import ConfigError
from hvd_hetero.training.roles import check_roles

TRAINS, HELPS = {"ranks": [0, 1]}, {"ranks": [2], "role": "evaluate"}


def cluster(classes: dict[str, Any], ranks: int = 3) -> Cluster:
    facts = [RankFacts(rank, "here", rank, (), "cpu", (0, 1)) for rank in range(ranks)]
    return assign(device_classes(classes), facts)


def test_those_who_train_are_a_cluster_of_their_own() -> None:
    made = cluster({"aide": HELPS, "all": TRAINS})
    assert [c.name for c in made.classes] == ["all"] and made.size == 2
    assert [c.name for c in made.helpers] == ["aide"] and len(made.facts) == 3
    assert made.class_of(2).role == "evaluate" and made.on_host("here") == [0, 1, 2]


@pytest.mark.parametrize(("classes", "message"), [
    ({"only": {"ranks": "0-2", "role": "score"}},
     "cluster.classes.only.role='score': it is the only class, which has to train; leave the role of one class at "
     "train"),
    ({"a": {"ranks": [0], "role": "score"}, "b": {"ranks": [1, 2], "role": "evaluate"}},
     "cluster.classes.a.role='score': no class is left that trains; leave the role of one class at train"),
    ({"a": {"ranks": [0, 2]}, "b": {"ranks": [1], "role": "evaluate"}},
     "cluster.classes.b.role='evaluate': rank 1, which is to help, comes before rank 2, which trains; give helpers the "
     "last ranks: the last host, or its last slots"),
])  # fmt: skip
def test_what_cannot_be(classes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cluster(classes)
    assert str(caught.value) == message


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster.classes.slow.role='help': is not one of the choices"):
        load(overrides=["cluster.classes.slow.role=help"])


@pytest.mark.parametrize(("settings", "is_used"), [
    ({}, True),
    ({"sampling.scheme": "infobatch"}, True),
    ({"sampling.high_loss_ratio": 0}, False),
    ({"sampling.scheme": "uniform"}, False),
    ({"algorithm.name": "asgd"}, False),
])
def test_scores_need_a_scheme_that_goes_by_losses(settings: dict[str, Any], is_used: bool) -> None:
    config = load((), settings, algorithms.method)
    made = cluster({"all": TRAINS, "aide": {**HELPS, "role": "score"}})
    if is_used:
        check_roles(config, made)
        return
    with pytest.raises(ConfigError) as caught:
        check_roles(config, made)
    name = settings.get("algorithm.name", "biased_local_sgd")
    output = f"cluster.classes.aide.role='score': {name} deals samples by no losses here"
    assert str(caught.value).startswith(output)


def test_roles_can_be_left_aside() -> None:
    config = load(overrides=["cluster.classes.slow.role=evaluate"])
    assert has_helpers(config) and not has_helpers(without_roles(config)) and not has_helpers(load())
