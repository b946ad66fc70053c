"""Which rank belongs to which device class, and which device, threads and cores it gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_hetero.cluster.device_classes import Cluster, assign, integers, shares_a_gpu
from hvd_hetero.cluster.hardware import RankFacts, local_facts, numa_nodes, pci_node
from hvd_hetero.cluster.placement import place
from hvd_hetero.config.load import device_classes
from hvd_hetero.errors import ConfigError


def ranks_on(*hosts: tuple[str, int], gpus: Sequence[str] = (), cores: int = 8) -> list[RankFacts]:
    """Facts of the ranks of a job with these hosts and slots, all alike."""
    places = [(host, slot) for host, slots in hosts for slot in range(slots)]
    all_cores = tuple(range(cores))
    return [RankFacts(i, host, slot, tuple(gpus), "some cpu", all_cores) for i, (host, slot) in enumerate(places)]


def made(classes: dict[str, Any], facts: Sequence[RankFacts]) -> dict[str, tuple[int, ...]]:
    return {c.name: c.ranks for c in assign(device_classes(classes), facts).classes}


# ---- which rank belongs to which class ------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "expected"), [
    ({"a": {"ranks": [0]}, "b": {"ranks": [3, 1, 2]}}, {"a": (0,), "b": (1, 2, 3)}),
    ({"b": {"ranks": "1-3"}, "a": {"ranks": 0}}, {"b": (1, 2, 3), "a": (0,)}),
    ({"a": {"ranks": "0-1,3"}, "b": {"ranks": 2}}, {"a": (0, 1, 3), "b": (2,)}),
    ({"all": {"ranks": "0-3"}}, {"all": (0, 1, 2, 3)}),
    ({"a": {"hosts": "one"}, "b": {"hosts": "two"}}, {"a": (0, 1), "b": (2, 3)}),
    ({"a": {"hosts": "*o*", "slots": 0}, "b": {"hosts": "*", "slots": [1]}}, {"a": (0, 2), "b": (1, 3)}),
    ({"a": {"slots": 0}, "b": {"slots": "1-9"}}, {"a": (0, 2), "b": (1, 3)}),
    ({"a": {"hosts": "t*", "slots": 1}, "b": {"ranks": "0-2"}}, {"a": (3,), "b": (0, 1, 2)}),
    ({"none": {"hosts": "three"}, "all": {"hosts": "*"}}, {"all": (0, 1, 2, 3)}),
])
def test_every_rank_gets_its_class(classes: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    """By ranks, by host and slots, or both; in the order of the configuration; a class without ranks is left out."""
    facts = ranks_on(("one", 2), ("two", 2))
    cluster = assign(device_classes(classes), facts)
    assert [(c.name, c.ranks) for c in cluster.classes] == list(expected.items())
    assert cluster.empty == tuple(name for name in classes if name not in expected)
    assert all(cluster.class_of(rank).name == name for name, ranks in expected.items() for rank in ranks)


def test_uneven_slots() -> None:
    facts = ranks_on(("one", 1), ("two", 3))
    assert made({"a": {"slots": 0}, "b": {"hosts": "two", "slots": "1-2"}}, facts) == {"a": (0, 1), "b": (2, 3)}


@pytest.mark.parametrize(("classes", "key", "text"), [
    ({"a": {"ranks": [0, 1]}, "b": {"ranks": [1, 2, 3]}}, "cluster.classes.b", "rank 1 is in class a too"),
    ({"a": {"hosts": "one"}, "b": {"ranks": "1-3"}}, "cluster.classes.b", "rank 1 is in class a too"),
    ({"a": {"ranks": [0]}, "b": {"ranks": [1, 3]}}, "cluster.classes", "rank 2 of 4 belongs to no class"),
    ({"a": {"hosts": "two"}}, "cluster.classes", "rank 0 of 4 belongs to no class"),
    ({"a": {"ranks": "0-4"}}, "cluster.classes.a.ranks", "no rank 4 among 4"),
    ({"a": {}}, "cluster.classes.a", "needs either ranks, or hosts and slots"),
    ({"a": {"ranks": 0, "hosts": "*"}}, "cluster.classes.a", "needs either ranks, or hosts and slots"),
    ({"a": {"ranks": [0, 0]}}, "cluster.classes.a.ranks", "names one twice"),
    ({"a": {"ranks": "first"}}, "cluster.classes.a.ranks", "'first' is not a number"),
    ({"a": {"ranks": [-1]}}, "cluster.classes.a.ranks", "-1 is not a number"),
    ({"a": {"slots": "x"}}, "cluster.classes.a.slots", "'x' is not a number"),
    ({"a": {"ranks": "0-3", "device": "cuda"}}, "cluster.classes.a.device", "shows 0 GPU(s), its ranks want 2"),
])
def test_classes_that_do_not_fit(classes: dict[str, Any], key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(classes, ranks_on(("one", 2), ("two", 2)))
    assert caught.value.key == key
    assert text in caught.value.problem
    assert caught.value.remedy


def test_a_gpu_too_few() -> None:
    facts = ranks_on(("one", 3), gpus=["big", "big"])
    assert made({"g": {"device": "cuda", "ranks": "0-1"}, "c": {"ranks": 2}}, facts) == {"g": (0, 1), "c": (2,)}
    with pytest.raises(ConfigError, match="shows 2 GPU"):
        made({"g": {"device": "cuda", "ranks": "0-2"}}, facts)


def test_a_gpu_is_shared_where_that_is_asked_for() -> None:
    """By ranks of different classes or of one, on two hosts; refused otherwise, with the key for it."""
    facts = ranks_on(("one", 3), ("two", 1), gpus=["big"])
    classes = {
        "quick": {"device": "cuda", "ranks": [0, 3]}, "slow": {"device": "cuda", "ranks": [1]}, "c": {"ranks": 2},
    }
    with pytest.raises(ConfigError, match="slow.device=.*shows 1 GPU.*want 2.*cluster.share_gpus=true"):
        made(classes, facts)
    cluster = assign(device_classes(classes), facts, share_gpus=True)
    assert [place(cluster, rank, 2, True).device for rank in range(4)] == ["cuda:0", "cuda:0", "cpu", "cuda:0"]
    assert not shares_a_gpu(cluster, (0, 3)), "they are on different hosts"
    assert shares_a_gpu(cluster, (0, 1))
    with pytest.raises(ConfigError, match="shows 0 GPU.*install a CUDA build"):
        assign(device_classes({"g": {"device": "cuda", "ranks": "0-2"}}), ranks_on(("one", 3)), share_gpus=True)


def test_why_no_gpu_can_be_used_is_told() -> None:
    facts = [RankFacts(0, "one", 0, (), "cpu", (0,), gpu_problem="The NVIDIA driver on your system is too old")]
    with pytest.raises(ConfigError, match="shows 0 GPU.*driver on your system is too old.*that fit together"):
        made({"g": {"device": "cuda", "ranks": 0}}, facts)


def test_auto_gives_every_gpu_a_rank_and_the_rest_to_the_cpu() -> None:
    mixed = [*ranks_on(("one", 3), gpus=["H200", "H200"])]
    assert [(c.name, c.device, c.ranks) for c in assign("auto", mixed).classes] == [
        ("gpu", "cuda", (0, 1)), ("cpu", "cpu", (2,)),
    ]
    alike = assign("auto", ranks_on(("one", 2), ("two", 1)))
    assert [(c.name, c.device, c.ranks) for c in alike.classes] == [("cpu", "cpu", (0, 1, 2))]


def test_auto_makes_a_class_of_every_device_model() -> None:
    facts = [
        RankFacts(0, "one", 0, ("H200", "A-10 (x)"), "old cpu", (0,)),
        RankFacts(1, "one", 1, ("H200", "A-10 (x)"), "old cpu", (0,)),
        RankFacts(2, "one", 2, ("H200", "A-10 (x)"), "old cpu", (0,)),
        RankFacts(3, "two", 0, (), "New CPU @ 3 GHz", (0,)),
    ]
    assert [(c.name, c.device, c.ranks) for c in assign("auto", facts).classes] == [
        ("gpu-h200", "cuda", (0,)), ("gpu-a-10-x", "cuda", (1,)), ("cpu-old-cpu", "cpu", (2,)),
        ("cpu-new-cpu-3-ghz", "cpu", (3,)),
    ]


def test_slowdown_makes_a_cluster_emulated() -> None:
    facts = ranks_on(("one", 2))
    assert not assign(device_classes({"a": {"ranks": "0-1"}}), facts).emulated
    slow = device_classes({"a": {"ranks": 0}, "b": {"ranks": 1, "slowdown": 2}})
    assert assign(slow, facts).emulated
    absent = device_classes({"a": {"ranks": "0-1"}, "b": {"hosts": "none", "slowdown": 2}})
    assert not assign(absent, facts).emulated, "a class without ranks slows nobody down"


# ---- devices, threads and cores -------------------------------------------------------------------------------------


def placed(classes: dict[str, Any], facts: Sequence[RankFacts], gpu_cores: int = 2) -> list[tuple[str, int, Any]]:
    cluster = assign(device_classes(classes), facts)
    places = [place(cluster, fact.rank, gpu_cores, True) for fact in facts]
    return [(p.device, p.threads, p.cores) for p in places]


def test_the_gpu_index_counts_gpu_ranks_only() -> None:
    """CPU ranks in between, and several hosts: the local rank would be the wrong index."""
    facts = ranks_on(("one", 4), ("two", 2), gpus=["g", "g"])
    places = placed({"c": {"ranks": [0, 2, 4]}, "g": {"device": "cuda", "ranks": [1, 3, 5]}}, facts)
    assert [device for device, _, _ in places] == ["cpu", "cuda:0", "cpu", "cuda:1", "cpu", "cuda:0"]


def test_gpu_ranks_keep_cores_and_cpu_ranks_share_the_rest() -> None:
    facts = ranks_on(("one", 3), gpus=["g"], cores=9)
    places = placed({"c": {"ranks": [0, 2]}, "g": {"device": "cuda", "ranks": [1]}}, facts, gpu_cores=3)
    assert places == [("cpu", 3, (3, 4, 5)), ("cuda:0", 3, (0, 1, 2)), ("cpu", 3, (6, 7, 8))]


def test_gpu_ranks_are_given_the_cores_of_their_gpus_node() -> None:
    """GPU 0 is on the second node, GPU 1 on the first."""
    facts = [RankFacts(r, "one", r, ("g", "g"), "cpu", tuple(range(8)), gpu_cores=((4, 5, 6, 7), (0, 1, 2, 3)))
             for r in range(3)]
    places = placed({"c": {"ranks": [0]}, "g": {"device": "cuda", "ranks": [1, 2]}}, facts)
    assert places == [("cpu", 4, (2, 3, 6, 7)), ("cuda:0", 2, (4, 5)), ("cuda:1", 2, (0, 1))]


def test_gpu_ranks_alone_share_all_cores() -> None:
    places = placed({"g": {"device": "cuda", "ranks": [0, 1]}}, ranks_on(("one", 2), gpus=["g", "g"], cores=9))
    assert places == [("cuda:0", 4, (0, 1, 2, 3)), ("cuda:1", 4, (4, 5, 6, 7))]


def test_threads_as_set_and_no_affinity() -> None:
    cluster = assign(device_classes({"a": {"ranks": "0-1", "threads": 7}}), ranks_on(("one", 2), cores=4))
    assert (place(cluster, 0, 2, True).threads, place(cluster, 0, 2, True).cores) == (7, (0, 1))
    assert place(cluster, 1, 2, False).cores is None


def test_more_ranks_than_cores() -> None:
    assert placed({"a": {"ranks": "0-2"}}, ranks_on(("one", 3), cores=2)) == [("cpu", 1, None)] * 3


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 4), st.integers(0, 6), st.integers(1, 40), st.integers(1, 8), st.randoms())
def test_no_core_is_shared(gpu_ranks: int, cpu_ranks: int, cores: int, gpu_cores: int, random: Any) -> None:
    """Where there are enough; then CPU ranks get all that GPU ranks leave, and differ by one core at most. GPU ranks
    that are alone are given all there are, but for a rest."""
    size = gpu_ranks + cpu_ranks
    if size == 0:
        return
    order = random.sample(range(size), size)
    classes = {"g": {"device": "cuda", "ranks": order[:gpu_ranks]}, "c": {"ranks": order[gpu_ranks:]}}
    facts = ranks_on(("one", size), gpus=["g"] * gpu_ranks, cores=cores)
    places = placed(classes, facts, gpu_cores)
    if size > cores:
        assert all(p == (p[0], 1, None) for p in places)
        return
    taken = [core for _, _, own in places for core in own]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(range(cores))
    assert all(threads == len(own) >= 1 for _, threads, own in places)
    on_gpu = {len(own) for device, _, own in places if device != "cpu"}
    on_cpu = {len(own) for device, _, own in places if device == "cpu"}
    assert len(on_gpu) <= 1 and (not cpu_ranks or max(on_gpu, default=1) <= gpu_cores)
    assert not on_cpu or max(on_cpu) - min(on_cpu) <= 1
    assert len(taken) == cores if cpu_ranks else cores - gpu_ranks < len(taken)


# ---- reading what the user wrote ------------------------------------------------------------------------------------


def test_integers() -> None:
    assert integers("k", 3) == [3]
    assert integers("k", [2, 0]) == [2, 0]
    assert integers("k", "0-2,7") == [0, 1, 2, 7]
    assert integers("k", ["0-1", 5]) == [0, 1, 5]


@pytest.mark.parametrize("value", [1.5, "1.5", [[0]], "3-", "", True, "3-1"])
def test_integers_that_cannot_be_read(value: Any) -> None:
    with pytest.raises(ConfigError):
        integers("k", value)


def test_facts_survive_the_trip_between_ranks() -> None:
    facts = local_facts(2, "here", 1)
    assert (facts.rank, facts.host, facts.local_rank) == (2, "here", 1)
    assert facts.cores and facts.cpu
    assert RankFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


def test_on_host() -> None:
    cluster: Cluster = assign(device_classes({"a": {"ranks": "0-3"}}), ranks_on(("one", 1), ("two", 3)))
    assert (cluster.on_host("one"), cluster.on_host("two"), cluster.size) == ([0], [1, 2, 3], 4)


def test_the_numa_node_of_a_pci_device(tmp_path: Path) -> None:
    for address, node in (("0000:3b:00.0", "1\n"), ("0000:af:00.0", "-1\n")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "numa_node").write_text(node)
    assert [pci_node(0, bus, 0, tmp_path) for bus in (0x3B, 0xAF, 0xB0)] == [1, None, None]


def test_cores_of_one_numa_node_follow_one_another(tmp_path: Path) -> None:
    for node, cores in ((0, "0-1,4\n"), (1, "2-3,5\n"), (2, "\n")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cores)
    assert numa_nodes(tmp_path) == {0: 0, 1: 0, 4: 0, 2: 1, 3: 1, 5: 1}
    assert numa_nodes(tmp_path / "none") == {}
