"""Sources: where the batches of one split come from, given the indices of their samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from hvd_hetero.errors import ConfigError

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Batch = tuple[Inputs, Tensor]
Indices = np.ndarray | Tensor
Transform = Callable[[Any, torch.Generator], Any]


class Source(Protocol):
    """One split of a dataset."""

    def __len__(self) -> int:
        """Number of samples."""

    def to(self, device: torch.device | str) -> Source:
        """Return a source whose batches lie on ``device``; data that sits in memory moves there."""

    def batches(self, indices: Indices, generator: torch.Generator, start: int = 0) -> Iterator[Batch]:
        """Yield one batch for each row of ``indices`` ``[steps, B]``.

        Args:
            indices: which samples; integers.
            generator: lives on the source's device and decides all augmentation: the same state gives the
                same batches.
            start: the first row to be yielded. What is drawn for all rows at once, and before this returns, is the
                same as with 0.
        """


class TensorSource:
    """Samples that sit in memory: a batch is one ``index_select`` and one transform of the whole batch.

    Args:
        inputs: tensor, tuple of tensors or dict of tensors, each ``[N, ...]``.
        targets: ``[N, ...]``.
        transform: ``transform(batch, generator) -> batch``, applied to the selected inputs on their device;
            one that holds tensors has a method ``to(device)`` that returns it moved.

    Raises:
        ConfigError: inputs and targets differ in length.
    """

    def __init__(self, inputs: Inputs, targets: Tensor, transform: Transform | None = None) -> None:
        for part in _parts(inputs):
            if len(part) != len(targets):
                problem = f"{len(part)} inputs but {len(targets)} targets"
                raise ConfigError("data", tuple(part.shape), problem, "give one target for each sample")
        self.inputs, self.targets, self.transform = inputs, targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> TensorSource:
        """Return the same samples on ``device``."""
        move = getattr(self.transform, "to", None)
        transform = move(device) if move else self.transform
        return TensorSource(to_device(self.inputs, device), self.targets.to(device), transform)

    def batches(self, indices: Indices, generator: torch.Generator, start: int = 0) -> Iterator[Batch]:
        """Yield one batch for each row of ``indices`` ``[steps, B]``."""
        inputs, targets, transform = self.inputs, self.targets, self.transform
        # The whole plan moves at once: a step of a tiny model takes less time than a transfer to a GPU.
        for row in torch.as_tensor(indices, dtype=torch.int64, device=targets.device)[start:].unbind(0):
            if isinstance(inputs, Tensor):
                batch: Inputs = inputs.index_select(0, row)
            elif isinstance(inputs, dict):
                batch = {name: part.index_select(0, row) for name, part in inputs.items()}
            else:
                batch = tuple(part.index_select(0, row) for part in inputs)
            if transform is not None:
                batch = transform(batch, generator)
            yield batch, targets.index_select(0, row)


class MapSource:
    """Samples of any map-style dataset, read by a ``DataLoader`` in the order of the index rows.

    An item is a tuple whose last element is the target, or a dict with the target under ``labels`` or
    ``label``; the rest are the inputs. Randomness inside the dataset (of torch, numpy or Python) is seeded
    anew for each batch from the generator, so that batches do not depend on the number of workers.

    A call of ``batches`` ends the iteration that an earlier call began: it owns the workers, which live on
    from call to call.

    Args:
        dataset: has ``__len__`` and ``__getitem__``.
        workers: worker processes that read ahead, in order; 0 reads in the calling process.
        collate: makes a batch of a list of items; torch's default otherwise.
        transform: as for :class:`TensorSource`.
        device: where the batches go.
    """

    def __init__(self, dataset: Any, workers: int = 0, collate: Callable[[list[Any]], Any] | None = None,
                 transform: Transform | None = None, device: torch.device | str = "cpu") -> None:
        self.dataset, self.workers, self.transform = dataset, workers, transform
        self.collate = collate or default_collate
        self.device = torch.device(device)
        self._plan = _BatchPlan()
        self._loader = self._make_loader()

    def _make_loader(self) -> DataLoader[Any]:
        return DataLoader(
            _BatchDataset(self.dataset, self.collate), sampler=self._plan, batch_size=None, num_workers=self.workers,
            persistent_workers=self.workers > 0, pin_memory=self.device.type == "cuda",
            # With a generator of its own the loader leaves torch's global random state alone.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def to(self, device: torch.device | str) -> MapSource:
        """Return a source of the same dataset whose batches go to ``device``."""
        if torch.device(device) == self.device:
            return self
        move = getattr(self.transform, "to", None)
        transform = move(device) if move else self.transform
        self._loader = self._make_loader()  # whose workers begin with its first batch; those of the old one end
        return MapSource(self.dataset, self.workers, self.collate, transform, device)

    def batches(self, indices: Indices, generator: torch.Generator, start: int = 0) -> Iterator[Batch]:
        """Yield one batch for each row of ``indices`` ``[steps, B]``."""
        rows = torch.as_tensor(indices).tolist()
        seeds = torch.randint(2**31, (len(rows),), generator=generator, device=generator.device).tolist()
        return self._read(list(zip(seeds, rows, strict=True))[start:], generator)

    def _read(self, rows: list[tuple[int, list[int]]], generator: torch.Generator) -> Iterator[Batch]:
        self._plan.rows = rows
        for item in self._loader:
            if isinstance(item, _Failure):
                raise ConfigError(item.key, item.value, item.problem, item.remedy)
            inputs, targets = split_target(item)
            inputs = to_device(inputs, self.device)
            if self.transform is not None:
                inputs = self.transform(inputs, generator)
            yield inputs, targets.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class _Failure:
    """A ConfigError on its way out of a worker: the loader would wrap the exception itself in another one."""

    key: str
    value: str
    problem: str
    remedy: str


class _BatchPlan(Sampler[Any]):
    """The sampler of a loader that outlives it: the batches of the current call, as (seed, indices)."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, list[int]]] = []

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class _BatchDataset(Dataset[Any]):
    """Whole batches as items, each read under its own seed."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, batch: tuple[int, list[int]]) -> Any:
        seed, row = batch
        python_state, numpy_state = random.getstate(), np.random.get_state()
        torch_state = torch.get_rng_state()
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            read_many = getattr(self.dataset, "__getitems__", None)
            items = read_many(row) if read_many else [self.dataset[i] for i in row]
            return self.collate(items)
        except ConfigError as error:
            return _Failure(error.key, str(error.value), error.problem, error.remedy)
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_rng_state(torch_state)


def split_target(item: Any) -> Batch:
    """Take a collated item apart into inputs and target.

    Raises:
        ConfigError: it is neither a tuple of at least two nor a dict with ``labels`` or ``label``.
    """
    if isinstance(item, dict):
        for key in ("labels", "label"):
            if key in item:
                return {name: part for name, part in item.items() if name != key}, item[key]
        raise ConfigError("data", sorted(item), "no target in a dict item", "name it 'labels' or 'label'")
    if not isinstance(item, Sequence) or len(item) < 2:
        problem = f"an item is a {type(item).__name__}, not inputs and target"
        raise ConfigError("data", type(item).__name__, problem, "return (input, ..., target) or a dict")
    *inputs, target = item
    if not isinstance(target, Tensor):
        problem = f"the targets of a batch come as a {type(target).__name__}, not as a tensor"
        raise ConfigError("data", type(target).__name__, problem, "return numbers or tensors as targets")
    return (inputs[0] if len(inputs) == 1 else tuple(inputs)), target


def to_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    """Move every tensor of a batch."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, dict):
        return {name: cast(Tensor, to_device(part, device)) for name, part in inputs.items()}
    return tuple(cast(Tensor, to_device(part, device)) for part in inputs)


def _parts(inputs: Inputs) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values() if isinstance(inputs, dict) else inputs)
