"""The collectives under real horovodrun: the aggregation equals its formula, on every layout and path, bit for bit
the same on all ranks. One job a number of ranks goes through all cases: see ``ranks/comm_cases.py``."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.runner.common.util.hosts import SlotInfo
from horovod.runner.http.http_server import RendezvousServer
from ranks.comm_cases import LAYOUTS, TAUS, cases

from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.comm import gradient_allreduce, horovod_build
from hvd_hetero.comm.async_ops import PeerLost, guarded
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.gradient_allreduce import GradientSum, OnHost, Summable
from hvd_hetero.comm.horovod_build import check_gpu_sums, check_mixed_hosts
from hvd_hetero.comm.kv_store import SCOPE, JobEnv, exchange, forget_addresses, job_env
from hvd_hetero.comm.paths import paths_of
from hvd_hetero.config.schema import AggregationConfig
from hvd_hetero.errors import ConfigError

SCRIPT = Path(__file__).parents[1] / "ranks" / "comm_cases.py"
HOSTS = {1: "localhost:1", 2: "localhost:2", 3: "localhost:1,127.0.0.1:2", 4: "localhost:2,127.0.0.1:2"}
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(horovodrun: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """What every rank of the job with so many ranks found; each job runs once. A single rank needs no horovodrun."""
    jobs: dict[int, Found | str] = {}

    def job(size: int) -> Found:
        if size not in jobs:
            folder = tmp_path_factory.mktemp(f"comm{size}")
            line = [sys.executable, str(SCRIPT), str(folder), HOSTS[size]]
            if size == 1:
                done = subprocess.run(line, capture_output=True, text=True, timeout=120)
            else:
                done = horovodrun(size, line, hosts=HOSTS[size])
            files = [folder / f"rank{rank}.json" for rank in range(size)]
            complete = done.returncode == 0 and all(file.exists() for file in files)
            jobs[size] = [json.loads(f.read_text()) for f in files] if complete else done.stdout + done.stderr
        result = jobs[size]
        assert not isinstance(result, str), result
        return result

    return job


ALL = [(size, case) for size in LAYOUTS for case in cases(size)]


@pytest.mark.parametrize(("size", "case"), ALL, ids=[case.replace(" ", "") for _, case in ALL])
def test_aggregation_is_the_formula(found: Callable[[int], Found], size: int, case: str) -> None:
    """Vectors of several lengths, and a model's parameters, BatchNorm statistics and integers (their maximum)."""
    by_rank = [rank["cases"][case] for rank in found(size)]
    dtype, path = case.split("/")[2], case.split("/")[1]
    for mine in by_rank:
        assert mine["path"] == path.split(",")[0]
        assert mine["error"] <= TOLERANCE[dtype]
        assert mine["model_error"] <= TOLERANCE[dtype]
        assert mine["tracked"] == 5 + size - 1
        assert mine["counts"] == [[10 + size - 1, 10], [0, -1]]
        assert not mine["frozen_moved"]
    assert len({mine["digest"] for mine in by_rank}) == 1, "all ranks hold the same bits"
    assert len({mine["model_digest"] for mine in by_rank}) == 1


def test_the_table_covers_what_it_should() -> None:
    """One to three classes; single-rank, full and uneven classes; weights that differ."""
    layouts = [layout for group in LAYOUTS.values() for layout in group]
    assert {len(layout) for layout in layouts} == {1, 2, 3}
    assert any(len(c) == 1 for layout in layouts for c in layout) and any([[0, 1, 2, 3]] == x for x in layouts)
    assert any(len({len(c) for c in layout}) > 1 for layout in layouts)
    assert any([c[0] for c in layout] != sorted(c[0] for c in layout) for layout in layouts)
    assert len(set(TAUS)) == 3


@pytest.mark.parametrize("size", sorted(LAYOUTS))
def test_broadcast_gather_sum(found: Callable[[int], Found], size: int) -> None:
    for mine in found(size):
        assert mine["broadcast"] == [[size, 7]] * 4
        assert mine["gather_even"] == [[r, -r] for r in range(size)]
        assert mine["gather_uneven"] == [[float(r)] * ((2 * r) % 3) for r in range(size)]
        assert mine["sum"] == pytest.approx([size, sum(range(size)), 0.1 * size], rel=1e-12)
        assert mine["max"] == [size - 1, 0, 0.1]


