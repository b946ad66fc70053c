"""Training on a Ray cluster; jobs run on a local one with resources of two kinds, where Ray is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvd_hetero import launch_on_ray
from hvd_hetero.comm.rendezvous import Rendezvous
from hvd_hetero.errors import UserError
from hvd_hetero.launch.on_ray import gpus_of

pytestmark = pytest.mark.horovod

CLASSES = "cluster.classes={fast: {ranks: [0]}, slow: {ranks: [1, 2]}}"
SETTINGS = [CLASSES, "train.tau={fast: 8, slow: 4}", "train.epochs=1", "run.trace_rounds=0"]
BUNDLES: list[dict[str, float]] = [{"CPU": 1, "fast": 1}, {"slow": 1}, {"slow": 1}]


def test_without_ray_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed; pip install .hvd-hetero\[ray\]"):
        launch_on_ray((), BUNDLES)


def test_gpus_are_numbered_by_the_ranks_of_a_host() -> None:
    """Each rank sees all that the host's ranks were given, since it takes the one of its place."""
    places = [{"node": "a", "gpus": ["3"]}, {"node": "b", "gpus": ["0"]}, {"node": "a", "gpus": []},
              {"node": "a", "gpus": ["1"]}]  # fmt: skip
    assert [gpus_of(rank, places)["CUDA_VISIBLE_DEVICES"] for rank in range(4)] == ["3,1", "0", "3,1", "3,1"]


def test_ranks_of_hosts_in_any_order_have_their_places() -> None:
    rendezvous = Rendezvous(["a", "b", "a", "b", "a"])
    try:
        names = ("LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
        found = [[rendezvous.environment(rank, "10.0.0.1", "eth0")[f"HOROVOD_{name}"] for name in names]
                 for rank in range(5)]  # fmt: skip
    finally:
        rendezvous.close()
    assert ["".join(one) for one in found] == ["0302", "0212", "1302", "1212", "2301"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(num_cpus=2, resources={"fast": 1, "slow": 2}, include_dashboard=False)
    yield ray
    ray.shutdown()


def test_a_job_of_unlike_bundles(cluster: Any, tmp_path: Path) -> None:
    summary = launch_on_ray((), BUNDLES, [*SETTINGS, f"run.dir={tmp_path / 'run'}"])
    assert summary["world_size"] == 3 and [c["ranks"] for c in summary["classes"]] == [[0], [1, 2]]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_what_cannot_be_is_told(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no room for .*'slow': 3.* ask for less"):
        launch_on_ray((), [{"slow": 3}], SETTINGS, placed_sec=3)
    with pytest.raises(UserError, match="give a bundle for each rank"):
        launch_on_ray((), [{}], SETTINGS)
    with pytest.raises(UserError, match="rank 0 ended with status 2: .*train.max_fast_steps=1"):
        launch_on_ray((), BUNDLES, [*SETTINGS, "train.max_fast_steps=1", f"run.dir={tmp_path / 'bad'}"])
