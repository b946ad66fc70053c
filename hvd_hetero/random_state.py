"""The random generators that the user's code draws from: Python's, numpy's, torch's, and a GPU's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of all of them at one moment.

    Attributes:
        python: as ``random.getstate`` has it.
        numpy: as ``numpy.random.get_state(legacy=False)`` has it.
        cpu: of torch's generator for the CPU.
        cuda: of that for the GPU, None on a CPU.
        device: where that GPU is.
    """

    python: tuple[Any, ...]
    numpy: Mapping[str, Any]
    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def capture(cls, device: torch.device | str = "cpu") -> RandomState:
        """Take the state as it is now; ``device`` says whose generator belongs to it beside the host's."""
        device = torch.device(device)
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        numpy_state: Any = np.random.get_state(legacy=False)
        return cls(random.getstate(), numpy_state, torch.get_rng_state(), on_device, device)

    def restore(self) -> None:
        """Put all generators back to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # type: ignore[arg-type]  # a Mapping does too
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def state_dict(self) -> dict[str, Any]:
        """Return it as numbers, arrays and tensors, which can be saved without pickle."""
        version, words, gauss = self.python
        python = {"version": version, "words": torch.tensor(words), "gauss": gauss}
        return {"python": python, "numpy": dict(self.numpy), "cpu": self.cpu, "cuda": self.cuda}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> RandomState:
        """Make it again from what :meth:`state_dict` gave, on the same kind of device."""
        python = state["python"]
        words = tuple(python["words"].tolist())
        cuda = state["cuda"]
        return cls((python["version"], words, python["gauss"]), state["numpy"], state["cpu"].cpu(),
                   None if cuda is None else cuda.cpu(), torch.device(device))  # fmt: skip


def seed_all(seed: int) -> None:
    """Seed all of them alike, those of all GPUs too; any integer will do."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed all of them alike for a block of code, and put them back to where they were afterwards.

    Args:
        device: whose generator is seeded beside the host's; those of other devices are left alone.
    """
    before = RandomState.capture(device)
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        if before.cuda is not None:
            with torch.cuda.device(before.device):
                torch.cuda.manual_seed(seed)
        yield
    finally:
        before.restore()