@pytest.mark.parametrize("size", sorted(LAYOUTS))
def test_all_start_from_rank_0s_model(found: Callable[[int], Found], size: int) -> None:
    first, *others = found(size)
    assert all(mine["start"] == first["start"] for mine in others)
    weight, bias, *_, tracked = first["start"]
    assert bias == [0.0, 0.0] and tracked == 3
    torch.manual_seed(0)
    assert weight == torch.nn.Linear(2, 2).weight.tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_that_disagree_are_told_who_differs(found: Callable[[int], Found], size: int) -> None:
    for mine in found(size):
        assert mine["disagreement"] == f"rank {size - 1} has another plan than rank 0"


@pytest.mark.parametrize("size", sorted(LAYOUTS))
def test_paths_and_close(found: Callable[[int], Found], size: int) -> None:
    for mine in found(size):
        assert mine["auto_path"] == "flat", "on CPUs one global sum is the faster way"
        assert mine["closed"]


# ---- what needs no job ----------------------------------------------------------------------------------------------


def two_ranks(device: str) -> Cluster:
    facts = tuple(RankFacts(r, "one", r, ("gpu",), "cpu", (0,)) for r in range(2))
    return Cluster((DeviceClass("a", device, (0,)), DeviceClass("b", "cpu", (1,))), facts)


def test_gpu_ranks_cannot_take_the_flat_path() -> None:
    with pytest.raises(ConfigError, match="aggregation.path='flat'.*hierarchical"):
        Comm(two_ranks("cuda"), 0, AggregationConfig(path="flat"))


@pytest.mark.parametrize(
    ("devices", "asked", "ways"),
    [(("cpu", "cpu"), "measured", ("flat", "hierarchical")), (("cpu", "cpu"), "auto", ("flat",)),
     (("cuda", "cpu"), "measured", ("hierarchical",)), (("cuda", "cpu"), "auto", ("hierarchical",))],
)  # fmt: skip
def test_ways_between_which_a_job_can_choose(devices: tuple[str, str], asked: str, ways: tuple[str, ...]) -> None:
    facts = tuple(RankFacts(r, "one", r, ("gpu",), "cpu", (0,)) for r in range(3))
    cluster = Cluster((DeviceClass("a", devices[0], (0,)), DeviceClass("b", devices[1], (1, 2))), facts)
    assert paths_of(AggregationConfig(path=asked), cluster) == ways


def test_where_every_class_is_one_rank_there_is_one_way() -> None:
    assert paths_of(AggregationConfig(path="measured"), two_ranks("cpu")) == ("flat",)


def test_one_global_sum_is_not_cut() -> None:
    with pytest.raises(ConfigError, match="aggregation.chunk_mb=4.*aggregation.path=hierarchical"):
        Comm(two_ranks("cpu"), 0, AggregationConfig(chunk_mb=4.0))


def facts(*slots: int) -> list[RankFacts]:
    places = [(f"host{i}", slot) for i, count in enumerate(slots) for slot in range(count)]
    return [RankFacts(i, host, slot, (), "cpu", (0,)) for i, (host, slot) in enumerate(places)]


def test_several_gpu_ranks_need_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the ranks would end in the middle of their first sum."""
    alone = (DeviceClass("a", "cuda", (0,)), DeviceClass("b", "cuda", (1,)))
    together = (DeviceClass("a", "cuda", (0, 1)),)
    monkeypatch.setattr(horovod_build, "build_info", lambda: {"nccl": False})
    check_gpu_sums(Cluster(alone, tuple(facts(2))))
    with pytest.raises(ConfigError, match=r"cluster.classes.a=.*without NCCL; .*class of its own"):
        check_gpu_sums(Cluster(together, tuple(facts(2))))
    monkeypatch.setattr(horovod_build, "build_info", lambda: {"nccl": True})
    check_gpu_sums(Cluster(together, tuple(facts(2))))


def test_ranks_that_share_a_gpu_do_not_sum_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums go through the host, for which no NCCL is needed."""
    monkeypatch.setattr(horovod_build, "build_info", lambda: {"nccl": False})
    one_gpu = [replace(fact, gpus=("gpu",)) for fact in facts(2)]
    cluster = Cluster((DeviceClass("a", "cuda", (0, 1)),), tuple(one_gpu))
    check_gpu_sums(cluster)
    assert GradientSum(cast(Any, None), (0, 1), cluster)._travel is OnHost
    monkeypatch.setattr(gradient_allreduce, "build_info", lambda: {"nccl": True})
    two_gpus = Cluster(cluster.classes, tuple(replace(fact, gpus=("gpu", "gpu")) for fact in facts(2)))
    assert GradientSum(cast(Any, None), (0, 1), two_gpus)._travel is Summable


