"""The registered models: sizes from the literature, shapes, and the errors of their builders."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hvd_hetero.errors import ConfigError
from hvd_hetero.models import build, layers


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "args", "shape"), [
    ("mlp", {}, (1, 8, 8)),
    ("mlp", {"in_features": 12, "hidden": [], "num_classes": 3}, (12,)),
    ("cnn", {}, (1, 28, 28)),
    ("cnn", {"in_channels": 3, "width": 4, "num_classes": 7}, (3, 32, 32)),
    ("resnet20", {}, (3, 32, 32)),
])
def test_every_parameter_gets_a_finite_gradient(name: str, args: dict, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build(name, None, args)
    logits = model(torch.randn(5, *shape))
    assert logits.shape == (5, args.get("num_classes", 10))
    nn.functional.cross_entropy(logits, torch.arange(5) % logits.shape[1]).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


def test_mlp_size_is_the_sum_of_its_layers() -> None:
    assert count(build("mlp", None, {})) == 64 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10


def test_resnet20_has_the_size_of_the_paper() -> None:
    # Convolutions 432 + 6*2304 + 4608 + 5*9216 + 18432 + 5*36864, batch normalizations 1376, linear 650.
    assert count(build("resnet20", None, {})) == 269_722


def test_resnet20_shortcut_takes_every_second_pixel_and_adds_zero_channels() -> None:
    from hvd_hetero.models.resnet import BasicBlock

    block = BasicBlock(2, 4).eval()
    nn.init.zeros_(block.bn2.weight)  # the residual branch gives zero: what is left is the shortcut
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, 0].any() and not out[:, 3].any()


def test_own_model_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_model_file.py").write_text(
        "from torch import nn\ndef make(size=2):\n    return nn.Linear(size, 3)\nnumber = 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"] + [p for p in sys.path if p])
    assert build(None, "my_model_file:make", {"size": 5}).weight.shape == (3, 5)
    for spec, message in [
        ("my_model_file.make", "not an import path"),
        ("my_model_fil:make", "no module named 'my_model_fil'"),
        ("my_model_file:mak", "did you mean 'make'"),
        ("my_model_file:number", "not callable"),
        ("builtins:dict", "returned dict"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            build(None, spec, {})
        assert caught.value.key == "model.target"
    with pytest.raises(ConfigError, match="did you mean 'size'"):
        build(None, "my_model_file:make", {"sizes": 5})


def test_a_module_that_fails_to_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_model_file.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="install 'a_package_nobody_has'"):
        build(None, "broken_model_file:make", {})


@pytest.mark.parametrize(("name", "args", "key", "message"), [
    ("resnet2", {}, "model.name", "did you mean 'resnet20'"),
    (None, {}, "model.name", "known are "),
    ("mlp", {"hiden": [4]}, "model.args.hiden", "did you mean 'hidden'"),
    ("mlp", {"hidden": 4}, "model.args.hidden", "type int"),
    ("mlp", {"hidden": [4, 0]}, "model.args.hidden[1]", "at least 1"),
    ("cnn", {"width": 0}, "model.args.width", "at least 1"),
    ("cnn", {"width": "wide"}, "model.args.width", "type str"),
])
def test_bad_names_and_arguments(name: str | None, args: dict, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(name, None, args)
    assert caught.value.key == key


def test_channels_last_changes_the_layout_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build("cnn", None, {"width": 4})
    images = torch.rand(2, 1, 28, 28)
    first_layers = model[:2](images)
    assert first_layers.is_contiguous(memory_format=torch.channels_last) and not first_layers.is_contiguous()
    logits = model(images)
    monkeypatch.setattr(layers.ChannelsLast, "forward", lambda self, x: x)
    assert torch.allclose(model(images), logits, atol=1e-5)
