"""Averages in groups without a job: who is in which group when, what is refused, and DASO's cadence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_helpers import TWO, of

from hvd_hetero import algorithms
from hvd_hetero.algorithms.daso import DASO, Cadence
from hvd_hetero.algorithms.decentlam import DecentLaM
from hvd_hetero.algorithms.execution.daso import DASOExecutor, Flight
from hvd_hetero.algorithms.wagma_sgd import WAGMASGD
from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.config.load import load
from hvd_hetero.errors import ConfigError


def policy(name: str, size: int = 4, per_host: int | Sequence[int] = 64, **settings: Any) -> Any:
    """Make a method's policy for ranks of one class, so many on each host; epochs of 1000 samples."""
    counts = [per_host] * size if isinstance(per_host, int) else per_host
    hosts = [f"h{i}" for i, count in enumerate(counts) for _ in range(count)]
    facts = tuple(RankFacts(rank, hosts[rank], rank, (), "cpu", (0,)) for rank in range(size))
    cluster = Cluster((DeviceClass("every", "cpu", tuple(range(size))),), facts)
    more = {key.replace("__", "."): value for key, value in settings.items()}
    overrides = {"algorithm.name": name, "train.batch_size": 1, **more}
    return algorithms.policy(load((), overrides, algorithms.method), cluster, 1000)


# ---- groups ---------------------------------------------------------------------------------------------------------


def test_groups_of_wagma_are_next_to_the_root_of_the_ranks() -> None:
    sizes = {size: policy("wagma_sgd", size).group_size for size in (2, 4, 6, 8, 16, 64)}
    assert sizes == {2: 2, 4: 2, 6: 6, 8: 4, 16: 4, 64: 8}
    assert policy("wagma_sgd").process_sets == ((0, 1), (2, 3), (0, 2), (1, 3))
    assert policy("wagma_sgd", 6).process_sets == (), "all ranks have a set anyway"


def test_daso_goes_by_hosts() -> None:
    by_host = policy("daso", 6, 2)
    assert by_host.partitions == (((0, 1), (2, 3), (4, 5)), ((0, 2, 4), (1, 3, 5))) and by_host.hosts == 3
    alone = policy("daso", 4)
    assert alone.group_size == 1 and alone.process_sets == (), "on one host each rank is one"
    for fits in (by_host, alone, policy("daso", 4, algorithm__group_size=2)):
        fits.check()


def test_helpers_of_a_host_are_not_of_its_group() -> None:
    """Two hosts of two ranks that train, and a helper on the second."""
    facts = tuple(RankFacts(rank, f"h{min(rank // 2, 1)}", rank, (), "cpu", (0,)) for rank in range(5))
    aide = DeviceClass("aide", "cpu", (4,), role="evaluate")
    cluster = Cluster((DeviceClass("every", "cpu", (0, 1, 2, 3)),), facts, helpers=(aide,))
    this: Any = algorithms.policy(load((), {"algorithm.name": "daso"}, algorithms.method), cluster, 1000)
    this.check()
    assert this.group_size == this.hosts == 2


def test_decentlam_goes_from_neighbour_to_neighbour_where_it_can() -> None:
    assert [len(p) for p in policy("decentlam", 8).partitions] == [4, 4, 4]
    assert policy("decentlam", 6).partitions == (((0, 1, 2, 3, 4, 5),),)


@pytest.mark.parametrize(("name", "size", "per_host", "settings", "says"), [
    ("wagma_sgd", 4, 4, {"algorithm__group_size": 3}, "algorithm.group_size=3: does not divide the 4 ranks"),
    ("wagma_sgd", 6, 6, {"algorithm__group_size": 2}, "there are 6; start 4 or 8 ranks, or set algorithm.group_size=6"),
    ("wagma_sgd", 64, 64, {"algorithm__group_size": 2}, "makes 192 groups, each a process set of Horovod's, and 100"),
    ("wagma_sgd", 1, 1, {}, "one rank has nobody to average with; start more ranks, or choose sync_sgd"),
    ("wagma_sgd", 4, 4, {"aggregation__outer_lr": 0.5}, "averages models in groups, by rules of its own"),
    ("wagma_sgd", 4, 4, {"aggregation__wire": "int8"}, "leave it at float32"),
    ("wagma_sgd", 4, 4, {"algorithm__mode": "papr"}, "did you mean 'paper'"),
    ("daso", 4, 4, {"algorithm__group_size": 3}, "does not divide the 4 ranks"),
    ("daso", 4, 4, {"algorithm__group_size": 4}, "has no other one to average with; set less, or choose sync_sgd"),
    ("daso", 6, 3, {"algorithm__group_size": 2}, "ranks 2, 3 are not on one host"),
    ("daso", 4, [3, 1], {}, "the hosts have different numbers of ranks"),
    ("daso", 4, 4, {"train__epochs": None, "train__max_samples": 9}, "nobody knows which epochs are the last ones"),
    ("decentlam", 6, 6, {"algorithm__topology": "one_peer_exponential"}, "start 4 or 8 ranks, or set complete"),
    ("decentlam", 4, 4, {"train__optimizer": "AdamW", "train__optimizer_args": {}}, "set SGD, or take sync_sgd"),
    ("decentlam", 4, 4, {"train__optimizer_args": {"momentum": 0.9, "nesterov": True}}, "leave nesterov out"),
])  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line(
    name: str, size: int, per_host: Any, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        policy(name, size, per_host, **settings).check()
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [WAGMASGD, DASO, DecentLaM])
def test_every_rank_takes_every_step_and_counts_the_same(kind: Any) -> None:
    name = next(name for name in algorithms.REGISTRY if algorithms.get(name) is kind)
    config = load((), {"algorithm.name": name, "train.batch_size": {"fast": 20, "slow": 5}}, algorithms.method)
    plan = algorithms.policy(config, of(TWO), 1000).make_plan(None)
    assert [(c.tau, c.batch_size, c.weight) for c in plan.classes] == [(1, 20, 0.2), (1, 5, 0.2)]
    assert plan.rounds == 1000 // 55


