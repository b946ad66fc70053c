"""What the tests of checkpoints share: an exact comparison, some state, a whole round written."""

from __future__ import annotations

import json
import struct
from collections import deque
from typing import Any

import numpy as np
import torch

from hvd_hetero.checkpoint import Checkpoint, ShardInfo, Store, join, split
from hvd_hetero.checkpoint.tensor_file import DTYPES, to_pieces

MADE_WITH = {"train.lr": 0.1, "train.tau": {"fast": 8}}
OLD, NEW = 10, 20
"""Rounds: the one that is there already, and the one that is being written."""


def same(a: Any, b: Any) -> bool:
    """Whether two states are the same in every type, dtype, shape and bit; Python's own == says that 1 is True."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor) and a.layout == torch.sparse_coo:
        parts = [(t._indices(), t._values(), t.shape, t.is_coalesced()) for t in (a, b)]
        return same(*parts)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and b"".join(memory(a)) == b"".join(memory(b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same([a.real, a.imag], [b.real, b.imag])
    if isinstance(a, dict):
        made_with = [getattr(each, "default_factory", None) for each in (a, b)]
        return same(list(a.items()), list(b.items())) and made_with[0] is made_with[1]
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b)) and getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)
    return bool(a == b)


def memory(tensor: torch.Tensor) -> list[bytes]:
    odd = tensor.is_complex() or tensor.dtype not in DTYPES
    flat = tensor.resolve_conj().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8) if odd else tensor
    return [bytes(piece) for piece in to_pieces({"x": flat})]


def around(state: Any) -> Any:
    """Through the text that is written."""
    tensors, plain = split(state)
    return join(tensors, json.loads(json.dumps(plain, allow_nan=False)))


def save_round(store: Store, number: int, states: list[Any], made_with: Any = MADE_WITH) -> Checkpoint:
    infos = [ShardInfo.from_json(store.write_shard(number, rank, state).to_json()) for rank, state in enumerate(states)]
    return store.commit(number, infos[::-1], epochs=number // 10, made_with=made_with)


def some_state(seed: int = 0, size: int = 1000) -> dict[str, Any]:
    weights = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return {"model": {"w": weights, "b": torch.zeros(3)}, "loss": float("nan"), "n": seed}


def whole(store: Store) -> int:
    """The round that would be gone on from, every rank's state compared with what was saved."""
    latest = store.latest()
    assert latest is not None
    first = {OLD: 3, NEW: 6, NEW + 10: 8}[latest.meta.round]
    for rank in range(2):
        assert same(latest.load(rank), some_state(first + rank))
    return latest.meta.round
