"""Small models for small machines: a multi-layer perceptron and a three-stage convolutional network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from hvd_hetero.models.checks import positive


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
    # Batch normalization has its own shift, so the convolution needs no bias.
    convolution = nn.Conv2d(fan_in, fan_out, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True)


class GlobalAverage(nn.Module):
    """Mean over the pixels: ``[B, C, H, W]`` to ``[B, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))
