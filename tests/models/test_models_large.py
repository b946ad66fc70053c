"""Models of the paper's larger workloads: published sizes, toy sizes, and weights from files."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from hvd_hetero.errors import ConfigError
from hvd_hetero.models import build

TOY_VIT = {"image_size": 8, "patch_size": 4, "layers": 2, "heads": 2, "hidden_dim": 8, "mlp_dim": 16}
TOY_BERT = {"dim": 8, "layers": 2, "heads": 2, "hidden_dim": 16, "vocab_size": 50, "max_length": 6}
needs_nlp = pytest.mark.skipif(find_spec("transformers") is None, reason="the extra nlp is not installed")


@pytest.mark.parametrize(("name", "args", "parameters"), [
    ("wide_resnet", {"depth": 28, "widen": 10}, 36_479_194),  # 36.5 M in the paper's table 4
    ("wide_resnet", {"depth": 16, "widen": 8}, 10_961_370),  # 11.0 M
    ("vit", {"num_classes": 1000}, 86_567_656),  # torchvision's table for vit_b_16
    pytest.param("distilbert", {"num_classes": 2}, 66_955_010, marks=needs_nlp),  # 66 M
])
def test_sizes_of_the_literature(name: str, args: dict, parameters: int) -> None:
    with torch.device("meta"):
        model = build(name, None, args)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("name", "args", "shape"), [
    ("wide_resnet", {"depth": 10, "widen": 1, "dropout": 0.2}, (3, 32, 32)),
    ("wide_resnet", {"depth": 16, "widen": 1, "stem": "large", "num_classes": 5}, (3, 224, 224)),
    ("vit", TOY_VIT, (3, 8, 8)),
])
def test_images_to_logits_with_gradients_everywhere(name: str, args: dict, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build(name, None, args)
    if name == "vit":  # torchvision starts the head at zero, which stops the gradients of the first step
        nn.init.normal_(model.heads.head.weight)
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, args.get("num_classes", 10))
    nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name


def test_large_stem_reduces_to_a_quarter() -> None:
    model = build("wide_resnet", None, {"depth": 10, "widen": 1, "stem": "large"})
    assert model[:3](torch.zeros(1, 3, 224, 224)).shape == (1, 16, 56, 56)


@needs_nlp
def test_distilbert_reads_tokens_under_their_mask() -> None:
    torch.manual_seed(0)
    model = build("distilbert", None, TOY_BERT).eval()
    tokens = torch.randint(0, 50, (3, 6), dtype=torch.int32)
    mask = torch.ones(3, 6, dtype=torch.int32)
    mask[:, 4:] = 0
    logits = model(input_ids=tokens, attention_mask=mask)
    assert logits.shape == (3, 4)
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 50
    assert torch.allclose(model(other, mask), logits, atol=1e-6), "what is masked does not count"
    assert not torch.allclose(model(other), model(tokens), atol=1e-6), "without a mask it does"


def test_missing_extra_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_hetero.config.instantiate.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'hvd-hetero\[nlp\]'"):
        build("distilbert", None, TOY_BERT)


# Weights from files ----------------------------------------------------------------------------------------


def same(a: nn.Module, b: nn.Module, but: str) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        if but not in name:
            assert torch.equal(x, y), name


def test_vit_weights_from_a_file_with_its_head_or_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = build("vit", None, TOY_VIT)
    path = tmp_path / "vit.pth"
    torch.save(published.state_dict(), path)
    same(published, build("vit", None, {**TOY_VIT, "weights": str(path)}), but="nothing")
    other = build("vit", None, {**TOY_VIT, "weights": str(path), "num_classes": 3})
    same(published, other, but="heads.")
    assert other(torch.zeros(1, 3, 8, 8)).shape == (1, 3)


def test_weights_of_another_shape_name_the_first_tensor_that_differs(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    torch.save(build("vit", None, TOY_VIT).state_dict(), path)
    for change, message in [
        ({"hidden_dim": 16}, r"'class_token' has shape \(1, 1, 8\) in .* model's has \(1, 1, 16\)"),
        ({"layers": 3}, "encoder_layer_2.* is not in the file"),
        ({"layers": 1}, "encoder_layer_1.* is in the file but not in the model"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            build("vit", None, {**TOY_VIT, "weights": str(path), **change})
        assert caught.value.key == "model.args.weights" and caught.value.value == str(path)


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "was-run"),)

    path = tmp_path / "weights.pth"
    for content, message in ((Evil(), "cannot be read"), ([1], "not a dict of t"), ({"a": 1}, "not a dict")):
        torch.save(content, path)
        with pytest.raises(ConfigError, match=message):
            build("vit", None, {**TOY_VIT, "weights": str(path)})
    assert not (tmp_path / "was-run").exists()
    path.write_bytes(b"not weights at all")
    with pytest.raises(ConfigError, match="cannot be read"):
        build("vit", None, {**TOY_VIT, "weights": str(path)})
    with pytest.raises(ConfigError, match="no such file"):
        build("vit", None, {**TOY_VIT, "weights": str(tmp_path / "nowhere.pth")})


@needs_nlp
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_distilbert_from_a_folder_as_published(tmp_path: Path, name: str) -> None:
    """A model for masked words: another head, and sizes that come from config.json."""
    published = build("distilbert", None, TOY_BERT)
    state = {k: v for k, v in published.network.state_dict().items() if "classifier" not in k}
    state["vocab_projector.bias"] = torch.zeros(50)
    (tmp_path / "config.json").write_text(json.dumps(published.network.config.to_dict()))
    if name.endswith(".bin"):
        torch.save(state, tmp_path / name)
    else:
        from safetensors.torch import save_file
        save_file(state, tmp_path / name)
    loaded = build("distilbert", None, {"weights": str(tmp_path), "num_classes": 3})
    same(published, loaded, but="classifier")
    assert loaded(torch.zeros(1, 6, dtype=torch.int64)).shape == (1, 3)
    with pytest.raises(ConfigError, match="is not in the file"):
        sizes = {**published.network.config.to_dict(), "n_layers": 3}
        (tmp_path / "config.json").write_text(json.dumps(sizes))
        build("distilbert", None, {"weights": str(tmp_path)})


@needs_nlp
def test_bad_distilbert_folders(tmp_path: Path) -> None:
    for prepare, message in [
        (lambda: None, "has no config.json"),
        (lambda: (tmp_path / "config.json").write_text("{"), "not a JSON object"),
        (lambda: (tmp_path / "config.json").write_text("{}"), "holds no weights"),
    ]:
        prepare()
        with pytest.raises(ConfigError, match=message):
            build("distilbert", None, {**TOY_BERT, "weights": str(tmp_path)})
    with pytest.raises(ConfigError, match="not a folder"):
        build("distilbert", None, {**TOY_BERT, "weights": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(("name", "args", "key"), [
    ("wide_resnet", {"depth": 20}, "depth"),
    ("wide_resnet", {"dropout": 1.0}, "dropout"),
    ("wide_resnet", {"stem": "huge"}, "stem"),
    ("wide_resnet", {"widen": 0}, "widen"),
    ("vit", {"image_size": 65}, "patch_size"),
    ("vit", {"heads": 7}, "heads"),
    ("distilbert", {"heads": 7}, "heads"),
])
def test_sizes_that_cannot_be(name: str, args: dict, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(name, None, args)
    assert caught.value.key == f"model.args.{key}"
