"""Whether all ranks have read the same data: each reads them by itself, and is dealt its samples by number."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from hvd_hetero.data.batch import entries, split_target
from hvd_hetero.data.source import MapSource, Source, TensorSource
from hvd_hetero.data.stream import StreamSource
from hvd_hetero.errors import ConfigError, Unquoted
from hvd_hetero.random_state import seeded

FEW, MANY, QUICK_SEC = 4, 32, 0.01
"""So many samples of a split are read, and so many of one whose few take no longer than that."""
PIECES_OF_ALL, PIECES_OF_SAMPLE = 64, 4
"""Of a tensor, whose means are compared where numbers need not be the same to the last bit."""
MOST_BYTES, MOST_ITEMS = 2**24, 4096
"""Of targets in memory, and of a list of samples; of more, so many evenly spread over them are looked at."""
DEPTH = 4
"""Of datasets in datasets."""
TOLERANCE = 1e-3
"""Of such means, over the mean magnitude: processors and libraries decode and compute with small differences."""
COARSE = (torch.uint8, torch.int8, torch.int16)
"""Images and sounds, as inputs."""

UNREAD, WEIGHTS = "cannot be read:", "sample weights"

Facts = Mapping[str, Any]
Content = list[Any]
NOTHING: Content = ["", []]
REMEDY = ("every rank has to read the same samples in the same order, as each is dealt its own by number: seed what "
          "shuffles or splits them, sort lists of files, and give each rank all of them")


def facts_of(source: Source, weights: NDArray[Any] | None = None) -> dict[str, Any]:
    """Look at a split: its length, what of it lies in memory, and a few samples, the same on all ranks.

    Args:
        weights: of its samples, if they do not all weigh the same.

    Samples are read twice under one seed. What is not the same both times has randomness of its own, and is not
    compared. Random states are left as they were.

    Returns:
        What :func:`check_alike` compares, fit for JSON.
    """
    if isinstance(source, StreamSource):  # of which nothing is dealt by number
        return {"length": len(source), "kept": {}, "numbers": [], "samples": [], "stable": [False, False]}
    kept = _kept(source)  # before samples are read, of which a dataset may keep something
    if weights is not None:
        kept[WEIGHTS] = _content(weights, PIECES_OF_ALL)
    numbers, reader = _sample_numbers(len(source)), source
    if isinstance(source, MapSource):  # workers that are to live on start when the rank's cores are known
        reader = MapSource(source.dataset, min(source.workers, 1), source.collate, source.transform, source.device)
    with seeded(0):
        first = _contents(reader, numbers[:FEW])
        begin = time.perf_counter()
        again = _contents(reader, numbers[:FEW])
        if time.perf_counter() - begin < QUICK_SEC:
            first, again = (_contents(reader, numbers) for _ in range(2))
    pairs = list(zip(first, again, strict=False))
    stable = [len(first) == len(again) and all(_alike(one[i], other[i]) for one, other in pairs) for i in range(2)]
    return {"length": len(source), "kept": kept, "numbers": numbers, "samples": first, "stable": stable}


def facts_of_arrays(arrays: Mapping[str, Any]) -> dict[str, Content]:
    """Look at tensors and arrays by name; what :func:`check_arrays` compares, fit for JSON."""
    return {name: _content(value, PIECES_OF_ALL) for name, value in arrays.items()}


def check_arrays(facts: Sequence[Mapping[str, Content]], hosts: Sequence[str]) -> None:
    """Make sure that tensors and arrays which all ranks have are the same; both arguments are by rank.

    Raises:
        ConfigError: naming the first one that differs, the rank that has another than rank 0, and its host.
    """
    for rank, other in enumerate(facts):
        for name, content in facts[0].items():
            if name in other and not _alike(content, other[name]):
                problem = f"is another one for rank {rank} on {hosts[rank]} than for rank 0 on {hosts[0]}"
                remedy = "make it a buffer of the model, of which all ranks get rank 0's, or seed what draws it"
                raise ConfigError(name, Unquoted("a tensor that is no buffer"), problem, remedy)


def facts_of_stream(stream: StreamSource) -> dict[str, Any]:
    """Look at what comes first in a stream that all ranks read, as :func:`facts_of` looks at a split."""
    first = [(_content(item, PIECES_OF_SAMPLE, COARSE), NOTHING) for item in stream.peek_items(FEW)]
    return {"length": len(stream), "kept": {}, "numbers": list(range(FEW)), "samples": first, "stable": [True, True]}


def check_alike(facts: Sequence[Mapping[str, Facts]], hosts: Sequence[str]) -> None:
    """Make sure that all ranks have read the same; both arguments are by rank, facts by split.

    Raises:
        ConfigError: naming the first rank that differs from rank 0, its host, the split, and in what.
    """
    for split, first in facts[0].items():
        for rank, other in enumerate(facts):
            what = None if other[split] is first else difference(first, other[split])
            if what is not None:
                here, there = (f"rank {number} on {hosts[number]}" for number in (rank, 0))
                problem = f"{here} has read other ones than {there}"
                if (count := first["length"]) != other[split]["length"]:
                    problem = f"{here} has read so many, {there} {count}"
                raise ConfigError(f"{split} data", Unquoted(what), problem, REMEDY)


def difference(first: Facts, other: Facts) -> str | None:
    """Say what of another split is not as the first has it, ``targets`` for instance; None if all is."""
    if first["length"] != other["length"]:
        return f"{other['length']} samples"
    for name in first["kept"] | other["kept"]:
        if not _alike(first["kept"].get(name, NOTHING), other["kept"].get(name, NOTHING)):
            return name
    for i, name in ((1, "target"), (0, "inputs")):
        if first["stable"][i] and other["stable"][i]:
            for number, mine, theirs in zip(first["numbers"], first["samples"], other["samples"], strict=False):
                if not _alike(mine[i], theirs[i]):
                    why = [f" ({digest})" for digest in (theirs[i][0], mine[i][0]) if digest.startswith(UNREAD)]
                    return f"{name} of sample {number}{''.join(why)}"
    return None


def _alike(one: Content, other: Content) -> bool:
    digest, means = one
    return bool(digest == other[0]) and all(_close(*pair) for pair in zip(means, other[1], strict=True))


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether means are the same, up to what they may differ; the first of each is that of the magnitudes."""
    within = TOLERANCE * max(one[0], other[0])
    return all(a == b or abs(a - b) <= within for a, b in zip(one, other, strict=True))


