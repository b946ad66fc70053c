"""The server's model in one process: its steps are the optimizer's, and it goes on from a checkpoint as if it had not
stopped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_helpers import ONE, TWINS, method
from torch import Tensor, nn

from hvd_hetero.algorithms.asgd import ASGDRule
from hvd_hetero.algorithms.async_diloco import DelayedNesterov
from hvd_hetero.algorithms.malenia_sgd import MaleniaRule
from hvd_hetero.algorithms.rennala_sgd import RennalaRule
from hvd_hetero.algorithms.ringleader_asgd import RingleaderRule
from hvd_hetero.algorithms.server_rule import Rule
from hvd_hetero.checkpoint.encoding import join, split
from hvd_hetero.comm.nonfinite import Exclusions
from hvd_hetero.worker.factories import optimizer_maker, per_sample_loss
from hvd_hetero.worker.worker import Worker

pytestmark = pytest.mark.horovod

RULES: dict[str, Callable[[], Rule]] = {
    "asgd": lambda: ASGDRule(2, True), "rennala": lambda: RennalaRule(2, 3), "malenia": lambda: MaleniaRule(2),
    "ringleader": lambda: RingleaderRule(2), "diloco": lambda: DelayedNesterov(2, 0.7, 0.9, 3),
}
ORDER = (0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1)


def worker(kind: str = "SGD", **args: Any) -> Worker:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    loss = per_sample_loss("cross_entropy", {})
    return Worker(net, loss, optimizer_maker(kind, 0.1, args), None, clip_norm=0.5)


def served(made: Worker, rule: Rule) -> Any:
    from hvd_hetero.algorithms.execution.server import ServedModel  # needs Horovod

    return ServedModel(made, rule)


def pushes(count: int) -> list[Tensor]:
    size = worker().state.parameters()[0].numel()
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for _ in range(count)]


def test_a_schedule_of_momentum_is_followed() -> None:
    """OneCycleLR has one: all options of rank 0's groups hold for the server's, not the rate alone."""
    made, other = (worker("SGD", momentum=0.9) for _ in range(2))
    server, gradients = served(made, ASGDRule(2)), other.flat_gradients()
    for number, push in enumerate(pushes(4)):
        for one in (made, other):
            one.optimizer.param_groups[0]["momentum"] = 0.9 - 0.2 * number
        gradients[0].copy_(push)
        other.apply()
        server.arrive(0, push)
        assert torch.equal(server.give(0), other.state.parameters()[0])


@pytest.mark.parametrize(("kind", "args"), [("SGD", {"momentum": 0.9, "weight_decay": 0.01}), ("AdamW", {}),
                                            ("Adagrad", {"initial_accumulator_value": 0.1})])
def test_a_step_is_that_of_the_optimizer_with_the_rate_of_rank_0(kind: str, args: dict[str, Any]) -> None:
    made, other = worker(kind, **args), worker(kind, **args)
    server, gradients = served(made, ASGDRule(2)), other.flat_gradients()
    before = copy.deepcopy(made.model.state_dict())
    for number, push in enumerate(pushes(4)):
        for one in (made, other):
            one.scale_rate(1 - number / 8)
        gradients[0].copy_(push)
        other.apply()
        assert server.arrive(number % 2, push) == (0 if number == 0 else 1, True)
        model = server.give(number % 2)
        assert model is not None and torch.equal(model, other.state.parameters()[0])
    assert server.give(1) is None, "it has that one"
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, before[name]), "rank 0's own is another one"


@pytest.mark.parametrize("name", RULES)
def test_a_checkpoint_holds_all_of_it(name: str) -> None:
    """Stopped after each push, saved as files are, and taken up by a new server."""
    every = pushes(len(ORDER))
    whole = served(worker(momentum=0.9), RULES[name]())
    for rank, push in zip(ORDER, every, strict=True):
        whole.arrive(rank, push.clone())
    made = worker(momentum=0.9)
    parts = served(made, RULES[name]())
    for rank, push in zip(ORDER, every, strict=True):
        parts.arrive(rank, push.clone())
        tensors, plain = split(parts.state_dict())
        model = parts._vectors[0].clone()
        made = worker(momentum=0.9)
        parts = served(made, RULES[name]())
        parts._vectors[0].copy_(model)  # where all ranks meet, each of them has it
        parts.load_state_dict(join({key: t.clone() for key, t in tensors.items()}, json.loads(json.dumps(plain))))
    assert parts.version == whole.version > 0 and parts.rule.made_at == whole.rule.made_at
    assert torch.equal(parts._vectors[0], whole._vectors[0])


@pytest.mark.parametrize(("args", "rate", "is_kept"), [
    ({"momentum": 0.9}, 0.1, True), ({"momentum": 0.9}, 0.01, True), ({"momentum": 0.5}, 0.1, False),
])  # fmt: skip
def test_other_ranks_go_on_with_the_momentum_of_the_server(args: dict[str, Any], rate: float, is_kept: bool) -> None:
    """Of two ranks, then of three; a rate that has been lowered is the new one's."""
    before = served(worker(momentum=0.9), ASGDRule(2))
    for rank, push in zip(ORDER, pushes(3), strict=False):
        before.arrive(rank, push)
    torch.manual_seed(3)
    other = worker("SGD", **args)
    other.scale_rate(rate / 0.1)
    after = served(other, ASGDRule(3))
    after.carry_over(before.state_dict())
    assert after.version == 0 and after.rule.size == 3
    found = [after._optimizer.state[p].get("momentum_buffer") for p in after._params]
    for own, p in zip(found, before._params, strict=True):
        kept = before._optimizer.state[p]["momentum_buffer"]
        assert torch.equal(own, kept) if is_kept else own is None
    after.arrive(2, pushes(1)[0])
    assert after._optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_other_ranks_go_on_with_the_momentum_of_the_rule() -> None:
    before = served(worker(), DelayedNesterov(2, 0.7, 0.9, 2))
    for rank, push in zip(ORDER, pushes(3), strict=False):
        before.arrive(rank, push)
    after = served(worker(), DelayedNesterov(3, 0.7, 0.9, 3))
    after.carry_over(before.state_dict())
    assert torch.equal(after.rule.velocity, before.rule.velocity) and after.rule.version == 0
    plain = served(worker(), ASGDRule(3))
    plain.carry_over(before.state_dict())
    assert plain.rule.velocity is None, "without momentum it takes none over"


