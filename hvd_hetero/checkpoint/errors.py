"""What is wrong with a checkpoint, and what to do about it."""

from __future__ import annotations

from pathlib import Path

from hvd_hetero.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be written, or cannot be resumed from.

    Attributes:
        file: the file, or the dotted path inside a state.
        problem: what is wrong with it.
        remedy: what to do, or which older checkpoint there is.
    """

    def __init__(self, file: str | Path, problem: str, remedy: str) -> None:
        super().__init__(f"{file}: {problem}; {remedy}")
        self.file, self.problem, self.remedy = file, problem, remedy

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[str | Path, str, str]]:
        return type(self), (self.file, self.problem, self.remedy)
