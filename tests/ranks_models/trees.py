"""Random trees of modules, made from a description that JSON can hold; how a rank changes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FLOATING = ("float32", "float64", "float16", "bfloat16", "complex64", "complex128")
OTHERS = ("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float8_e4m3fn")
LAYOUTS = ("plain", "turned", "sliced", "expanded")
KINDS = ("trained", "frozen", "buffer", "cache")


def values(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Any values of a type."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    size = 8 * dtype.itemsize
    numbers = torch.randint(0, 2 ** (min(size, 63) - 1), shape, generator=generator)
    return numbers.to(dtype)


def tensor_of(spec: dict[str, Any], seed: int) -> Tensor:
    dtype, shape = getattr(torch, spec["dtype"]), list(spec["shape"])
    layout = spec["layout"] if len(shape) == 2 else "plain"
    if layout == "turned":
        return values(dtype, shape[::-1], seed).t()
    if layout == "sliced":
        return values(dtype, [shape[0], 2 * shape[1]], seed)[:, ::2]
    if layout == "expanded" and spec["kind"] != "trained":
        return values(dtype, [shape[1]], seed).expand(shape)
    return values(dtype, shape, seed)


def build(spec: dict[str, Any], seed: int) -> nn.Module:
    """The tree, with values that depend on the seed; the first module has a trained parameter."""
    made: list[nn.Parameter | Tensor] = []
    root = _node(spec, seed, made)
    root.register_parameter("first", nn.Parameter(values(torch.float32, [3], seed)))
    return root


def _node(spec: dict[str, Any], seed: int, made: list[Any]) -> nn.Module:
    module = nn.Module()
    for i, one in enumerate(spec["tensors"]):
        name, is_parameter = f"t{i}", one["kind"] in ("trained", "frozen")
        fitting = [t for t in made if isinstance(t, nn.Parameter) == is_parameter]
        if one["tied"] and fitting:
            tensor = fitting[one["tied"] % len(fitting)]
        else:
            tensor = tensor_of(one, seed + len(made))
            if is_parameter:
                tensor = nn.Parameter(tensor, requires_grad=one["kind"] == "trained")
            made.append(tensor)
        if is_parameter:
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor, persistent=one["kind"] == "buffer")
    for i, child in enumerate(spec["children"]):
        module.add_module(f"m{i}", _node(child, seed, made))
    return module


def change(module: nn.Module, seed: int) -> None:
    """Write to about half of the tensors: in place, through ``.data``, or by putting another one there."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for holder in (part._parameters, part._buffers):
            for key, tensor in list(holder.items()):
                how = int(torch.randint(8, (), generator=generator))
                if tensor is None or how > 3 or not tensor.numel():
                    continue
                new = values(tensor.dtype, list(tensor.shape), seed + how)
                holders = [h for p in module.modules() for h in (p._parameters, p._buffers)]
                shared = sum(other is tensor for h in holders for other in h.values())
                if how < 2 and 0 not in tensor.stride():
                    with torch.no_grad():
                        tensor.copy_(new)
                elif isinstance(tensor, nn.Parameter):
                    tensor.data = new
                elif shared == 1:
                    holder[key] = new
