"""Flat vectors: the model's tensors are views of them, through training, loading and saving."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hvd_hetero.checkpoint.export import save_model
from hvd_hetero.checkpoint.tensor_file import to_pieces
from hvd_hetero.comm.flat_params import FlatState, check_state
from hvd_hetero.comm.tensor_slots import overlapping, slots_of
from hvd_hetero.comm.untrained_state import default_policy
from hvd_hetero.errors import ConfigError, UserError


class Mixed(nn.Module):
    """Two dtypes, a frozen and a shared parameter, BatchNorm, integer and boolean buffers, a channels-last weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.convolution = nn.Conv2d(2, 4, 3, bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 4)
        self.shared = nn.Linear(4, 4)
        self.shared.weight = self.first.weight
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("running_offset", torch.randn(2, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor([[3, 4]], dtype=torch.int32))
        self.register_buffer("flag", torch.tensor([True, False]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.convolution(x)).mean(dim=(2, 3))
        return self.shared(self.first(x)) * self.wide.sum().float() + self.frozen.sum()


def flat(model: nn.Module) -> tuple[FlatState, torch.Tensor, torch.Tensor]:
    """The state, and its vectors of single and of double precision."""
    state = FlatState(model)
    single, double = sorted(state.vectors, key=lambda vector: vector.element_size())
    return state, single, double


def singles(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad and p.dtype == torch.float32]


def inside(tensor: torch.Tensor, vector: torch.Tensor) -> bool:
    """Whether a tensor's memory is part of a vector's."""
    start, end = vector.data_ptr(), vector.data_ptr() + vector.numel() * vector.element_size()
    return start <= tensor.data_ptr() and tensor.data_ptr() + tensor.numel() * tensor.element_size() <= end


def test_a_buffer_that_was_looked_at_can_still_get_another_size() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("low", torch.ones(1))
    state = FlatState(model)
    state.untrained.remember()
    assert state.untrained.changed(thorough=True) == []
    list(to_pieces({"low": model.low}))
    model.low.resize_(6).fill_(2.0)
    assert state.untrained.changed() == ["low"]


def test_a_buffer_has_moved_too_where_pytorch_does_not_count_it_as_written() -> None:
    """As through ``.data``, or by the kernels of an observer."""
    model = nn.Linear(2, 2)
    model.register_buffer("low", torch.ones(1, dtype=torch.long))
    untrained = FlatState(model).untrained
    marks = untrained.marks()
    model.low.data.add_(1)
    assert untrained.moved_since(marks) and not untrained.moved_since(untrained.marks())


def test_only_what_ranks_share_and_was_written_to_has_moved() -> None:
    """A look that makes new tensors would take every evaluation of a model with BatchNorm for a change."""
    model = nn.BatchNorm1d(2)
    model.register_buffer("own", torch.zeros(1, dtype=torch.long))
    untrained = FlatState(model, policies={"own": "local"}).untrained
    marks = untrained.marks()
    assert list(marks) == ["num_batches_tracked"] and not untrained.moved_since(marks)
    model.eval()(torch.ones(3, 2))
    model.own.add_(1)
    assert not untrained.moved_since(marks)
    model.train()(torch.ones(3, 2))
    assert untrained.moved_since(marks)
    assert not untrained.moved_since(untrained.marks())
    model.num_batches_tracked = torch.tensor(7)
    assert untrained.moved_since(marks)


def test_values_and_outputs_stay_as_they_were() -> None:
    model, untouched = Mixed(), Mixed()
    FlatState(model)
    for (name, mine), theirs in zip(model.state_dict().items(), untouched.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    x = torch.randn(6, 2, 5, 5)
    assert torch.allclose(model(x), untouched(x), atol=1e-6)


def test_one_vector_a_dtype_with_parameters_first() -> None:
    model = Mixed()
    state, single, double = flat(model)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    count = dict(zip((v.dtype for v in state.vectors), state.params, strict=True))
    first, last = single[: count[torch.float32]], single[count[torch.float32] :]
    assert all(inside(p, first) for p in singles(model))
    assert inside(model.norm.running_mean, last) and inside(model.norm.running_var, last)
    assert inside(model.wide, double[: count[torch.float64]])
    assert inside(model.running_offset, double[count[torch.float64] :])
    held = [*singles(model), model.norm.running_mean, model.norm.running_var]
    assert int((single != 0).sum()) == sum(int((p != 0).sum()) for p in held), "a shared weight is there once"
    assert not inside(model.frozen, single), "frozen parameters are not averaged"


def test_every_tensor_and_gradient_begins_where_a_cache_line_does() -> None:
    """And no two at the same place."""
    model = Mixed()
    state, single, double = flat(model)
    gradients = state.flat_gradients()
    for vector in (single, double, *gradients):
        assert vector.data_ptr() % 64 == 0
    params = [p for p in model.parameters() if p.requires_grad]
    statistics = [model.norm.running_mean, model.norm.running_var, model.running_offset]
    tensors = [*params, *(p.grad for p in params), *statistics]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    assert all(t.data_ptr() % 64 == 0 for t in tensors)


def test_writing_the_vector_writes_the_model_and_the_other_way_round() -> None:
    model = Mixed()
    _, single, _ = flat(model)
    single.fill_(0.5)
    assert all(bool((p == 0.5).all()) for p in singles(model))
    assert bool((model.norm.running_var == 0.5).all())
    with torch.no_grad():
        model.first.weight[1, 2] = 7.0
    assert int((single == 7.0).sum()) == 1


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_training_goes_on_in_the_vector(optimizer: str) -> None:
    """Steps, BatchNorm statistics and a loaded state dict change the vector in place, like an untouched model."""
    model, untouched = Mixed(), Mixed()
    _, single, double = flat(model)
    makers = [getattr(torch.optim, optimizer)([p for p in m.parameters() if p.requires_grad], lr=0.01)
              for m in (model, untouched)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(6, 2, 5, 5, generator=generator)
        for m, steps in zip((model, untouched), makers, strict=True):
            steps.zero_grad(set_to_none=True)
            m(x).square().mean().backward()
            steps.step()
    trained = {name: t for name, t in model.state_dict().items()}
    for name, theirs in untouched.state_dict().items():
        assert torch.allclose(trained[name], theirs, rtol=1e-5, atol=1e-7), name
    parts = [*singles(model), model.norm.running_mean, model.norm.running_var]
    assert all(inside(p, single) for p in parts)
    assert torch.equal(single[single != 0], torch.cat([p.detach()[p != 0] for p in parts])), "and zeros in between"
    model.load_state_dict(Mixed().state_dict())
    assert inside(model.first.weight, single)
    assert torch.equal(double[double != 0], torch.cat([Mixed().wide.detach(), Mixed().running_offset]))


def test_what_no_vector_holds_stays_where_it_is() -> None:
    model = Mixed()
    state = FlatState(model)
    assert sorted(state.untrained.tensors()) == ["flag", "frozen", "norm.num_batches_tracked", "seen"]
    state = FlatState(nn.Linear(2, 1))
    assert not state.untrained.tensors()
    assert [v.numel() for v in state.vectors] == state.params and not state.buffers()


def test_all_tensors_are_the_whole_state() -> None:
    model, other = Mixed(), Mixed()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.copy_(torch.zeros_like(tensor))
    for mine, theirs in zip(FlatState(other).tensors(), FlatState(model).tensors(), strict=True):
        mine.copy_(theirs)
    for (name, mine), theirs in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_saved_model_is_plain_tensors(tmp_path: object) -> None:
    """Each with its own small storage, not the whole flat vector; loadable without trusting the file."""
    model = Mixed()
    FlatState(model)
    path = save_model(tmp_path, model)  # type: ignore[arg-type]
    loaded = torch.load(path, weights_only=True)
    fresh = Mixed()
    fresh.load_state_dict(loaded)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"], "nothing half-written is left"


# ---- what modules do to their tensors -------------------------------------------------------------------------------


def test_what_is_replaced_is_taken_over() -> None:
    model = Mixed()
    state, single, _ = flat(model)
    state.untrained.remember()
    assert not state.refresh()
    kept = model.first.weight
    model.norm.running_mean = torch.full((4,), 3.0)
    model.first.weight.data = torch.full((4, 4), 5.0)
    model.convolution.weight = nn.Parameter(torch.full_like(model.convolution.weight, 7.0))
    model.frozen.data = torch.zeros(5)
    assert state.refresh(), "a frozen parameter has changed for the first time"
    assert model.first.weight is kept and model.shared.weight is kept
    for tensor, value in ((model.norm.running_mean, 3), (kept, 5), (model.convolution.weight, 7)):
        assert inside(tensor, single) and bool((tensor == value).all())


@pytest.mark.parametrize(("change", "says"), [
    (lambda m: setattr(m.norm, "running_mean", torch.zeros(5)), "buffer norm.running_mean was [4] float32 and is [5]"),
    (lambda m: setattr(m.norm, "running_mean", torch.zeros(4).double()), "is [4] float64 now"),
    (lambda m: setattr(m.norm, "running_mean", None), "buffer norm.running_mean was removed"),
    (lambda m: setattr(m.shared, "weight", nn.Parameter(torch.zeros(4, 4))), "shared one tensor with first.weight"),
])
def test_what_cannot_be_taken_over_is_named(change: Callable[[Mixed], None], says: str) -> None:
    model = Mixed()
    state = FlatState(model)
    change(model)
    with pytest.raises(UserError, match=re.escape(says)):
        state.refresh()


def with_buffer(tensor: torch.Tensor) -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("odd", tensor)
    return model


def overlapped() -> nn.Module:
    model = nn.Linear(4, 4)
    model.register_parameter("row", nn.Parameter(model.weight.data[0]))
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(2))


@pytest.mark.parametrize(("make", "policies", "names"), [
    (lambda: with_buffer(torch.eye(3).to_sparse()), {}, ("odd", "sparse")),
    (lambda: with_buffer(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)), {}, ("odd", "quantized")),
    (lambda: with_buffer(torch.ones(2, device="meta")), {}, ("odd", "meta")),
    (lazy, {}, ("0.weight", "not initialized")),
    (overlapped, {}, ("row", "shares a part of its memory with weight")),
    (lambda: nn.Linear(2, 2).to(torch.float8_e4m3fn), {}, ("weight", "float8_e4m3fn")),
    (lambda: with_buffer(torch.arange(3)), {"odd": "average"}, ("aggregation.state.odd", "int64", "no average")),
    (lambda: with_buffer(torch.tensor([True])), {"o*": "sum"}, ("aggregation.state.o*", "bool", "no sum")),
    (lambda: with_buffer(torch.ones(1, dtype=torch.complex64)), {"odd": "max"}, ("complex64", "no max")),
    (lambda: with_buffer(torch.ones(1)), {"old": "root"}, ("aggregation.state.old", "fits no tensor", "odd")),
    (lambda: with_buffer(torch.ones(1)), {"weight": "local"}, ("aggregation.state.weight", "trained")),
])
def test_what_cannot_be_kept_equal_is_refused(
    make: Callable[[], nn.Module], policies: dict[str, str], names: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_state(make(), policies)
    assert all(name in str(caught.value) for name in names), str(caught.value)


def test_what_becomes_of_which_tensor() -> None:
    """Running statistics and frozen parameters are averaged; nothing is known of anything else."""
    model = Mixed()
    model.register_buffer("running_max", torch.zeros(2))
    others = [slot for slot in slots_of(model) if not slot.is_parameter or slot.name == "frozen"]
    assert {slot.name: default_policy(slot) for slot in others} == {
        "running_offset": "average", "seen": "root", "flag": "root", "running_max": "average", "frozen": "average",
        "norm.running_mean": "average", "norm.running_var": "average", "norm.num_batches_tracked": "max",
    }  # fmt: skip


def test_which_tensors_overlap() -> None:
    whole = torch.randn(6, 8)
    assert not overlapping([("left", whole[:, :4]), ("right", whole[:, 4:])]), "columns lie between each other"
    assert not overlapping([("one", whole), ("same", whole)]), "one view"
    assert overlapping([("left", whole[:, :4]), ("turned", whole.t())]) == [("left", "turned")]
    assert not overlapping([("empty", whole[:0]), ("other", torch.empty(0))])


def test_a_module_that_is_replaced_is_followed() -> None:
    """Trained or frozen: the new one's values count, and the optimizer's own parameters go on."""
    model = nn.ModuleDict({"trained": nn.Linear(2, 2), "frozen": nn.Linear(2, 2).requires_grad_(False)})
    state = FlatState(model)
    state.untrained.remember()
    kept = model["trained"].weight
    for name in model:
        model[name] = nn.Linear(2, 2).requires_grad_(name == "trained")
        nn.init.constant_(model[name].weight, 3.0)
    assert state.refresh()
    assert model["trained"].weight is kept and bool((state.vectors[0][:4] == 3).all())
    assert bool((state.untrained.tensors()["frozen.weight"] == 3).all())
    model["trained"] = nn.Linear(2, 2, bias=False)
    with pytest.raises(UserError, match="parameter trained.bias was removed"):
        state.refresh()


def test_what_ranks_have_not_agreed_on_is_known_after_a_resume() -> None:
    """A buffer that was written to after all ranks last met is not what all of them have."""
    model, again = Mixed(), Mixed()
    state = FlatState(model, policies={"seen": "sum"})
    state.untrained.remember()
    model.seen += 5
    model.flag.fill_(True)
    saved = state.copy()
    fresh = FlatState(again, policies={"seen": "sum"})
    fresh.untrained.remember()
    fresh.load_state_dict(saved)
    assert sorted(fresh.untrained.changed(thorough=True)) == ["flag", "seen"]
    assert fresh.untrained.base["seen"].tolist() == [[3, 4]] and again.seen.tolist() == [[8, 9]]


def test_a_frozen_alias_of_a_trained_weight_stays_one() -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = nn.Parameter(model[0].weight.data, requires_grad=False)
    state = FlatState(model)
    state.vectors[0].fill_(2.0)
    assert bool((model[1].weight == 2).all()) and "1.weight" not in state.untrained.tensors()


def test_nothing_is_hashed_twice_that_has_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a frozen weight that two layers share, or a buffer that is each rank's own."""
    frozen = [nn.Linear(3, 3).requires_grad_(False) for _ in range(2)]
    model = nn.ModuleList([*frozen, nn.Linear(1, 1)])
    model[1].weight = model[0].weight
    model.register_buffer("queue", torch.zeros(2))
    state = FlatState(model, policies={"queue": "local"})
    state.untrained.remember()
    state.refresh()
    hashed: list[int] = []
    monkeypatch.setattr("hvd_hetero.comm.untrained_state.digest", lambda tensor: hashed.append(1))
    model.queue += 1
    state.refresh()
    assert not hashed
