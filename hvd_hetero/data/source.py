"""Sources: where the batches of one split come from, given the indices of their samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hvd_hetero.config.instantiate import cause
from hvd_hetero.data.batch import Batch, pinned, sample_counts, split_target, to_device
from hvd_hetero.data.collate import collate as default_collate
from hvd_hetero.describe import describe
from hvd_hetero.errors import ConfigError, Unquoted, shortened
from hvd_hetero.random_state import seeded

Tensors = Tensor | tuple["Tensors", ...] | Mapping[str, "Tensors"]
"""Tensors ``[N, ...]`` of so many samples, as a model or a loss takes them."""
Indices = np.ndarray | Tensor
Transform = Callable[[Any, torch.Generator], Any]


class Source(Protocol):
    """One split of a dataset."""

    def __len__(self) -> int:
        """Number of samples."""

    def to(self, device: torch.device | str) -> Source:
        """Return a source whose batches lie on ``device``; data that sits in memory moves there."""

    def batches(self, indices: Indices, generator: torch.Generator, start: int = 0) -> Iterator[Batch]:
        """Yield one batch, (inputs, targets), for each row of ``indices`` ``[steps, B]``.

        Args:
            indices: which samples; integers.
            generator: lives on the source's device and decides all augmentation: the same state gives the
                same batches.
            start: the first row to be yielded. What is drawn for all rows at once, and before this returns, is the
                same as with 0.
        """


def read(source: Source, indices: Indices, generator: torch.Generator, start: int = 0, *,
         split: str = "training") -> Iterator[Batch]:
    """Yield a source's batches, as :meth:`Source.batches` does, and make sure that they hold what was asked for.

    Args:
        split: its name, for messages.

    Raises:
        ConfigError: a batch is of another number of samples than its row, is no batch, or does not come.
    """
    batches = source.batches(indices, generator, *([start] if start else []))  # a user's own may know of no start
    if type(source) is TensorSource:  # which selects rows: to look at each batch costs a tiny model 2 % of its steps
        return batches
    return _checked(iter(batches), indices[start:], split)


def _checked(batches: Iterator[Batch], rows: Indices, split: str) -> Iterator[Batch]:
    for number, row in enumerate(rows):
        batch = next(batches, None)
        if batch is None:
            problem = f"{len(rows)} were asked for"
            raise ConfigError(f"{split} data", Unquoted(f"{number} batches"), problem, "yield a batch for every row")
        if not isinstance(batch, tuple) or len(batch) != 2:
            raise ConfigError(f"{split} data", Unquoted(describe(batch)), "no batch", "yield (inputs, targets)")
        counts = sample_counts(batch[1])
        # the boxes of all images, one after the other, are more targets than samples
        has_more = min(counts, default=0) > len(row) and len(row) in sample_counts(batch[0])
        if counts and len(row) not in counts and not has_more:
            found = f"{' or '.join(map(str, sorted(counts)))} targets"
            problem = f"they came back for the batch of the {len(row)} samples {row.tolist()}"
            remedy = "return each sample that is asked for, once; leave those that cannot be read out of the dataset"
            raise ConfigError(f"{split} data", Unquoted(found), problem, remedy)
        yield batch


class TensorSource:
    """Samples that sit in memory: a batch is one ``index_select`` and one transform of the whole batch.

    Args:
        inputs: tensor ``[N, ...]``, or a tuple or dict of them.
        targets: likewise.
        transform: ``transform(batch, generator) -> batch``, applied to the selected inputs on the device of the
            batches; one that holds tensors has a method ``to(device)`` that returns it moved.
        device: where the batches go; None: they stay where the samples are.

    Raises:
        ConfigError: inputs and targets differ in length.
    """

    def __init__(self, inputs: Tensors, targets: Tensors, transform: Transform | None = None,
                 device: torch.device | str | None = None) -> None:
        parts = [*_tensors(targets), *_tensors(inputs)]
        self._first = parts[0]
        for part in parts:
            if not part.dim():
                raise ConfigError("data", Unquoted(describe(part)), "is no tensor of samples", "give tensors [N, ...]")
            if len(part) != len(self._first):
                problem = f"{len(part)} inputs but {len(self._first)} targets"
                raise ConfigError("data", Unquoted(describe(part)), problem, "give one target for each sample")
        self.inputs, self.targets, self.transform, self._device = inputs, targets, transform, device

    def __len__(self) -> int:
        return len(self._first)

    @property
    def nbytes(self) -> int:
        """The bytes of all samples."""
        return sum(tensor.nbytes for tensor in (*_tensors(self.inputs), *_tensors(self.targets)))

    def to(self, device: torch.device | str) -> TensorSource:
        """Return the same samples on ``device``."""
        return TensorSource(to_device(self.inputs, device), to_device(self.targets, device), self._transform_on(device))

    def fed_to(self, device: torch.device | str) -> TensorSource:
        """Return the same samples where they are, whose batches go to ``device`` one by one."""
        return TensorSource(self.inputs, self.targets, self._transform_on(device), device)

    def _transform_on(self, device: torch.device | str) -> Transform | None:
        move = getattr(self.transform, "to", None)
        return move(device) if move else self.transform

    def batches(self, indices: Indices, generator: torch.Generator, start: int = 0) -> Iterator[Batch]:
        """Yield one batch for each row of ``indices`` ``[steps, B]``."""
        # The whole plan moves at once: a step of a tiny model takes less time than a transfer to a GPU.
        for row in torch.as_tensor(indices, dtype=torch.int64, device=self._first.device)[start:].unbind(0):
            inputs, targets = _select(self.inputs, row), _select(self.targets, row)
            if self._device is not None:
                inputs, targets = self._fed(inputs), self._fed(targets)
            if self.transform is not None:
                inputs = self.transform(inputs, generator)
            yield inputs, targets

    def _fed(self, part: Any) -> Any:
        assert self._device is not None
        return to_device(part if torch.device(self._device).type == "cpu" else pinned(part), self._device)


def _tensors(value: Tensors) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value
    return [tensor for part in parts for tensor in _tensors(part)]


def _select(value: Tensors, row: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, row)
    if isinstance(value, Mapping):
        return {name: _select(part, row) for name, part in value.items()}
    return tuple(_select(part, row) for part in value)


class MapSource:
    """Samples of any map-style dataset, read by a ``DataLoader`` in the order of the index rows.

    What items may be made of, :func:`~hvd_hetero.data.collate.collate` tells, and what of them is the target,
    :func:`~hvd_hetero.data.batch.split_target`: the last part of a tuple, ``labels`` or ``label`` of a dict. Randomness
    inside the dataset (of torch, numpy or Python) is seeded
    anew for each batch from the generator, so that batches do not depend on the number of workers.

    A call of ``batches`` ends the iteration that an earlier call began: it owns the workers, which live on
    from call to call.

    Args:
        dataset: has ``__len__`` and ``__getitem__``.
        workers: worker processes that read ahead, in order; 0 reads in the calling process.
        collate: makes a batch of a list of items, of as many samples; as ``collate`` does otherwise.
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
        for found in self._loader:
            if isinstance(found, _Failure):
                raise ConfigError(found.key, Unquoted(found.value), found.problem, found.remedy)
            inputs = to_device(found.inputs, self.device)
            if self.transform is not None:
                inputs = self.transform(inputs, generator)
            yield inputs, to_device(found.targets, self.device)


@dataclass(frozen=True)
class _Read:
    """A batch on its way out of a worker."""

    inputs: Any
    targets: Any

    def pin_memory(self) -> _Read:
        """Called by the loader, which by itself would make lists of tuples."""
        return _Read(pinned(self.inputs), pinned(self.targets))


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

    def __getitem__(self, batch: tuple[int, list[int]]) -> _Read | _Failure:
        seed, row = batch
        try:
            with seeded(seed):
                read_many = getattr(self.dataset, "__getitems__", None)
                items = read_many(row) if read_many else [self.dataset[i] for i in row]
                return _Read(*split_target(self._batch_of(items)))
        except ConfigError as error:
            problem = f"{error.problem}, in the batch of the samples {shortened(row, 60)}"
            return _Failure(error.key, shortened(error.value), problem, error.remedy)

    def _batch_of(self, items: list[Any]) -> Any:
        try:
            return self.collate(items)
        except ConfigError:
            raise
        except Exception as error:  # of a user's function, which none of these samples is to stop
            problem = f"makes no batch of {describe(items)}: {cause(error)}"
            name = getattr(self.collate, "__qualname__", type(self.collate).__name__)
            raise ConfigError("data collate", Unquoted(name), problem, "correct it, or the dataset") from error
