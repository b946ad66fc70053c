"""Tensors as the bytes of a safetensors file.

The library reads these files but is not asked to write them: it opens the file itself, so that nothing could be synced,
hashed on the way, or made to fail by a test. Its format is a length, a header in JSON, and the tensors' memory.
"""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
RESERVED = "__metadata__"
"""The one name that the format does not let a tensor have."""


def to_pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The file in pieces. Contiguous tensors in host memory are not copied, others one at a time."""
    # wide elements first, as the library does it, so that every tensor is aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {RESERVED: {"format": "pt"}}
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        if tensors[name].numel():
            yield _memory(tensors[name])


def _memory(tensor: torch.Tensor) -> memoryview:
    # as_strided, since one element alone may have any stride, which no view as bytes would have
    flat = tensor.detach().to("cpu").contiguous().as_strided((tensor.numel(),), (1,))
    # not by numpy(): the memory of a module's buffer could not be resized any more, as observers do it
    array: Any = (ctypes.c_char * flat.nbytes).from_address(flat.data_ptr())
    array.owner = flat
    return memoryview(array).cast("B")
