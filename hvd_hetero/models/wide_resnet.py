"""Wide residual networks: Zagoruyko and Komodakis, *Wide Residual Networks* (2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hvd_hetero.errors import ConfigError
from hvd_hetero.models.checks import positive
from hvd_hetero.models.layers import ChannelsLast, GlobalAverage, conv


def wide_resnet(depth: int = 28, widen: int = 10, in_channels: int = 3, num_classes: int = 10,
                dropout: float = 0.0, stem: str = "small") -> nn.Module:
    """WRN-depth-widen: three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times ``widen`` channels.

    WRN-28-10 has 36.5 M parameters, WRN-16-8 11.0 M.

    Args:
        depth: convolutions on the longest path; 6 n + 4.
        widen: channels relative to the narrow network.
        in_channels: 3 for colour.
        num_classes: logits per sample.
        dropout: probability, between the two convolutions of each block.
        stem: ``small`` keeps the size of images of 32 pixels, as published; ``large`` reduces images of 224
            pixels to a quarter first, as ResNets for ImageNet do: 7x7 convolution and 3x3 maximum, stride 2.

    Raises:
        ConfigError: no such depth, or another stem.
    """
    positive(widen=widen, in_channels=in_channels, num_classes=num_classes)
    if depth < 10 or depth % 6 != 4:
        raise ConfigError("model.args.depth", depth, "is not 6 n + 4", "give 10, 16, 22, 28, 34 or 40")
    if not 0 <= dropout < 1:
        raise ConfigError("model.args.dropout", dropout, "is not a probability", "give a number in [0, 1)")
    if stem not in ("small", "large"):
        raise ConfigError("model.args.stem", stem, "unknown stem", "give 'small' or 'large'")
    if stem == "small":
        layers: list[nn.Module] = [conv(in_channels, 16, 3), ChannelsLast()]
    else:
        layers = [conv(in_channels, 16, 7, stride=2), ChannelsLast(), nn.MaxPool2d(3, stride=2, padding=1)]
    channels = 16
    for stage, stage_channels in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for block in range((depth - 4) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(WideBlock(channels, stage_channels, stride, dropout))
            channels = stage_channels
    layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), GlobalAverage()]
    return nn.Sequential(*layers, nn.Linear(channels, num_classes))


class WideBlock(nn.Module):
    """Normalization and ReLU before each of two convolutions; a 1x1 convolution where shapes change."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.bn1 = nn.BatchNorm2d(fan_in)
        self.conv1 = conv(fan_in, fan_out, 3, stride)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.conv2 = conv(fan_out, fan_out, 3)
        self.shortcut = conv(fan_in, fan_out, 1, stride) if stride > 1 or fan_in != fan_out else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        # Where the shapes differ the shortcut starts from the activated input, as in the authors' code.
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.bn2(self.conv1(out)), inplace=True)
        if self.dropout:
            out = F.dropout(out, self.dropout, self.training)
        return self.conv2(out) + shortcut
