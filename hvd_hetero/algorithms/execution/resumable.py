"""What runs in the background for a method, and what a checkpoint holds of it: the interface, and two parts of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvd_hetero.comm.partial.allreduce import PartialAllreduce
from hvd_hetero.comm.wire import Wire
from hvd_hetero.telemetry.staleness import Counts


class Resumable:
    """State that a method keeps from round to round, and threads that it may have."""

    def counts(self) -> Counts | None:
        """Return what this rank sent in partial collectives since the last call, if the method has them."""
        return None

    def close(self) -> None:
        """Stop what runs in the background; called whatever has happened, even before the method was started."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the method carries from round to round."""
        raise NotImplementedError(type(self).__name__)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what :meth:`state_dict` gave."""
        raise NotImplementedError(type(self).__name__)


class PartialResumable(Resumable):
    """Resume a partial collective at a saved round."""

    partial: PartialAllreduce

    def _open(self, first: int) -> None:
        """Make the collective, whose next round is ``first``."""
        raise NotImplementedError(type(self).__name__)

    def counts(self) -> Counts | None:
        return self.partial.pop_counts()

    def close(self) -> None:
        if "partial" in vars(self):  # else it was never started
            self.partial.close()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "round": self.partial.version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.partial.close()
        self._open(int(state["round"]))


class WireResumable(Resumable):
    """Resume what rounding for the wire has left over, where less than float32 travels."""

    wire: Wire | None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **({} if self.wire is None else {"wire": self.wire.state_dict()})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.wire is not None:
            self.wire.load_state_dict(state["wire"])
