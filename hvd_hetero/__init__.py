"""hvd-hetero trains PyTorch models on workers of unequal speed, on Horovod."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hvd_hetero import torchvision_help

if TYPE_CHECKING:
    from hvd_hetero.launch.on_ray import launch_on_ray
    from hvd_hetero.telemetry.callbacks import Callback
    from hvd_hetero.training.api import train
    from hvd_hetero.training.loop import Loop

__all__ = ["Callback", "Loop", "__version__", "launch_on_ray", "train"]
__version__ = "0.1.0"

torchvision_help.install()


def __getattr__(name: str) -> Any:
    # On demand, because planning imports this package on machines without torch and Horovod.
    if name == "train":
        from hvd_hetero.training.api import train

        return train
    if name == "launch_on_ray":
        from hvd_hetero.launch.on_ray import launch_on_ray

        return launch_on_ray
    if name == "Callback":
        from hvd_hetero.telemetry.callbacks import Callback

        return Callback
    if name == "Loop":
        from hvd_hetero.training.loop import Loop

        return Loop
    raise AttributeError(f"module 'hvd_hetero' has no attribute {name!r}")
