"""An optimizer that says what it is given back."""

from __future__ import annotations

import os
from typing import Any

import torch


class Noted(torch.optim.SGD):
    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        momenta = [one["momentum_buffer"] for one in self.state.values() if one.get("momentum_buffer") is not None]
        norm = sum(float(momentum.norm()) for momentum in momenta)
        print(f"LOADED {os.environ['HOROVOD_HOSTNAME']} {len(momenta)} {norm > 0}", flush=True)
