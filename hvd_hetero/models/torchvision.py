"""Importing torchvision where its compiled operators do not fit the torch that is installed."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """Import torchvision, and help it where it was built for another torch.

    A build for CUDA beside a CPU torch cannot load its operators, yet at import it describes two of them to
    torch and fails because they do not exist. Nothing here uses them: declared by name alone, they let the
    import pass.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    for operator in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    return importlib.import_module("torchvision")
