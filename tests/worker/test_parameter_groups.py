"""train.groups: which parameters get what; with methods, schedules and resuming: tests/ranks_methods/cases.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hvd_hetero.config.load import load
from hvd_hetero.worker.components import UserObjects, build
from hvd_hetero.worker.parameter_groups import freeze, grouped, options_of

pytestmark = pytest.mark.horovod


class Net(nn.Module):
    """Has an output layer whose weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.head.weight = self.embedding.weight


def groups_of(groups: list[Any], kind: Any = torch.optim.AdamW, **args: Any) -> list[tuple[set[str], dict[str, Any]]]:
    """Return the names and the options of each group that an optimizer has."""
    net = Net()
    options = options_of(net, groups)
    freeze(options)
    optimizer = grouped(lambda params: kind(params, lr=0.1, **args), net, options, groups)(
        [p for p in net.parameters() if p.requires_grad])
    names = {param: name for name, param in net.named_parameters()}
    return [({names[p] for p in group["params"]}, group) for group in optimizer.param_groups]


def test_each_parameter_is_in_one_group_with_what_is_set_for_it() -> None:
    (rest, plain), (small, bare) = groups_of([{"match": "*.bias, norm*", "weight_decay": 0, "betas": [0.5, 0.6]}])
    assert rest == {"embedding.weight"} and plain["weight_decay"] == 0.01
    assert small == {"norm.weight", "norm.bias", "head.bias"}
    assert bare["weight_decay"] == 0 and bare["betas"] == (0.5, 0.6) and bare["lr"] == 0.1


def test_of_several_groups_a_later_one_wins_key_by_key() -> None:
    found = groups_of([{"match": "*", "frozen": True, "lr_scale": 0.5}, {"match": "*.bias", "weight_decay": 3},
                       {"match": "head.*", "frozen": False, "lr_scale": 2.0}])
    assert [names for names, _ in found] == [{"embedding.weight"}, {"head.bias"}], "by its second name, head.weight"
    assert [group["lr"] for _, group in found] == [0.2, 0.2]
    assert [group["weight_decay"] for _, group in found] == [0.01, 3]
    assert all("lr_scale" not in group for _, group in found), "a scheduler of others might apply it again"


def test_copies_of_the_parameters_have_the_same_groups() -> None:
    """The server of asynchronous methods has some."""
    net = Net()
    groups = [{"match": "*.bias", "lr_scale": 0.5}]
    make = grouped(lambda params: torch.optim.SGD(params, lr=0.1), net, options_of(net, groups), groups)
    copies = [nn.Parameter(p.detach().clone()) for p in net.parameters()]
    found = make(copies).param_groups
    assert [[[p.shape for p in group["params"]], group["lr"]] for group in found] == [
        [[(3, 4), (4,)], 0.1], [[(4,), (3,)], 0.05]
    ]  # fmt: skip


def test_a_function_that_asks_for_names_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def make(named_parameters: Any) -> torch.optim.Optimizer:
        asked.append([name for name, _ in named_parameters])
        return torch.optim.SGD([param for _, param in named_parameters], lr=0.1)

    data = (torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64))
    given = UserObjects(model=nn.Linear(4, 3), train_data=data, test_data=data, optimizer=make)
    parts = build(load(None, {"train.groups": [{"match": "bias", "frozen": True}]}), given)
    parts.optimizer([p for p in parts.model.parameters() if p.requires_grad])
    assert asked == [["weight"]]


def test_a_frozen_parameter_is_none_of_the_flat_vectors() -> None:
    data = (torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64))
    given = UserObjects(model=nn.Linear(4, 3), train_data=data, test_data=data)
    parts = build(load(None, {"train.groups": [{"match": "weight", "frozen": True}]}), given)
    assert [name for name, p in parts.model.named_parameters() if p.requires_grad] == ["bias"]