@pytest.mark.parametrize(("sets", "slots", "trap"), [
    ([[0], [1, 2, 3]], (2, 2), True),  # rank 1 is the first of the set on its host, the second of all ranks there
    ([[1, 2, 3]], (2, 2), True),
    ([[0, 2], [1, 3]], (2, 2), False),
    ([[0, 3], [1, 2]], (2, 2), True),
    ([[0, 1, 2]], (2, 2), False),
    ([[0, 2]], (2, 2), False),
    ([[1, 2]], (4,), False),  # one host
    ([[2, 3]], (2, 2), False),
])
def test_the_trap_of_an_unpatched_horovod(
    monkeypatch: pytest.MonkeyPatch, sets: list[list[int]], slots: tuple[int, ...], trap: bool
) -> None:
    monkeypatch.setattr(horovod_build, "fixes", lambda: ("mixed-hosts",))
    check_mixed_hosts(sets, facts(*slots))
    monkeypatch.setattr(horovod_build, "fixes", lambda: ("stall-check",))
    if not trap:
        check_mixed_hosts(sets, facts(*slots))
        return
    with pytest.raises(ConfigError, match="cluster.classes=.*scripts/setup"):
        check_mixed_hosts(sets, facts(*slots))


@pytest.mark.parametrize(("error", "expected"), [
    (HorovodInternalError("gone\nmore"), PeerLost),
    (ValueError("Process set provided does not exist, or has not been registered."), PeerLost),
    (ValueError("shapes differ"), ValueError),
    (RuntimeError("other"), RuntimeError),
])
def test_a_peers_death_is_told_from_other_errors(error: Exception, expected: type[Exception]) -> None:
    def call() -> None:
        raise error

    with pytest.raises(expected) as caught:
        guarded(call)
    assert isinstance(caught.value, PeerLost) is (expected is PeerLost)


def test_place_in_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SIZE", "LOCAL_RANK", "HOSTNAME", "GLOO_RENDEZVOUS_ADDR", "GLOO_RENDEZVOUS_PORT"):
        monkeypatch.delenv(f"HOROVOD_{name}", raising=False)
    alone = job_env()
    assert (alone.rank, alone.size, alone.local_rank, alone.store) == (0, 1, 0, None)
    assert exchange(alone, "start", {"x": 1}, 1.0) == [{"x": 1}]
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(ConfigError, match="mpirun.*horovodrun --gloo"):
        job_env()
    for name, value in {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "HOSTNAME": "two",
                        "GLOO_RENDEZVOUS_ADDR": "10.0.0.1", "GLOO_RENDEZVOUS_PORT": "99"}.items():
        monkeypatch.setenv(f"HOROVOD_{name}", value)
    assert job_env() == JobEnv(3, 4, 1, "two", "http://10.0.0.1:99/hvd_hetero")


def test_addresses_of_one_init_are_gone_before_the_next() -> None:
    """Horovod's own server, told in the order in which it loses count: one rank is through before another is done."""
    server = RendezvousServer()
    port = server.start()
    server.init([SlotInfo("localhost", rank, rank, 0, 2, 2, 1) for rank in range(2)])
    url = f"http://localhost:{port}"
    try:
        for number in range(3):
            for scope, rank in [("global", 0), ("global", 1), ("local_localhost", 0), ("local_localhost", 1),
                                ("cross_0", 0), ("cross_1", 0)]:  # fmt: skip
                request(f"{url}/{scope}/{rank}", "PUT", b"address %d" % number)
            for scope, rank in [("global", 0), ("global", 1), ("local_localhost", 0), ("cross_0", 0),
                                ("local_localhost", 1), ("cross_1", 0)]:  # fmt: skip
                request(f"{url}/{scope}/{rank}", "DELETE")
            assert request(f"{url}/local_localhost/0", "GET") == 200, "else there is nothing to be mended"
            forget_addresses(JobEnv(size=2, store=f"{url}/{SCOPE}"), ["localhost"], [0, 1])
            for scope in ("global", "local_localhost", "cross_0", "cross_1"):
                assert request(f"{url}/{scope}/0", "GET") == 404, scope
    finally:
        server.stop()
    forget_addresses(JobEnv(size=2, store=f"{url}/{SCOPE}"), ["localhost"], [0])  # nobody answers, and nobody minds


def request(url: str, method: str, data: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data, method=method), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
