"""What a backward pass does: how often it adds to each gradient, and which lines made what it fails on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hvd_hetero.config.instantiate import Place

FRAME = re.compile(r'File "(.+?)", line ([0-9]+)')


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count how often a backward pass adds to the gradient of each parameter, by name."""
    times: dict[str, int] = {}

    def count(name: str, param: Tensor) -> None:
        times[name] = times.get(name, 0) + 1

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(partial(count, name)) for name, p in trained]
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


def forward_places(step: Callable[[], Any]) -> list[Place]:
    """Return the lines that made what a backward pass fails on: its own traceback ends in torch."""
    with warnings.catch_warnings(record=True) as heard, suppress(Exception):
        warnings.simplefilter("always")
        with torch.autograd.detect_anomaly(check_nan=False):
            step()
    return [(file, int(line)) for warning in heard for file, line in FRAME.findall(str(warning.message))]