# ---- what is looked at ----------------------------------------------------------------------------------------------


def _sample_numbers(count: int) -> list[int]:
    """The first sample, the last, and others spread over all between them, however many of these are taken."""
    golden = (math.sqrt(5) - 1) / 2
    between = (int(i * golden % 1 * count) for i in range(1, MANY - 1))
    return list(dict.fromkeys([0, count - 1, *between])) if count else []


def _contents(source: Source, numbers: Sequence[int]) -> list[tuple[Content, Content]]:
    """What is in the inputs and in the target of some samples, up to the first that cannot be read."""
    found: list[tuple[Content, Content]] = []
    try:
        for inputs, targets in source.batches(np.array(numbers, int)[:, None], torch.Generator().manual_seed(0)):
            found.append((_content(inputs, PIECES_OF_SAMPLE, COARSE), _content(targets, PIECES_OF_SAMPLE)))
    except Exception as error:  # where it is the same on all ranks, the run itself comes to it, or never does
        found.append(([f"{UNREAD} {type(error).__name__}", []],) * 2)
    return found


def _kept(source: Source) -> dict[str, Content]:
    """What is in memory, by name."""
    try:
        found = _in_memory(source.dataset if isinstance(source, MapSource) else source)
    except Exception:  # of a class that has nothing to look into
        return {}
    coarse = {name: COARSE if getattr(value, "ndim", 0) > 1 else () for name, value in found.items()}
    return {name: _content(value, PIECES_OF_ALL, coarse[name]) for name, value in found.items()}


