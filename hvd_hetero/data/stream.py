"""Streams: samples or batches of a program's own iterable, in the order in which they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, default_collate

from hvd_hetero.data.batch import Batch, to_device
from hvd_hetero.data.collate import collate
from hvd_hetero.data.own import as_source
from hvd_hetero.data.source import Indices, MapSource, Source
from hvd_hetero.errors import ConfigError
from hvd_hetero.random_state import RandomState, seeded

NOTHING = object()


class StreamSource:
    """An iterable of samples, of which batches are made, or a ``DataLoader``, whose batches are taken as they are.

    An index is a place in the stream, counted from its beginning and on over its repetitions: a stream that ends begins
    anew. Places only go up; what is passed over is read and dropped. Where all ranks read the same stream, it draws
    from random numbers of its own (Python's, numpy's, torch's), so that its order is the same on all of them.

    Args:
        stream: the iterable.
        samples: what counts as an epoch.
        batch_size: of the batches in it; None: it has samples.
        seed: of its random numbers; None: it takes the process's.
    """

    def __init__(self, stream: Iterable[Any], samples: int, batch_size: int | None, seed: int | None) -> None:
        self._stream, self._samples, self._seed = stream, samples, seed
        self._collate, self._unit = (collate, 1) if batch_size is None else (next_of, batch_size)
        self._device = torch.device("cpu")
        self._iterator: Iterator[Any] | None = None
        self._random: RandomState | None = None
        self._peeked: deque[Any] = deque()
        self._at = 0

    def __len__(self) -> int:
        return self._samples

    def to(self, device: torch.device | str) -> StreamSource:
        """Let batches go to a device; a stream is at one place only, so that it stays the same object."""
        self._device = torch.device(device)
        return self

    def batches(self, indices: Indices, generator: torch.Generator, start: int = 0) -> Iterator[Batch]:
        """Yield a batch for each row of places ``[steps, B]``, as (batch, None): what of it is the target, nobody says.

        Raises:
            ConfigError: the stream has nothing in it, or nothing any more.
        """
        for row in indices[start:]:
            with self._own_random_numbers():
                while self._at < int(row[0]):
                    self._take()
                items = [self._take() for _ in range(len(row) // self._unit)]
            yield to_device(self._collate(items), self._device), None

    def peek(self, samples: int) -> Any:
        """Return the next batch, which is still there afterwards."""
        return to_device(self._collate(self.peek_items(samples // self._unit)), self._device)

    def peek_items(self, count: int) -> list[Any]:
        """Return the next samples, or batches of a loader, which are still there afterwards."""
        with self._own_random_numbers():
            while len(self._peeked) < count:
                self._peeked.append(self._next())
        return list(self._peeked)[:count]

    def _take(self) -> Any:
        item = self._peeked.popleft() if self._peeked else self._next()
        self._at += self._unit
        return item

    def _next(self) -> Any:
        for _ in range(2):
            self._iterator = iter(self._stream) if self._iterator is None else self._iterator
            if (item := next(self._iterator, NOTHING)) is not NOTHING:
                return item
            self._iterator = None
        remedy = "give an iterable that begins anew each time it is iterated over, with something in it"
        raise ConfigError("train_data", type(self._stream).__name__, f"ends after {self._at} samples", remedy)

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        if self._seed is None:
            yield
            return
        if self._random is None:
            with seeded(self._seed):
                self._random = RandomState.capture()
        before = RandomState.capture()
        self._random.restore()
        try:
            yield
        finally:
            self._random = RandomState.capture()
            before.restore()


class Preview:
    """A stream's next batch over and over, for steps that are only measured."""

    def __init__(self, stream: StreamSource) -> None:
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def to(self, device: torch.device | str) -> Preview:
        return Preview(self._stream.to(device))

    def batches(self, indices: Indices, generator: torch.Generator, start: int = 0) -> Iterator[Batch]:
        return ((self._stream.peek(len(row)), None) for row in indices[start:])


def next_of(items: list[Any]) -> Any:
    """Return the one batch of a loader that a step takes."""
    return items[0]


def dealt_or_stream(
    key: str, data: Any, workers: int, samples: int | None, batch_size: Any, seed: int | None
) -> tuple[Source, int | None]:
    """Make a source of what a program's own loop trains on.

    Of a ``DataLoader`` that reads a map-style dataset in order or shuffled, the dataset is dealt by number, with the
    loader's workers, collate function and batch size. One with an order of its own is a stream of batches, and an
    ``IterableDataset`` a stream of samples; anything else is as for :func:`hvd_hetero.data.own.as_source`.

    Args:
        samples: what counts as an epoch of a stream; None: its length.
        batch_size: ``train.batch_size``, for a loader that does not tell its own.
        seed: see :class:`StreamSource`; None: the stream is this rank's alone.

    Returns:
        The source, and how many samples a batch of a loader has.

    Raises:
        ConfigError: it is none of these, or a stream that does not tell its length.
    """
    if isinstance(data, DataLoader):
        in_order = type(data.sampler) in (RandomSampler, SequentialSampler) and data.batch_size is not None
        if in_order and seed is not None:
            collate = None if data.collate_fn is default_collate else data.collate_fn
            return MapSource(data.dataset, data.num_workers, collate), data.batch_size
        size = data.batch_size or getattr(data.batch_sampler, "batch_size", None) or batch_size
        if not isinstance(size, int):
            problem = "the batches of this loader are of a size that nobody knows"
            raise ConfigError("train.batch_size", size, problem, "set it to one number")
        return StreamSource(data, samples or _length(data) * size, size, seed), size
    if "IterableDataset" in [kind.__name__ for kind in type(data).__mro__]:
        return StreamSource(data, samples or _length(data), None, seed), None
    return as_source(key, data, workers), None


def _length(stream: Any) -> int:
    try:
        return len(stream)
    except TypeError as error:
        remedy = "give Loop(..., samples=N), what counts as an epoch"
        raise ConfigError("samples", None, f"this {type(stream).__name__} tells no length", remedy) from error