def test_groups_of_parameters_are_those_of_the_worker() -> None:
    """They are told apart by what they are, which the copies are not."""
    torch.manual_seed(3)
    net = nn.Linear(5, 3)

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [p], "lr": 0.1 if p is net.weight else 0.0} for p in params])

    server = served(Worker(net, per_sample_loss("cross_entropy", {}), make, None), ASGDRule(1))
    before = [p.clone() for p in server._params]
    server.arrive(0, torch.ones(server._vectors[0].numel()))
    assert [torch.equal(p, old) for p, old in zip(server._params, before, strict=True)] == [False, True]


def test_whoever_finishes_is_given_the_model_unless_it_has_it() -> None:
    server = served(worker(), ASGDRule(3))
    server.arrive(1, pushes(1)[0])
    assert server.give(1) is not None
    server.finish()
    assert [server.give(rank) is None for rank in range(3)] == [False, True, False]


def test_a_rank_that_begins_late_computes_on_the_model_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have pushed by then: the server counts its gradient's delay from the model that comes with samples."""
    from hvd_hetero.algorithms.execution import server

    made = worker()
    whole, later = made.state.parameters()[0], torch.full_like(made.state.parameters()[0], 0.25)
    answers = [server.Answer(3, 0, 0, False, False, later), server.Answer(4, 8, 0, True, False, None)]
    computed_on = []

    def exchange(vector: Tensor | None, claim: int) -> Any:
        if vector is not None:
            computed_on.append(whole.clone())
        return answers.pop(0)

    link = SimpleNamespace(first=0, exchange=exchange, finish=lambda: server.Answer(4, 0, 0, False, False, None))
    monkeypatch.setattr(server, "ModelLink", lambda *args, **options: link)
    policy: Any = method({"algorithm.name": "asgd", "train.batch_size": 4}, TWINS)
    comm: Any = SimpleNamespace(rank=1, size=2, excluded=Exclusions(1, False))
    executor = server.ServerExecutor(policy)
    executor.start(policy.make_plan(None), made, comm)
    batch, numbers = (torch.randn(4, 5), torch.arange(4) % 3), list[int]()
    segment: Any = SimpleNamespace(
        claim=lambda start, size: iter([batch]) if start == 0 else None, start_round=numbers.append,
        record=lambda steps, number: None, finish_round=lambda: None, is_stopping=lambda: False,
    )
    executor.run_segment(segment)
    assert torch.equal(computed_on[0], later) and numbers == [3] and segment.averages == 4


@pytest.mark.parametrize(("name", "units"), [("async_diloco", [(0, 1)]), ("malenia_sgd", [(0,), (1,)]),
                                             ("ringleader_asgd", [(0,), (1,)])])
def test_an_epoch_ends_when_the_model_would_stand_still(
    monkeypatch: pytest.MonkeyPatch, name: str, units: list[tuple[int, ...]]
) -> None:
    """With the first rank that is done, where each step takes all ranks; else with the first class."""
    from hvd_hetero.algorithms.execution import server

    found: list[Any] = []
    monkeypatch.setattr(server, "ModelLink", lambda *args, **options: found.append(args[3]) or SimpleNamespace(first=0))
    policy: Any = method({"algorithm.name": name, "train.batch_size": 4, "train.tau": {"every": 2}}, ONE)
    executor, comm = server.ServerExecutor(policy), SimpleNamespace(rank=1, size=2)
    executor.start(policy.make_plan(None), worker(), comm)  # type: ignore[arg-type]
    assert found == [units]
