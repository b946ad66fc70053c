"""Pass on the output of ranks: every byte as it came, whole lines, with the rank before them."""

from __future__ import annotations

import os
import re
import select
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import IO, Any

from hvd_hetero.comm.horovodrun import HEADER, STDERR, STDOUT

OURS = b"hvd-hetero: "
ERROR = OURS + b"error: "
HOROVODS = b"HorovodInternalError"
LINE_BYTES, LAST_BYTES = 1 << 16, 500
"""Of a longer line the beginning is passed on before its end has come; of a rank's last one so much is kept."""
LINE_ENDS = re.compile(rb"(?<=\n)|(?<=\r)(?!\n)")
SIGNAL_NAMES = frozenset(str(signal.strsignal(number)).encode() for number in signal.valid_signals())
"""What the shell around a rank says of its end: ``Killed``."""

Source = tuple[int, int]
"""A stream, as :data:`hvd_hetero.comm.horovodrun.HEADER` numbers it, and a rank."""


class RankOutput:
    """Passes on what ranks say: rank 0's lines bare, others' with their rank.

    A line ends with a newline or a carriage return (a progress bar's). One that is too long to be kept until then
    goes out in pieces; what another rank says between two of them stands on lines of its own.

    Args:
        streams: where it goes, by stream; text streams as ``sys.stdout``.

    Attributes:
        errors: each rank's last error message of ours, without its beginning.
        final_error: such a message, if nothing else was said after it.
        followers: ranks that have told of Horovod's error, which it raises where another one has left.
    """

    def __init__(self, streams: Mapping[int, Any]) -> None:
        self.errors: dict[int, str] = {}
        self.final_error: str | None = None
        self.followers: set[int] = set()
        self._streams = streams
        self._last: dict[Source, bytes] = {}
        self._rests: dict[Source, bytes] = {}
        self._begun: set[Source] = set()
        self._held: dict[Source, bytes] = {}
        self._unended: dict[int, int | None] = dict.fromkeys(streams)

    def last(self, rank: int) -> str:
        """What a rank said last, on standard error if anything; error messages of ours aside."""
        found = self._last.get((STDERR, rank)) or self._last.get((STDOUT, rank), b"")
        return found[:LAST_BYTES].decode(errors="replace").strip()

    def read(self, pipe: IO[bytes]) -> None:
        """Take in blocks with their headers to the end of the pipe."""
        while len(header := pipe.read(HEADER.size)) == HEADER.size:
            stream, rank, size = HEADER.unpack(header)
            self.receive(stream, rank, pipe.read(size))

    def receive(self, stream: int, rank: int, block: bytes) -> None:
        """Pass on what has become whole by another block of a rank's output."""
        source = (stream, rank)
        *lines, rest = LINE_ENDS.split(self._rests.pop(source, b"") + block)
        if len(rest) > LINE_BYTES:
            lines, rest = [*lines, rest], b""
        self._rests[source] = rest
        self._put(stream, b"".join(part for line in lines for part in self._parts(source, line)))

    def end(self, failed: bool) -> None:
        """Pass on what has no end.

        Args:
            failed: whether a rank was ended: the last word may be its shell's about that, which is told otherwise, on a
                line of its own.
        """
        for source, rest in self._rests.items():
            self._put(source[0], b"".join(self._parts(source, rest)) if rest else b"")
        for source, line in self._held.items() if not failed else ():
            self._put(source[0], self._named(source, line))
        for stream, rank in self._unended.items() if failed else ():
            self._put(stream, b"" if rank is None else b"\n")

    def _parts(self, source: Source, line: bytes) -> Iterator[bytes]:
        stream, rank = source
        if source in self._begun:
            yield self._named(source, line)
            return
        if (held := self._held.pop(source, None)) is not None:  # so it was the rank's own word
            yield self._named(source, held)
        if stream == STDERR and line.split(b" (")[0].strip() in SIGNAL_NAMES:
            self._held[source] = line
            return
        if line.startswith(ERROR):
            self.errors[rank] = self.final_error = line[len(ERROR) :].decode(errors="replace").strip()
        elif not line.isspace():
            self._last[source], self.final_error = line, None
            if HOROVODS in line:
                self.followers.add(rank)
        yield self._named(source, line)

    def _named(self, source: Source, line: bytes) -> bytes:
        """The line, or the next piece of one, with what has to stand before it where it goes."""
        stream, rank = source
        before, bare = self._unended[stream], rank == 0 or (source not in self._begun and line.startswith(OURS))
        ended = line.endswith((b"\n", b"\r"))
        (self._begun.discard if ended else self._begun.add)(source)
        self._unended[stream] = None if ended else rank
        if before == rank:
            return line
        return (b"" if before is None else b"\n") + (b"" if bare else b"rank %d: " % rank) + line

    def _put(self, stream: int, data: bytes) -> None:
        with suppress(OSError, ValueError):  # nobody reads any more; the ranks must not wait for that
            write_all(self._streams[stream], data)


def write_all(stream: Any, data: bytes) -> None:
    """Write bytes to a text stream, all of them, whatever its encoding is and whether it blocks or not.

    Raises:
        OSError, ValueError: it takes no more.
    """
    try:
        file = stream.fileno()
    except (AttributeError, OSError, ValueError):  # one of a notebook, or of a program that gathers it
        stream.write(data.decode(errors="replace"))
        file = None
    stream.flush()
    while data and file is not None:
        try:
            data = data[os.write(file, data) :]
        except BlockingIOError:
            select.select([], [file], [])
