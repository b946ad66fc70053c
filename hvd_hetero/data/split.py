"""A split of a named dataset as it was read, and what can be done to it before it becomes a source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hvd_hetero.data.source import Transform
from hvd_hetero.errors import ConfigError

Decode = Callable[[str], Tensor]


@dataclass(frozen=True)
class Split:
    """Inputs and targets of one split.

    Attributes:
        inputs: a tensor ``[N, ...]``, a dict of them, or an array of file names ``[N]`` to be streamed.
        targets: class numbers ``[N]``, int64.
    """

    inputs: Tensor | dict[str, Tensor] | np.ndarray
    targets: Tensor

    def select(self, indices: np.ndarray) -> Split:
        """Return the samples at ``indices``."""
        rows = torch.from_numpy(indices)
        if isinstance(self.inputs, dict):
            return Split({name: part[rows] for name, part in self.inputs.items()}, self.targets[rows])
        inputs = self.inputs[indices] if isinstance(self.inputs, np.ndarray) else self.inputs[rows]
        return Split(inputs, self.targets[rows])


def joined(splits: Sequence[Split]) -> Split:
    """Return splits one after the other, all of tensors or all of file names."""
    inputs: list[Any] = [split.inputs for split in splits]
    join = np.concatenate if isinstance(inputs[0], np.ndarray) else torch.cat
    return Split(join(inputs), torch.cat([split.targets for split in splits]))


@dataclass(frozen=True)
class Splits:
    """Both splits of a named dataset.

    Attributes:
        train_transform: of a batch, see :class:`~hvd_hetero.data.source.TensorSource`.
        test_transform: likewise.
        decode: makes an image ``[C, H, W]`` of a file name, where the inputs are file names.
    """

    train: Split
    test: Split
    train_transform: Transform | None = None
    test_transform: Transform | None = None
    decode: Decode | None = None


class Files(Dataset[tuple[Tensor, Tensor]]):
    """The samples of a split whose inputs are files."""

    def __init__(self, names: np.ndarray, targets: Tensor, decode: Decode) -> None:
        self.names, self.targets, self.decode = names, targets, decode

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.decode(str(self.names[index])), self.targets[index]


def stratified(targets: np.ndarray, fraction: float,
               rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Part the samples in two so that every class is parted alike.

    Args:
        targets: class numbers ``[N]``.
        fraction: share of each class (rounded) that is held out.
        rng: decides which samples.

    Returns:
        Indices of the kept and of the held-out samples, both ascending.
    """
    held = np.zeros(len(targets), dtype=bool)
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        held[members[: round(fraction * len(members))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def adapt(splits: Splits, seed: int, *, validation: float = 0.0, label_noise: float = 0.0,
          train_limit: int | None = None, test_limit: int | None = None) -> Splits:
    """Apply the arguments that every named dataset takes, in the order in which they are listed.

    Args:
        splits: as read.
        seed: of the validation split and of the label noise.
        validation: share of each training class that is held out and takes the place of the test split.
        label_noise: share of the training targets that are replaced by another class of the dataset.
        train_limit: keep so many training samples, evenly spread over the split.
        test_limit: keep so many test samples, likewise.

    Raises:
        ConfigError: a value out of range, or a split left empty.
    """
    for name, fraction in (("validation", validation), ("label_noise", label_noise)):
        if not 0 <= fraction < 1:
            raise ConfigError(f"data.args.{name}", fraction, "not a share", "give a number in [0, 1)")
    train, test = splits.train, splits.test
    if validation:
        kept, held = stratified(train.targets.numpy(), validation, np.random.default_rng([seed, 1]))
        train, test = train.select(kept), train.select(held)
    if label_noise:
        train = Split(train.inputs, noisy(train.targets, label_noise, np.random.default_rng([seed, 2])))
    train, test = _limit("train_limit", train, train_limit), _limit("test_limit", test, test_limit)
    if not len(train.targets) or not len(test.targets):
        raise ConfigError("data.args.validation", validation, "leaves a split empty", "change the share")
    return replace(splits, train=train, test=test)


def noisy(targets: Tensor, fraction: float, rng: np.random.Generator) -> Tensor:
    """Return targets of which a share (rounded) are replaced by a different class that occurs in them."""
    labels, positions = np.unique(targets.numpy(), return_inverse=True)
    chosen = rng.permutation(len(positions))[: round(fraction * len(positions))]
    if len(labels) > 1:
        shift = rng.integers(1, len(labels), size=len(chosen))
        positions[chosen] = (positions[chosen] + shift) % len(labels)
    return torch.from_numpy(labels[positions])


def _limit(name: str, split: Split, count: int | None) -> Split:
    if count is None:
        return split
    if count < 1:
        raise ConfigError(f"data.args.{name}", count, "must be at least 1", "give a number of samples")
    total = len(split.targets)
    count = min(count, total)
    return split.select(np.arange(count) * total // count)  # some datasets come sorted by class
