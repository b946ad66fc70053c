"""Errors that end a run in a known way."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

EXIT_FAULT = 1
"""An exception on a rank."""
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3
"""Stopped on request, and saved."""
EXIT_LOST = 4
"""A rank or a host died, or was cut off."""
EXIT_STUCK = 5
"""A rank made no progress for too long."""
EXIT_NON_FINITE = 6
"""The numbers of all ranks have gone bad (NaN, Inf)."""


class UserError(ValueError):
    """Something the user gave cannot be used; the job ends with status 2."""


class ConfigError(UserError):
    """Something the user gave cannot be used: names the key (or file), its value and a remedy.

    Attributes:
        key: configuration key, file or argument, e.g. ``train.tau``.
        value: what was given.
        problem: why it cannot be used.
        remedy: what to do instead.
    """

    def __init__(self, key: str, value: Any, problem: str, remedy: str) -> None:
        text = f"{key}={shortened(value)}: {problem}; {remedy}"
        super().__init__(" ".join(text.split()))  # one line, whatever is in it
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy

    def __reduce__(self) -> tuple[type[ConfigError], tuple[Any, ...]]:
        # data workers send what they raise to their parent
        return type(self), (self.key, self.value, self.problem, self.remedy)


class Unquoted:
    """A text that a message shows without quotes: it describes the value."""

    def __init__(self, text: Any) -> None:
        self._text = text

    def __str__(self) -> str:
        return str(self._text)


class RankError(UserError):
    """As its base, but met by a rank alone, in mid-run: the others wait for it elsewhere, and end because it does."""


class Stopped(Exception):
    """The run was asked to stop; it has saved, and ended on all ranks.

    Attributes:
        round: of the newest checkpoint, None if there is none.
    """

    def __init__(self, round: int | None) -> None:
        super().__init__(f"stopped; run.resume=auto goes on from round {round}" if round is not None else
                         "stopped, and there is no checkpoint to go on from")
        self.round = round


class NonFiniteError(Exception):
    """The numbers of all ranks have gone bad, or those of one that is not to be left out.

    Attributes:
        ranks: whose numbers they are.
    """

    def __init__(self, round: int, ranks: Iterable[int], all_ranks: bool = False) -> None:
        self.ranks = list(ranks)
        named = f"rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}"
        why = "nobody's are good" if all_ranks else "aggregation.nan=stop"
        super().__init__(f"the numbers of {named} have gone bad (NaN, Inf) in round {round}, and {why}; a lower "
                         "train.lr or train.clip_norm may help, with run.resume=reshape from the last checkpoint on")


def nearest(word: Any, words: Iterable[str]) -> str:
    """The remedy for a name that is not known: the nearest one that is, or all of them."""
    known = list(words)
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known) or 'none'}"


def shortened(value: Any, limit: int = 200) -> str:
    """A value as messages show it."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
