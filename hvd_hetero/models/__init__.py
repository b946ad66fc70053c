"""Models: plain modules that map a batch of inputs to logits ``[B, num_classes]``.

``build`` makes a registered model by name, or the user's own by import path. A new model is one builder
function with typed keyword arguments and one line in ``MODELS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hvd_hetero.config.instantiate import call, choose, import_target
from hvd_hetero.errors import ConfigError
from hvd_hetero.models.resnet import resnet20
from hvd_hetero.models.small import cnn, mlp
from hvd_hetero.models.transformer import distilbert, vit
from hvd_hetero.models.wide_resnet import wide_resnet

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet20": resnet20,
    "wide_resnet": wide_resnet,
    "vit": vit,
    "distilbert": distilbert,
}


def build(name: str | None, target: str | None, args: Mapping[str, Any]) -> nn.Module:
    """Build a model; its initial weights come from torch's global random state.

    Args:
        name: a key of ``MODELS``; not looked at when ``target`` is given.
        target: import path ``package.module:function`` of the user's own builder (a class will do).
        args: keyword arguments of the builder.

    Raises:
        ConfigError: unknown name or argument (the nearest is named), or a builder that returns no module.
    """
    if not target:
        return call("model.args", choose("model.name", name, MODELS), args)
    model = call("model.args", import_target("model.target", target), args)
    if not isinstance(model, nn.Module):
        problem = f"returned {type(model).__name__}, not a module"
        raise ConfigError("model.target", target, problem, "return a torch.nn.Module")
    return model
