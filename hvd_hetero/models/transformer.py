"""Transformers whose weights are published: torchvision's ViT and transformers' DistilBERT."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hvd_hetero.config.instantiate import import_transformers
from hvd_hetero.errors import ConfigError
from hvd_hetero.models.checks import positive
from hvd_hetero.models.weights import load_weights


def vit(image_size: int = 224, patch_size: int = 16, layers: int = 12, heads: int = 12,
        hidden_dim: int = 768, mlp_dim: int = 3072, num_classes: int = 10, dropout: float = 0.0,
        weights: str | None = None) -> nn.Module:
    """torchvision's Vision Transformer (Dosovitskiy et al., 2020); the defaults are ViT-B/16.

    Args:
        image_size: height and width of the images.
        patch_size: height and width of a patch.
        layers: encoder blocks.
        heads: attention heads; they divide ``hidden_dim``.
        hidden_dim: width of a token.
        mlp_dim: width of the perceptron in a block.
        num_classes: logits per sample.
        dropout: probability.
        weights: local file with torchvision's state dict; a head for other classes is left out.

    Raises:
        ConfigError: sizes that do not divide, or weights that do not fit.
    """
    positive(image_size=image_size, patch_size=patch_size, layers=layers, heads=heads, hidden_dim=hidden_dim,
             mlp_dim=mlp_dim, num_classes=num_classes)
    if image_size % patch_size:
        remedy = f"give a divisor of {image_size}"
        raise ConfigError("model.args.patch_size", patch_size, "does not divide image_size", remedy)
    if hidden_dim % heads:
        remedy = f"give a divisor of {hidden_dim}"
        raise ConfigError("model.args.heads", heads, "does not divide hidden_dim", remedy)
    transformer = importlib.import_module("torchvision.models.vision_transformer").VisionTransformer
    model: nn.Module = transformer(
        image_size=image_size, patch_size=patch_size, num_layers=layers, num_heads=heads,
        hidden_dim=hidden_dim, mlp_dim=mlp_dim, num_classes=num_classes, dropout=dropout,
    )
    if weights is not None:
        load_weights(model, Path(weights).expanduser(), head=["heads."])
    return model


def distilbert(num_classes: int = 4, weights: str | None = None, dim: int = 768, layers: int = 6,
               heads: int = 12, hidden_dim: int = 3072, vocab_size: int = 30522, max_length: int = 512,
               dropout: float = 0.1) -> nn.Module:
    """transformers' DistilBERT for classification (Sanh et al., 2019); the defaults are distilbert-base.

    Args:
        num_classes: logits per sample.
        weights: local folder with ``config.json`` (which then gives all sizes but ``num_classes``) and
            ``model.safetensors`` or ``pytorch_model.bin``; the classifier may be absent or for other classes.
        dim: width of a token.
        layers: encoder blocks.
        heads: attention heads; they divide ``dim``.
        hidden_dim: width of the perceptron in a block.
        vocab_size: number of tokens.
        max_length: longest text, in tokens.
        dropout: probability, in the encoder and in its attention.

    Raises:
        ConfigError: the extra ``nlp`` is not installed, files are missing, or weights do not fit.
    """
    positive(num_classes=num_classes, dim=dim, layers=layers, heads=heads, hidden_dim=hidden_dim,
             vocab_size=vocab_size, max_length=max_length)
    if dim % heads:
        raise ConfigError("model.args.heads", heads, "does not divide dim", f"give a divisor of {dim}")
    sizes: dict[str, Any] = {
        "dim": dim, "n_layers": layers, "n_heads": heads, "hidden_dim": hidden_dim, "vocab_size": vocab_size,
        "max_position_embeddings": max_length, "dropout": dropout, "attention_dropout": dropout,
    }
    folder = None if weights is None else Path(weights).expanduser()
    if folder is not None:
        sizes = _published_sizes(folder, sizes)
    transformers = import_transformers("model.name", "distilbert")
    config = transformers.DistilBertConfig(**sizes, num_labels=num_classes)
    model = TextClassifier(transformers.DistilBertForSequenceClassification(config))
    if folder is not None:
        # The head of a model for masked words, as published, has no place here, nor has an old buffer.
        load_weights(model.network, _weights_file(folder), head=["pre_classifier.", "classifier."],
                     ignored=["vocab_", "distilbert.embeddings.position_ids"])
    return model


class TextClassifier(nn.Module):
    """A classifier of the transformers library that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits ``[B, num_classes]``.

        Args:
            input_ids: tokens ``[B, L]``.
            attention_mask: ``[B, L]``, 0 where there is only padding.
        """
        logits: Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def _published_sizes(folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    path = folder / "config.json"
    key = "model.args.weights"
    if not path.is_file():
        problem = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ConfigError(key, str(folder), problem, "give a folder with config.json and the weights")
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
        return {name: published.get(name, default) for name, default in sizes.items()}
    except (ValueError, AttributeError) as error:
        raise ConfigError(key, str(path), f"is not a JSON object: {error}", "fetch the file again") from error


def _weights_file(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    remedy = "put model.safetensors or pytorch_model.bin there"
    raise ConfigError("model.args.weights", str(folder), "holds no weights", remedy)
