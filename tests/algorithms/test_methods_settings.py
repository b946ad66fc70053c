"""The methods without a job: their plans, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from method_helpers import ONE, TWINS, TWO, method, of

from hvd_hetero import algorithms
from hvd_hetero.cluster.device_classes import DeviceClass
from hvd_hetero.config.load import load
from hvd_hetero.errors import ConfigError
from hvd_hetero.training.loop import check_supported_by_loop

pytestmark = pytest.mark.horovod

CONFIGS = Path(__file__).parents[2] / "configs"


# ---- plans ----------------------------------------------------------------------------------------------------------


def test_sync_takes_every_rank_one_step_a_round() -> None:
    plan = method({"algorithm.name": "sync_sgd", "train.batch_size": {"fast": 20, "slow": 5}}).make_plan(None)
    assert [(c.tau, c.batch_size, c.role) for c in plan.classes] == [(1, 20, "train"), (1, 5, "train")]
    assert [c.weight for c in plan.classes] == pytest.approx([20 / 55, 5 / 55]), "gradients weigh as their batches"
    assert plan.rounds == 1000 // 55


@pytest.mark.parametrize(("anchor", "batches"), [(None, 9), (3, 10)])
def test_the_longest_round_of_bvr_has_room_for_its_common_gradient(anchor: int | None, batches: int) -> None:
    """20 batches for two ranks: A + K - 1 of each, with A = K or as it is set, where averages are dear."""
    settings = {"algorithm.name": "bvr_l_sgd", "train.tau": "auto", "train.batch_size": 10,
                "train.optimizer_args": {"momentum": 0.0}, "algorithm.anchor_batches": anchor}  # fmt: skip
    policy = method(settings, ONE, samples=200)
    policy.check()
    policy.average_sec = 1.0
    plan = policy.make_plan({"every": 0.01})
    assert (plan.rounds, plan.classes[0].tau) == (1, batches)


@pytest.mark.parametrize(("name", "role"), [("sync_sgd", "idle"), ("byteps", "server")])
def test_only_the_fast_class_trains(name: str, role: str) -> None:
    settings = {"algorithm.name": name, "algorithm.participants": "fast", "train.batch_size": 10}
    plan = method(settings).make_plan(None)
    assert plan.epoch_samples() == {"fast": 1000, "slow": 0} and plan.rounds == 50
    assert (plan.classes[1].tau, plan.classes[1].weight, plan.classes[1].role) == (0, 0.0, role)
    assert plan.fastest == plan.slowest == plan.classes[0], "who takes no steps is neither"
    assert plan.of_rank(4).speed == 0, "and takes no part in the evaluation"


@pytest.mark.parametrize("name", ["sync_sgd", "byteps", "dlb"])
@pytest.mark.parametrize("tau", [32, {"fast": 32, "slow": 4}])
def test_an_epoch_counted_in_fast_steps_has_as_many_as_local_sgd(name: str, tau: Any) -> None:
    """CIFAR-10 in the paper: 10 workers, B = 32, tau = 32 make 4 rounds, or 128 steps of synchronous SGD."""
    classes = (DeviceClass("fast", "cpu", tuple(range(8))), DeviceClass("slow", "cpu", (8, 9)))
    settings = {"train.epoch_length": "fast_steps", "train.batch_size": 32, "train.tau": {"fast": 32, "slow": 4}}
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
        config = load((), {"algorithm.name": name, "train.tau": 8}, algorithms.method)
        assert (config.sampling.scheme, config.aggregation.weights) == expected


@pytest.mark.parametrize(("settings", "weights"), [
    ({}, "normalised"),
    ({"aggregation.weights": "uniform"}, "uniform"),
    ({"aggregation.delayed": True}, "normalised"),
    ({"aggregation.mode": "solo"}, "steps"),
    ({"cluster.too_slow": "wait_avoiding"}, "steps"),
    ({"aggregation.anneal_from": 0.5}, "steps"),
    ({"train.tau": {"fast": 4, "slow": 1}}, "steps"),
])
def test_every_gradient_counts_the_same_where_rounds_are_chosen(settings: dict[str, Any], weights: str) -> None:
    config = load((), {"train.tau": "auto", **settings}, algorithms.method)
    assert config.aggregation.weights == weights


@pytest.mark.parametrize("name", algorithms.REGISTRY)
def test_every_method_has_its_file_of_settings(name: str) -> None:
    """It names the method, and nothing in it is refused."""
    config = load([CONFIGS / "algorithm" / f"{name}.yaml"], (), algorithms.method)
    assert config.algorithm.name == name
    algorithms.policy(config, of(TWO), 5000).check()


@pytest.mark.parametrize("name", algorithms.REGISTRY)
def test_every_method_says_what_it_does(name: str) -> None:
    module = __import__(f"hvd_hetero.algorithms.{name}", fromlist=["x"])
    assert module.__doc__ and "::" in module.__doc__ and len(module.__doc__.splitlines()) >= 8


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "classes", "key", "says"), [
    ({"algorithm.name": "sync"}, TWO, "algorithm.name", "did you mean 'sync_sgd'?"),
    ({"algorithm.name": "byteps", "algorithm.partition_byte": 9}, TWO, "algorithm.partition_byte", "partition_bytes"),
    ({"algorithm.name": "sync_sgd", "algorithm.partition_bytes": 9}, TWO, "algorithm.partition_bytes", "known key"),
    ({"algorithm.name": "byteps", "algorithm.partition_bytes": 0}, TWO, "algorithm.partition_bytes", "8 or more"),
    ({"algorithm.name": "byteps"}, ONE, "algorithm.name", "add a second class"),
    ({"algorithm.name": "byteps", "algorithm.participants": "all"}, TWO, "algorithm.name", "summation server"),
    ({"algorithm.name": "dlb", "algorithm.global_batch": 4}, TWO, "algorithm.global_batch", "5 or more"),
    ({"algorithm.name": "dlb", "algorithm.global_batch": 9, "algorithm.min_local_batch": 2}, TWO,
     "algorithm.global_batch", "10"),
    ({"aggregation.weights": "normalised", "aggregation.mode": "solo"}, TWO, "aggregation.mode", "weights=steps"),
    ({"aggregation.weights": "normalised", "cluster.too_slow": "wait_avoiding"}, TWO, "cluster.too_slow",
     "weights=steps"),
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
    ({"train.autocast": "fp8"}, TWO, "train.autocast", "fp16"),
])  # fmt: skip
def test_refused_before_a_worker_starts(
    settings: dict[str, Any], classes: tuple[DeviceClass, ...], key: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        method(settings, classes).check()
    assert caught.value.key == key and says in str(caught.value)


@pytest.mark.parametrize(("settings", "key"), [
    ({"algorithm.name": "sync_sgd"}, "algorithm.name"),
    ({"train.micro_batches": 2}, "train.micro_batches"),
    ({"train.clip_norm": 1.0}, "train.clip_norm"),
])  # fmt: skip
def test_a_hand_written_loop_refuses_what_it_cannot_do(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_supported_by_loop(load((), settings, algorithms.method))
    assert caught.value.key == key
