"""ResNets for CIFAR: He et al., *Deep Residual Learning for Image Recognition* (2016), section 4.2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hvd_hetero.models.checks import positive
from hvd_hetero.models.layers import ChannelsLast, GlobalAverage, conv


def resnet20(in_channels: int = 3, num_classes: int = 10) -> nn.Module:
    """ResNet-20: three stages of three basic blocks with 16, 32 and 64 channels, 0.27 M parameters."""
    positive(in_channels=in_channels, num_classes=num_classes)
    blocks_per_stage, channels = 3, 16
    stem = conv(in_channels, channels, 3)
    layers: list[nn.Module] = [stem, ChannelsLast(), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    for stage_channels in (16, 32, 64):
        for _ in range(blocks_per_stage):
            layers.append(BasicBlock(channels, stage_channels))
            channels = stage_channels
    return nn.Sequential(*layers, GlobalAverage(), nn.Linear(channels, num_classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A of the paper).

    Where the channels double, the block halves the image, and the shortcut takes every second pixel and fills
    the new channels with zeros.
    """

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.stride = 1 if fan_in == fan_out else 2
        self.new_channels = fan_out - fan_in
        self.conv1 = conv(fan_in, fan_out, 3, self.stride)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = conv(fan_out, fan_out, 3)
        self.bn2 = nn.BatchNorm2d(fan_out)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.stride == 2:
            before = self.new_channels // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(out.add_(x), inplace=True)