@pytest.mark.parametrize(("sent", "own", "found"), [(1.0, 5.0, 3.0), (1.0, math.nan, 1.0), (None, math.nan, math.nan)])
def test_a_model_that_is_not_finite_takes_the_hosts_and_is_told_of_where_none_is(
    sent: float | None, own: float, found: float
) -> None:
    """One host's models have travelled for a batch: weights 2 and 2, of two good ones."""
    made, written, recorded = DASOExecutor(policy("daso")), list[torch.Tensor](), list[bool]()
    comm: Any = SimpleNamespace(timed=nullcontext, broadcast=lambda tensor, *args: tensor,
                                excluded=SimpleNamespace(record=lambda: recorded.append(True)))  # fmt: skip
    worker: Any = SimpleNamespace(optimizer=SimpleNamespace(state={"momentum": own}))
    made.comm, made.worker, made._host, made._is_apart = comm, worker, (0,), False
    made.flat_model, made.write = lambda: torch.tensor([own]), written.append  # type: ignore[method-assign]
    total = torch.tensor([0.0, 0.0, 2.0, 0.0] if sent is None else [2 * sent, 2.0, 0.0, 0.0])
    made._flight = Flight(0, 1, 0, total, lambda: None)
    made._receive(1)
    assert torch.equal(written[0].nan_to_num(-1), torch.tensor([found]).nan_to_num(-1))
    assert recorded == [True] * math.isnan(own) and bool(worker.optimizer.state) == (not recorded)


# ---- DASO's cadence -------------------------------------------------------------------------------------------------


def cadences(losses: Sequence[float], **settings: Any) -> list[tuple[int, int, int]]:
    """Return gs, ls and btw, epoch by epoch, where each ends with such a loss."""
    this, found = policy("daso", train__epochs=len(losses), **settings), []
    this.start(this.make_plan(None))
    for loss in losses:
        found.append((this.cadence.skips, this.cadence.local_skips, this.cadence.wait))
        state, this.loss = this.state_dict(), loss
        again = policy("daso", train__epochs=len(losses), **settings)
        again.start(again.make_plan(None))
        again.load_state_dict(state)
        assert again.cadence == this.cadence, "resumed"
        this.replan([])
    return found


def test_averages_become_more_frequent_where_the_loss_is_stuck_and_then_rare_again() -> None:
    """After the first apart epoch, whose loss is the best, each third one without progress changes the cadence."""
    found = cadences([1.0] * 20, algorithm__warmup_epochs=2, algorithm__cooldown_epochs=3)
    blocking, apart = (0, 1, 0), [(4, 1, 1)] * 4 + [(2, 1, 1)] * 3 + [(1, 1, 1)] * 3 + [(8, 2, 2)] * 3 + [(4, 1, 1)] * 2
    assert found == [blocking] * 2 + apart + [blocking] * 3


def test_a_loss_that_falls_leaves_the_cadence_alone() -> None:
    falling = [0.9**i for i in range(12)]
    assert set(cadences(falling, algorithm__warmup_epochs=1, algorithm__cooldown_epochs=1)[1:-1]) == {(4, 1, 1)}
    slowly = [0.97**i for i in range(12)]  # below 0.95 of the best every second epoch, which starts the count anew
    assert set(cadences(slowly, algorithm__warmup_epochs=1, algorithm__cooldown_epochs=1)[1:-1]) == {(4, 1, 1)}


def test_small_limits() -> None:
    assert cadences([1.0] * 3, algorithm__warmup_epochs=0, algorithm__cooldown_epochs=0,
                    algorithm__max_global_skips=1) == [(1, 1, 1)] * 3  # fmt: skip
    assert Cadence(1, 1, 1).next(1) == Cadence(1, 1, 1)


def test_what_travels_when() -> None:
    """Ten batches: models are sent every fourth one, and arrive in the next; the last average is waited for."""
    assert [Cadence(4, 1, 1).delay(b, 9) for b in range(10)] == [1, None, None, None, 1, None, None, None, 1, 0]
    together = [Cadence(8, 2, 2).averages_gradients(b, 6) for b in range(7)]
    assert together == [False, True, False, True, False, True, True]
    assert [Cadence(0).delay(b, 2) for b in range(3)] == [0, 0, 0], "blocking"
