"""A whole model as bytes, for a rank that takes no part in collectives."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from hvd_hetero.comm.flat_params import FlatState
from hvd_hetero.comm.tensor_slots import as_bytes


def to_bytes(state: FlatState) -> tuple[str, Tensor]:
    """Copy a model to the host: what its tensors outside of the vectors are, and the bytes ``[K]`` of all."""
    state.refresh()
    parts = [vector.detach().view(torch.uint8) for vector in state.vectors]
    parts += [as_bytes(tensor) for tensor in state.untrained.tensors().values()]
    return json.dumps(state.untrained.kinds()), torch.cat([part.cpu() for part in parts])


@torch.no_grad()
def from_bytes(state: FlatState, kinds: str, data: Tensor) -> None:
    """Put a model there that :func:`to_bytes` gave on a rank with the same one."""
    state.refresh()
    for vector in state.vectors:
        part, data = data.split([vector.nbytes, len(data) - vector.nbytes])
        vector.view(torch.uint8).copy_(part)
    state.untrained.receive(json.loads(kinds), data)
