"""Average the models of the rounds, beside the training, on rank 0: nothing of it goes back into the training.

``ema``: e <- s e + (1 - s) x after each round, with s = 2^(-steps / half-life) for a round of so many fast steps; at
first, where that would keep the initial model for long, the plain mean (Tarvainen and Valpola, 2017). ``lawa``: the
mean of the models at the end of the last K epochs (Kaddour, 2022). Running statistics are averaged likewise; integer
buffers, and what is in no flat vector, are those of the last model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.flat_params import FlatState
from hvd_hetero.config.schema import EvalConfig, TrainConfig
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.stop_criteria import expected_epochs, fast_steps

NONE, EMA, LAWA = "none", "ema", "lawa"
SHARE, UNKNOWN = 0.015, 256.0
"""A half-life that is not given: this share of the run's fast steps, or so many where only a clock ends the run."""


def half_life(spec: EvalConfig, train: TrainConfig, plan: Plan) -> float:
    """Return the half-life of an exponential average, in fast steps."""
    if spec.half_life is not None:
        return spec.half_life
    epochs = expected_epochs(train, plan)
    return UNKNOWN if epochs is None else SHARE * epochs * plan.rounds * fast_steps(plan)


class IterateAverage:
    """The average of one run's models.

    Args:
        state: the model's vectors, averaged over the ranks when a round ends.
        half_life: of ``ema``, in fast steps; ``last``: the epochs of ``lawa``.
    """

    def __init__(self, kind: str, state: FlatState, half_life: float, last: int) -> None:
        self._kind, self._state, self._half_life = kind, state, half_life
        self._mean: list[Tensor] | None = None
        self._rounds = 0
        self._epochs: deque[list[Tensor]] = deque(maxlen=last)

    @torch.no_grad()
    def end_round(self, steps: int) -> None:
        """Take in the model at the end of a round of so many fast steps."""
        if self._kind != EMA:
            return
        self._rounds += 1
        kept = min(0.5 ** (steps / self._half_life), 1 - 1 / self._rounds)
        models = self._summable()
        if self._mean is None:
            self._mean = [x.clone() for x in models]
        for mean, x in zip(self._mean, models, strict=True):
            mean.mul_(kept).add_(x * (1 - kept))

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Take in the model at the end of an epoch."""
        if self._kind == LAWA:
            self._epochs.append([x.clone() for x in self._summable()])
            self._mean = [torch.stack(same).mean(0) for same in zip(*self._epochs, strict=True)]

    def _summable(self) -> list[Tensor]:
        """Return the model's vectors, narrow ones as float32: they would round away what one round adds."""
        return [x.float() if x.element_size() < torch.float32.itemsize else x for x in self._state.vectors]

    @contextmanager
    def in_place(self, comm: Comm) -> Iterator[None]:
        """Put the average, which rank 0 has, into the model of every rank for as long as a block lasts."""
        before = [vector.clone() for vector in self._state.vectors]
        with torch.no_grad():
            for i, (vector, current) in enumerate(zip(self._state.vectors, self._summable(), strict=True)):
                mean = current if self._mean is None else self._mean[i]
                vector.copy_(comm.broadcast(mean, f"iterate_average.{i}"))
        try:
            yield
        finally:
            with torch.no_grad():
                for vector, kept in zip(self._state.vectors, before, strict=True):
                    vector.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self._kind, "mean": self._mean, "rounds": self._rounds, "epochs": list(self._epochs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average; one of another kind is begun anew."""
        if state["kind"] != self._kind:
            return
        models = self._summable()

        def on_device(saved: list[Tensor]) -> list[Tensor]:
            return [mean.to(x, copy=True) for mean, x in zip(saved, models, strict=True)]

        self._mean = None if state["mean"] is None else on_device(state["mean"])
        self._rounds = state["rounds"]
        self._epochs.extend(map(on_device, state["epochs"]))
