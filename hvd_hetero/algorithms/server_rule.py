"""What a server does with each vector that reaches it: the mathematics of the asynchronous methods, and nothing else.

No torch: a vector is anything that adds up and scales, a tensor on the server, a number in tests and in the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Rule:
    """A method's rule; called with one arrival after another.

    Every rank has the model of some version, computes on it, and pushes what came of it; then it goes on from the
    current model, if :meth:`restart` says so, and else from the one that it has.

    Args:
        size: n, the number of ranks.

    Attributes:
        needs_every_rank: whether the model stands still without pushes of all ranks.
        step: takes the step along a direction times a factor: of the optimizer, or x - factor * direction where
            ``is_outer``. Whoever owns the model sets it.
        momentum: the rule's own factor, and ``velocity``, what it has added up, as large as the model, if it has any.
        version: updates so far.
        made_at: by rank, the version of the model that it computes on.
    """

    is_outer = needs_every_rank = False
    momentum: float = 0.0
    velocity: Any = None
    step: Callable[[Any, float], None]

    def __init__(self, size: int) -> None:
        self.size, self.version, self.made_at = size, 0, [0] * size

    def arrive(self, rank: int, vector: Any) -> bool:
        """Take a vector, which is the rule's own from now on; return whether it was used."""
        raise NotImplementedError(type(self).__name__)

    def delay(self, rank: int) -> int:
        """Return the updates since the model that a rank computes on."""
        return self.version - self.made_at[rank]

    def update(self, direction: Any, factor: float = 1.0) -> None:
        """Make the next version of the model."""
        self.step(direction, factor)
        self.version += 1

    def restart(self, rank: int) -> None:
        """Let a rank go on from the current model."""
        self.made_at[rank] = self.version

    def skip(self, rank: int) -> None:
        """Go on with a rank that has nothing to push: its values are non-finite."""
        self.restart(rank)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is carried from arrival to arrival."""
        return {name: value for name, value in vars(self).items() if name != "step"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)

    def carry_over(self, state: Mapping[str, Any]) -> None:
        """Load what other ranks can use of what another job's :meth:`state_dict` gave."""
        if self.momentum and state.keys() == self.state_dict().keys():  # else it is of another method
            self.velocity = state["velocity"]


def added(total: Any, vector: Any) -> Any:
    """Return a sum, made in place where it can be; None is the empty one."""
    if total is None:
        return vector
    total += vector
    return total
