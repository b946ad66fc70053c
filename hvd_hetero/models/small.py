"""Small models for small machines: a multi-layer perceptron and a three-stage convolutional network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from hvd_hetero.models.checks import positive
from hvd_hetero.models.layers import ChannelsLast, GlobalAverage, conv


def mlp(in_features: int = 64, hidden: Sequence[int] = (256, 256), num_classes: int = 10) -> nn.Module:
    """Perceptron with ReLU between its layers; flattens its input ``[B, ...]``.

    Args:
        in_features: numbers in one sample.
        hidden: width of each hidden layer; none gives a linear model.
        num_classes: logits per sample.
    """
    positive(in_features=in_features, num_classes=num_classes)
    positive(**{f"hidden[{i}]": width for i, width in enumerate(hidden)})
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise([in_features, *hidden]):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU(inplace=True)]
    layers.append(nn.Linear([in_features, *hidden][-1], num_classes))
    return nn.Sequential(*layers)


def cnn(in_channels: int = 1, width: int = 16, num_classes: int = 10) -> nn.Module:
    """Three convolutions with batch normalization and a global average, for small images of any size.

    Args:
        in_channels: 1 for grey, 3 for colour.
        width: channels of the first stage; the next ones have 2 and 4 times as many.
        num_classes: logits per sample.
    """
    positive(in_channels=in_channels, width=width, num_classes=num_classes)
    return nn.Sequential(
        *_stage(in_channels, width), nn.MaxPool2d(2),
        *_stage(width, 2 * width), nn.MaxPool2d(2),
        *_stage(2 * width, 4 * width), GlobalAverage(),
        nn.Linear(4 * width, num_classes),
    )


def _stage(fan_in: int, fan_out: int) -> tuple[nn.Module, ...]:
    return conv(fan_in, fan_out, 3), ChannelsLast(), nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True)
