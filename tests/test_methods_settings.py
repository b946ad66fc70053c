"""The methods without a job: their plans, what they refuse, and the small pieces they are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("horovod.torch", reason="Horovod is not installed: run scripts/setup")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from hvd_hetero import algorithms, cluster  # noqa: E402
from hvd_hetero.algorithms.base import Algorithm  # noqa: E402
from hvd_hetero.algorithms.dlb import DLB  # noqa: E402
from hvd_hetero.algorithms.lockstep import choose  # noqa: E402
from hvd_hetero.algorithms.outer import Outer  # noqa: E402
from hvd_hetero.by_name import per_sample_loss  # noqa: E402
from hvd_hetero.cluster import Cluster, DeviceClass, RankFacts, has_bf16  # noqa: E402
from hvd_hetero.comm.flat import FlatState  # noqa: E402
from hvd_hetero.comm.servers import Servers  # noqa: E402
from hvd_hetero.config import load  # noqa: E402
from hvd_hetero.errors import ConfigError  # noqa: E402
from hvd_hetero.loop import check_plain  # noqa: E402
from hvd_hetero.plan import apportion  # noqa: E402
from hvd_hetero.worker import Worker  # noqa: E402

CONFIGS = Path(__file__).parent.parent / "configs"
TWO = (DeviceClass("fast", "cpu", (0, 1)), DeviceClass("slow", "cpu", (2, 3, 4), slowdown=8.0))
ONE = (DeviceClass("every", "cpu", (0, 1)),)
TWINS = (DeviceClass("a", "cpu", (0,)), DeviceClass("b", "cpu", (1,)))
GPU = (DeviceClass("old", "cpu", (0,)), DeviceClass("new", "cuda", (1,), slowdown=2.0))


def of(classes: tuple[DeviceClass, ...]) -> Cluster:
    size = sum(len(c.ranks) for c in classes)
    return Cluster(classes, tuple(RankFacts(rank, "here", rank, (), "cpu", (0,)) for rank in range(size)))


def method(settings: Mapping[str, Any], classes: tuple[DeviceClass, ...] = TWO, samples: int = 1000) -> Algorithm:
    return algorithms.build(load((), settings, algorithms.method), of(classes), samples)


# ---- plans ----------------------------------------------------------------------------------------------------------


def test_sync_takes_every_rank_one_step_a_round() -> None:
    plan = method({"algorithm.name": "sync_sgd", "train.batch_size": {"fast": 20, "slow": 5}}).make_plan(None)
    assert [(c.tau, c.batch_size, c.role) for c in plan.classes] == [(1, 20, "train"), (1, 5, "train")]
    assert [c.weight for c in plan.classes] == pytest.approx([20 / 55, 5 / 55]), "gradients weigh as their batches"
    assert plan.rounds == 1000 // 55


@pytest.mark.parametrize(("name", "role"), [("sync_sgd", "idle"), ("byteps", "server")])
def test_only_the_fast_class_trains(name: str, role: str) -> None:
    settings = {"algorithm.name": name, "algorithm.participants": "fast", "train.batch_size": 10}
    plan = method(settings).make_plan(None)
    assert plan.pass_samples() == {"fast": 1000, "slow": 0} and plan.rounds == 50
    assert (plan.classes[1].tau, plan.classes[1].weight, plan.classes[1].role) == (0, 0.0, role)
    assert plan.fastest == plan.slowest == plan.classes[0], "who takes no steps is neither"
    assert plan.of_rank(4).speed == 0, "and takes no part in the evaluation"


@pytest.mark.parametrize("name", ["sync_sgd", "byteps", "dlb"])
@pytest.mark.parametrize("tau", [32, {"fast": 32, "slow": 4}])
def test_an_epoch_counted_in_fast_steps_has_as_many_as_local_sgd(name: str, tau: Any) -> None:
    """CIFAR-10 in the paper: 10 workers, B = 32, tau = 32 make 4 rounds, or 128 steps of synchronous SGD."""
    classes = (DeviceClass("fast", "cpu", tuple(range(8))), DeviceClass("slow", "cpu", (8, 9)))
    settings = {"train.epoch": "fast_steps", "train.batch_size": 32, "train.tau": {"fast": 32, "slow": 4}}
    local = method({**settings, "algorithm.name": "unbalanced_local_sgd"}, classes, 50000).make_plan(None)
    assert local.rounds == 4
    lockstep = method({**settings, "train.tau": tau, "algorithm.name": name}, classes, 50000).make_plan(None)
    assert lockstep.rounds == 128


def test_balanced_takes_one_tau_for_all() -> None:
    plan = method({"algorithm.name": "balanced_local_sgd", "train.tau": 7}).make_plan(None)
    assert [c.tau for c in plan.classes] == [7, 7] and {c.weight for c in plan.classes} == {0.2}


def test_biases_are_on_where_the_method_has_them_and_off_elsewhere() -> None:
    biased, others = ("separate", "steps"), ("uniform", "uniform")
    for name in algorithms.REGISTRY:
        expected = biased if name == "biased_local_sgd" else others
        config = load((), {"algorithm.name": name}, algorithms.method)
        assert (config.sampling.scheme, config.aggregation.weights) == expected


@pytest.mark.parametrize("name", algorithms.REGISTRY)
def test_every_method_has_its_file_of_settings(name: str) -> None:
    """It names the method, and nothing in it is refused."""
    config = load([CONFIGS / "algorithm" / f"{name}.yaml"], (), algorithms.method)
    assert config.algorithm.name == name
    algorithms.build(config, of(TWO), 5000).check()


@pytest.mark.parametrize("name", algorithms.REGISTRY)
def test_every_method_says_what_it_does(name: str) -> None:
    module = __import__(f"hvd_hetero.algorithms.{name}", fromlist=["x"])
    assert module.__doc__ and "::" in module.__doc__ and len(module.__doc__.splitlines()) >= 8


# ---- DLB ------------------------------------------------------------------------------------------------------------


def dlb(classes: tuple[DeviceClass, ...] = TWO, **settings: Any) -> DLB:
    made = method({"algorithm.name": "dlb", **{f"algorithm.{k}": v for k, v in settings.items()}}, classes)
    assert isinstance(made, DLB)
    Algorithm.start(made, made.make_plan(None), None, SimpleNamespace(rank=0))  # type: ignore[arg-type]
    return made


def batches(algorithm: Algorithm) -> list[int]:
    return [c.batch_size for c in algorithm.plan.by_rank()]


def test_dlb_begins_with_equal_shares_and_follows_speed() -> None:
    made = dlb(global_batch=50)
    assert batches(made) == [10] * 5
    made.replan([1.0, 1.0, 4.0, 4.0, 2.0])  # 1 : 1 : 1/4 : 1/4 : 1/2
    assert batches(made) == [17, 17, 4, 4, 8], "16.67, 16.67, 4.17, 4.17, 8.33 by largest remainder"
    made.replan([17.0, 17.0, 4.0, 4.0, 8.0])
    assert batches(made) == [10] * 5, "all equally fast now"
    assert made.plan.rounds == 1000 // 50


def test_dlb_weights_gradients_by_batch() -> None:
    made = dlb(global_batch=13)
    made.replan([1.0, 2.0, 3.0, 4.0, 5.0])
    plan = made.plan.by_rank()
    assert sum(batches(made)) == 13
    assert [c.weight for c in plan] == pytest.approx([c.batch_size / 13 for c in plan])
    assert sum(c.weight * len(c.ranks) for c in made.plan.classes) == pytest.approx(1)
    assert made.plan.pass_samples() == {"fast": sum(batches(made)[:2]) * 76, "slow": sum(batches(made)[2:]) * 76}


def test_dlb_gives_everybody_a_sample() -> None:
    made = dlb(global_batch=20)
    for _ in range(3):
        made.replan([1e-3, 1e-3, 1.0, 1.0, 1.0])
    assert sum(batches(made)) == 20 and min(batches(made)) == 1
    for _ in range(2):
        made.replan([b * 1.0 for b in batches(made)])
    assert batches(made) == [4] * 5, "a class that was slow for a while comes back at once"


def test_dlb_resumes_with_the_shares_it_had() -> None:
    first, second = dlb(global_batch=50), dlb(global_batch=50)
    first.replan([1.0, 1.0, 4.0, 4.0, 2.0])
    second.load_state_dict(first.state_dict())
    assert second.plan == first.plan


@pytest.mark.parametrize(("total", "shares", "at_least", "expected"), [
    (10, [0.98, 0.01, 0.01], 1, [8, 1, 1]),
    (3, [1.0, 0.0, 0.0], 1, [1, 1, 1]),
    (10, [0.98, 0.01, 0.01], 0, [10, 0, 0]),
    (12, [0.5, 0.25, 0.25], 2, [6, 3, 3]),
])  # fmt: skip
def test_apportion_with_a_least_share(total: int, shares: list[float], at_least: int, expected: list[int]) -> None:
    assert apportion(total, shares, at_least) == expected


# ---- BytePS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("servers", "length", "expected"), [
    (1, 10, [[4], [4], [2]]),          # the last partition is smaller
    (2, 10, [[4, 4], [2, 0]]),
    (3, 10, [[4, 4, 2]]),
    (4, 10, [[4, 4, 2, 0]]),           # more servers than partitions
    (2, 8, [[4, 4]]),
    (2, 3, [[3, 0]]),
    (2, 0, []),
])  # fmt: skip
def test_partitions_are_spread_over_the_servers(servers: int, length: int, expected: list[list[int]]) -> None:
    comm: Any = SimpleNamespace(size=servers + 2, rank=0)
    assert Servers(comm, [0, 1], partition_bytes=32).turns(length, itemsize=8) == expected


# ---- which class is fast --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "participants", "expected"), [
    (TWO, "all", ["fast", "slow"]),
    (TWO, "fast", ["fast"]),
    (TWO, "slow", ["slow"]),
    (ONE, "fast", ["every"]),
    (GPU, "fast", ["new"]),
    ((TWO[1], DeviceClass("quick", "cpu", (0, 1))), "fast", ["quick"]),
])  # fmt: skip
def test_participants(classes: tuple[DeviceClass, ...], participants: str, expected: list[str]) -> None:
    assert [c.name for c in choose(of(classes), participants)] == expected


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "classes", "key", "says"), [
    ({"algorithm.name": "sync"}, TWO, "algorithm.name", "did you mean 'sync_sgd'?"),
    ({"algorithm.name": "byteps", "algorithm.partition_byte": 9}, TWO, "algorithm.partition_byte", "partition_bytes"),
    ({"algorithm.name": "sync_sgd", "algorithm.partition_bytes": 9}, TWO, "algorithm.partition_bytes", "known key"),
    ({"algorithm.name": "byteps", "algorithm.partition_bytes": 0}, TWO, "algorithm.partition_bytes", "8 or more"),
    ({"algorithm.name": "byteps"}, ONE, "algorithm.name", "add a second class"),
    ({"algorithm.name": "byteps", "algorithm.participants": "all"}, TWO, "algorithm.name", "summation server"),
    ({"algorithm.name": "dlb", "algorithm.global_batch": 4}, TWO, "algorithm.global_batch", "5 or more"),
    ({"algorithm.name": "dlb", "algorithm.global_batch": 0}, TWO, "algorithm.global_batch", "1 or more"),
    ({"algorithm.name": "dlb", "algorithm.global_batch": 2000}, TWO, "train.batch_size", "has 1000"),
    ({"algorithm.name": "sync_sgd", "train.batch_size": 500}, TWO, "train.batch_size", "2500"),
    ({"algorithm.name": "sync_sgd", "algorithm.participants": "fats"}, TWO, "algorithm.participants", "fast, slow"),
    ({"algorithm.name": "sync_sgd", "algorithm.participants": "fast"}, TWINS, "algorithm.participants", "=a"),
    ({"algorithm.name": "sync_sgd", "algorithm.mode": "solo"}, TWO, "algorithm.mode", "leave it null"),
    ({"algorithm.name": "sync_sgd", "aggregation.outer_lr": 0.5}, TWO, "aggregation.outer_lr", "averages gradients"),
    ({"algorithm.name": "dlb", "aggregation.weights": "steps"}, TWO, "aggregation.weights", "averages gradients"),
    ({"algorithm.name": "byteps", "aggregation.optimizer_state": "reset"}, TWO, "aggregation.optimizer_state", "local"),
    ({"algorithm.name": "balanced_local_sgd", "train.tau": {"fast": 4, "slow": 2}}, TWO, "train.tau", "unbalanced"),
    ({"aggregation.outer_nesterov": True}, TWO, "aggregation.outer_nesterov", "outer_momentum"),
    ({"aggregation.outer_lr": 0.0}, TWO, "aggregation.outer_lr", "above 0"),
    ({"aggregation.outer_momentum": 1.5}, TWO, "aggregation.outer_momentum", "1 or less"),
    ({"aggregation.optimizer_state": "mean"}, TWO, "aggregation.optimizer_state", "average"),
    ({"train.clip_norm": 0}, TWO, "train.clip_norm", "above 0"),
    ({"train.autocast": "fp16"}, TWO, "train.autocast", "false or bf16"),
])  # fmt: skip
def test_refused_before_a_worker_starts(
    settings: dict[str, Any], classes: tuple[DeviceClass, ...], key: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        method(settings, classes).check()
    assert caught.value.key == key and says in str(caught.value)


@pytest.mark.parametrize(("settings", "key"), [
    ({"algorithm.name": "sync_sgd"}, "algorithm.name"),
    ({"aggregation.outer_momentum": 0.9}, "aggregation.outer_momentum"),
    ({"aggregation.optimizer_state": "reset"}, "aggregation.optimizer_state"),
])  # fmt: skip
def test_a_hand_written_loop_refuses_what_it_cannot_do(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_plain(load((), settings, algorithms.method))
    assert caught.value.key == key


def test_the_launcher_says_so_with_status_2(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    classes = "cluster.classes={every: {device: cpu, ranks: [0, 1]}}"
    done = hvd_hetero(["launch", "algorithm.name=byteps", classes, f"run.dir={tmp_path / 'run'}"])
    assert done.returncode == 2 and "add a second class" in done.stderr
    assert not (tmp_path / "run").exists() and "Traceback" not in done.stderr


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


def test_autocast_computes_in_bfloat16_and_keeps_float32_parameters() -> None:
    seen = []
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss = per_sample_loss("cross_entropy", {})
    worker = Worker(net, loss, lambda params: torch.optim.SGD(params, lr=0.1), None, autocast=True)
    before = worker.state.vectors[0].clone()
    losses = worker.gradient(torch.randn(6, 4), torch.zeros(6, dtype=torch.int64))
    worker.apply()
    assert seen == [torch.bfloat16] and losses.dtype == torch.float32
    assert worker.state.vectors[0].dtype == torch.float32 and not torch.equal(before, worker.state.vectors[0])


@pytest.mark.parametrize(("flags", "expected"), [("sse avx512_bf16 avx", True), ("sse avx512f", False), ("", False)])
def test_a_cpu_tells_whether_it_has_bfloat16(monkeypatch: pytest.MonkeyPatch, flags: str, expected: bool) -> None:
    monkeypatch.setattr(cluster, "_cpu_info", lambda name: flags if name == "flags" else "")
    assert has_bf16("cpu") is expected


# ---- the outer optimizer --------------------------------------------------------------------------------------------


def test_the_outer_optimizer_resumes_where_it_was() -> None:
    """Saved and loaded between two rounds, it goes on as if nothing had happened."""

    def made() -> tuple[FlatState, Outer]:
        torch.manual_seed(0)
        state = FlatState(nn.Linear(3, 2))
        return state, Outer(state, 0.7, 0.9, nesterov=True)

    def round_of(state: FlatState, outer: Outer, number: int) -> None:
        outer.remember()
        state.vectors[0].add_(number * torch.arange(8.0))  # what local steps and their average would come to
        outer.step()

    whole, first, second = made(), made(), made()
    for number in (1, 2, 3):
        round_of(*whole, number)
    for number in (1, 2):
        round_of(*first, number)
    second[0].vectors[0].copy_(first[0].vectors[0])
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    round_of(*second, 3)
    assert torch.equal(second[0].vectors[0], whole[0].vectors[0])


def test_a_plain_average_costs_nothing_more() -> None:
    state = FlatState(nn.Linear(3, 2))
    outer = Outer(state, 1.0, 0.0, nesterov=False)
    assert not outer.active and outer.state_dict() == {}
    before = state.vectors[0].clone()
    outer.remember()
    outer.step()
    assert torch.equal(before, state.vectors[0])
