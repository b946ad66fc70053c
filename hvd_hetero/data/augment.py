"""Augmentation of whole batches of images, on whatever device they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class ImageTransform(Protocol):
    """What is done to a batch of images; it may hold the next transform."""

    def to(self, device: torch.device | str) -> ImageTransform:
        """Return the same transform on ``device``."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return images ``[B, C, H, W]``; the generator, on their device, decides what is random."""


class Normalize:
    """Turn images ``[B, C, H, W]`` of pixels 0..255 into floats with mean 0 and deviation 1 per channel.

    Args:
        mean: per channel, of pixels between 0 and 1.
        std: likewise.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        deviation = torch.tensor(std).view(-1, 1, 1)
        self.scale = 1 / (255 * deviation)
        self.shift = -torch.tensor(mean).view(-1, 1, 1) / deviation

    def to(self, device: torch.device | str) -> Normalize:
        """Return the same transform on ``device``."""
        moved = Normalize.__new__(Normalize)
        moved.scale, moved.shift = self.scale.to(device), self.shift.to(device)
        return moved

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return float images ``[B, C, H, W]``; the generator is not used."""
        return images.mul(self.scale).add_(self.shift)


class Resize:
    """Scale images to a square, then apply the next transform.

    Args:
        size: height and width of the result.
        then: applied to the scaled images.
    """

    def __init__(self, size: int, then: ImageTransform) -> None:
        self.size, self.then = size, then

    def to(self, device: torch.device | str) -> Resize:
        """Return the same transform on ``device``."""
        return Resize(self.size, self.then.to(device))

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return images ``[B, C, size, size]``."""
        scaled = F.interpolate(images.float(), size=self.size, mode="bilinear", align_corners=False)
        return self.then(scaled, generator)


class CenterCrop:
    """Cut the middle out of images, then apply the next transform.

    Args:
        size: height and width of the result.
        then: applied to the crop.
    """

    def __init__(self, size: int, then: ImageTransform) -> None:
        self.size, self.then = size, then

    def to(self, device: torch.device | str) -> CenterCrop:
        """Return the same transform on ``device``."""
        return CenterCrop(self.size, self.then.to(device))

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return images ``[B, C, size, size]``; the generator is not used."""
        top, left = ((extent - self.size) // 2 for extent in images.shape[-2:])
        return self.then(images[..., top:top + self.size, left:left + self.size], generator)


class RandomCropFlip:
    """Cut a square out of each padded image at random, mirror every second one, then normalize.

    Args:
        size: height and width of the result.
        padding: zeros added on every side first.
        then: applied to the crop.
    """

    def __init__(self, size: int, padding: int, then: ImageTransform) -> None:
        self.size, self.padding, self.then = size, padding, then

    def to(self, device: torch.device | str) -> RandomCropFlip:
        """Return the same transform on ``device``."""
        return RandomCropFlip(self.size, self.padding, self.then.to(device))

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return images ``[B, C, size, size]``."""
        device, size = images.device, self.size
        padded = F.pad(images, (self.padding,) * 4) if self.padding else images
        batch, channels, height, width = padded.shape
        top = torch.randint(height - size + 1, (batch, 1), generator=generator, device=device)
        left = torch.randint(width - size + 1, (batch, 1), generator=generator, device=device)
        mirror = torch.randint(2, (batch, 1), generator=generator, device=device)
        # Crop and flip at once: the flat pixel number of each result pixel, then one gather for all samples.
        line = torch.arange(size, device=device)
        rows = top + line
        columns = left + torch.where(mirror.bool(), line.flip(0), line)
        pixels = (rows * width).unsqueeze(2) + columns.unsqueeze(1)
        pixels = pixels.view(batch, 1, size * size).expand(-1, channels, -1)
        crop = padded.flatten(2).gather(2, pixels).view(batch, channels, size, size)
        return self.then(crop, generator)