def _in_memory(data: Any, name: str = "", depth: int = 0) -> dict[str, Any]:
    """What of a split is at hand, by name: its targets, and all numbers that it keeps for each sample."""
    if isinstance(data, (list, tuple)):
        return {f"{name}targets": [split_target(item)[1] for item in data[:: -(-len(data) // MOST_ITEMS)]]}
    if isinstance(data, TensorSource):
        return {f"{name}targets": data.targets}
    if isinstance(data, TensorDataset):
        return {f"{name}targets": data.tensors[-1]}
    held = vars(data)
    arrays = {f"{name}{key}": _array(value) for key, value in held.items()}
    found = {key: array for key, array in arrays.items() if array is not None and len(array) == len(data)}
    inner = [held.get("dataset"), *held.get("datasets", ())]  # of a Subset, a ConcatDataset, a wrapper of one's own
    for number, part in enumerate(inner):
        if part is not None and depth < DEPTH:
            found |= _in_memory(part, f"{name}dataset{number or ''}.", depth + 1)
    return found


def _array(value: Any) -> Tensor | np.ndarray[Any, Any] | None:
    """A tensor or array of numbers, as such, if it is one and of no great size; a list of numbers is one too."""
    if isinstance(value, (list, range)) and len(value) and isinstance(value[0], (int, float)):
        value = np.asarray(value)
    if not isinstance(value, (Tensor, np.ndarray)) or isinstance(value, np.memmap):
        return None
    return value if value.ndim and value.nbytes <= MOST_BYTES else None


# ---- contents -------------------------------------------------------------------------------------------------------


def _content(value: Any, pieces: int, coarse: Sequence[torch.dtype] = ()) -> Content:
    """What is in a value: a hash of what has to be the same, and means of what may differ a little.

    Args:
        pieces: of a tensor that may differ; each has a mean.
        coarse: types of integers that may, beside all floating-point ones.
    """
    content = _Content(pieces, coarse)
    content.add(value)
    return [content.hash.hexdigest(), content.means]


class _Content:
    def __init__(self, pieces: int, coarse: Sequence[torch.dtype]) -> None:
        self._pieces, self._coarse = pieces, coarse
        self.hash = hashlib.blake2b(digest_size=6)
        self.means: list[list[float]] = []

    def add(self, value: Any) -> None:
        try:
            self._add(value)
        except Exception:  # lazy, sparse or otherwise not to be looked into
            self._same(type(value).__qualname__)

    def _add(self, value: Any) -> None:
        if isinstance(value, (np.ndarray, np.generic, float, complex)) and np.asarray(value).dtype.kind in "biufc":
            value = torch.from_numpy(np.array(value))
        if isinstance(value, Tensor):
            self._tensor(value.detach().cpu())
        elif isinstance(value, np.ndarray):  # of texts or objects
            self._add(value.tolist())
        elif isinstance(value, str):
            self._same(value.rpartition("/")[2])  # data may lie in another folder on another host
        elif value is None or isinstance(value, (bytes, int)):
            self._same(repr(value))
        else:
            children = entries(value)
            self._same(f"{type(value).__qualname__} {None if children is None else [str(name) for name in children]}")
            for part in (children or {}).values():
                self.add(part)

    def _tensor(self, tensor: Tensor) -> None:
        self._same(f"{tensor.dtype} {list(tensor.shape)}")
        if not tensor.numel():
            return
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if tensor.nbytes > MOST_BYTES:
            tensor = tensor[:: -(-tensor.nbytes // MOST_BYTES)]
        if tensor.is_floating_point() or tensor.dtype in self._coarse:
            flat = tensor.to(torch.float64).reshape(-1).nan_to_num(0.0, 0.0, 0.0)
            pieces = flat.tensor_split(min(self._pieces, max(1, len(flat))))
            means = [flat.abs().mean(), *(piece.mean() for piece in pieces)]
            self.means.append([float(f"{float(mean):.6g}") for mean in means])
        else:
            self.hash.update(tensor.numpy().tobytes())

    def _same(self, text: str) -> None:
        self.hash.update(f"{text}\0".encode(errors="backslashreplace"))
