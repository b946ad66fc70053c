"""What ranks say reaches the launcher's output to the last byte, whatever it is, and nobody waits for it."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_hetero.comm.horovodrun import BLOCK_BYTES, HEADER, STDERR, STDOUT
from hvd_hetero.config.load import load
from hvd_hetero.errors import EXIT_BAD_INPUT
from hvd_hetero.launch import launcher
from hvd_hetero.launch.horovodrun import End
from hvd_hetero.launch.rank_output import LINE_BYTES, RankOutput, write_all

pytestmark = pytest.mark.horovod

# ---- real ranks -----------------------------------------------------------------------------------------------------

LOUD = """
import os, sys, time
rank, out = int(os.environ["HOROVOD_RANK"]), sys.stdout.buffer
odd = b"\\xff\\xfe\\n" + "\\u6570\\u636e\\u96c6".encode() * 4000 + b"\\nNUL \\0 and \\x1b[31mred\\x1b[0m\\n"
odd += b"".join(b"%3d %%\\r" % i for i in range(100)) + b"dos\\r\\n" + b"latin-1 \\xe4\\n\\n"
for i in range(0, len(odd), 777):
    out.write(odd[i : i + 777])
    out.flush()
for _ in range(50):
    out.write(bytes([65 + rank]) * 100_000)
out.write(b"\\n")
for i in range(20_000):
    print("line", i, "of", rank)
print("hvd-hetero: told by", rank, file=sys.stderr)
print("Killed", file=sys.stderr)
print("but not really", file=sys.stderr)
if rank == 1:
    print("Terminated", file=sys.stderr)
out.write(b"an end without a newline")
out.flush()
if "fail" in sys.argv:
    sys.stdout.flush()
    if rank == 1:
        sys.stderr.buffer.write(b"its last word \\xff")
        sys.exit(2)
    time.sleep(60)
"""


def loud(tmp_path: Path, *words: str) -> End:
    script = tmp_path / "loud.py"
    script.write_text(LOUD)
    line = ["horovodrun", "--gloo", "-np", "2", "-H", "localhost:2", sys.executable, str(script), *words]
    return launcher._run(load(), line, [("localhost", 2)])


def test_every_byte_of_every_rank(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """No UTF-8, wide characters cut by blocks, NUL, progress bars, 5 MB without a newline, a line without an end."""
    end = loud(tmp_path)
    out, err = capfdbinary.readouterr()
    assert end.status == 0
    named = [line for line in out.split(b"\n") if line.startswith(b"rank 1: ")]
    assert b"rank 1: \xff\xfe" in named and b"\xff\xfe" in out.split(b"\n")
    wide = "数据集".encode() * 4000
    assert b"rank 1: " + wide in named and out.split(b"\n").count(wide) == 1
    assert out.count(b"NUL \0 and \x1b[31mred\x1b[0m\n") == 2 and out.count(b"latin-1 \xe4\n") == 2
    assert out.count(b"\r") >= 2 * 101 and out.count(b"rank 1:  42 %\r") == 1 and out.count(b" 42 %\r") == 2
    for rank, letter in enumerate((b"A", b"B")):
        assert out.count(letter) == 5_000_000
        lines = [line for line in out.splitlines() if line.endswith(b" of %d" % rank)]
        before = b"rank 1: " if rank else b""
        assert lines == [before + b"line %d of %d" % (i, rank) for i in range(20_000)], "in their order"
    assert out.count(b"an end without a newline") == 2
    assert sorted(err.splitlines()) == sorted([
        b"hvd-hetero: told by 0", b"hvd-hetero: told by 1", b"Killed", b"rank 1: Killed", b"but not really",
        b"rank 1: but not really", b"rank 1: Terminated",
    ])


def test_the_last_words_of_a_rank_that_fails(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Bad input of which no rank says anything is no silent end either."""
    end = loud(tmp_path, "fail")
    out, err = capfdbinary.readouterr()
    assert (end.status, end.error) == (EXIT_BAD_INPUT, "")
    assert err.endswith(b"rank 1: its last word \xff\nhvd-hetero: error: the job failed: " + end.cause.encode() + b"\n")
    cause = "rank 1 on localhost ended first, with status 2; its last line: "
    assert re.fullmatch(f"{cause}(its last word \ufffd|an end without a newline)", end.cause)
    assert b"Process 1 exit" not in out + err


FOLLOWS = """
import os, sys, time
if os.environ["HOROVOD_RANK"] == "0":
    os.system("sleep 0.1; echo what it said before &")  # standard output may be read later
    sys.exit("horovod.common.exceptions.HorovodInternalError: Horovod has been shut down.")
print("and last", flush=True)
print("the cause", file=sys.stderr)
time.sleep(0.3)
sys.exit(7)
"""


def test_a_rank_that_fails_of_another_ones_end_is_not_the_cause(hvd_hetero: Callable[..., Any]) -> None:
    """Its end may be seen first, where the other one is on another host, or is a little slower in leaving."""
    done = hvd_hetero(["run", "-np", "2", sys.executable, "-c", FOLLOWS])
    assert done.returncode == 1
    cause = "rank 1 on localhost ended first, with status 7; its last line: the cause\n"
    assert done.stderr.endswith(f"the job failed: {cause}"), done.stderr


# ---- how lines are put together -------------------------------------------------------------------------------------


class Stream(io.StringIO):
    """A text stream with a file behind it, as ``sys.stdout``."""

    def __init__(self, file: int) -> None:
        super().__init__()
        self._file = file

    def fileno(self) -> int:
        return self._file


def put_together(blocks: list[tuple[int, bytes]], failed: bool = False) -> tuple[bytes, RankOutput]:
    pipe = io.BytesIO(b"".join(HEADER.pack(STDERR, rank, len(block)) + block for rank, block in blocks))
    with tempfile.TemporaryFile() as file:
        output = RankOutput({STDERR: Stream(file.fileno())})
        output.read(pipe)
        output.end(failed)
        file.seek(0)
        return file.read(), output


BYTES = st.lists(st.sampled_from([b"a", b"\n", b"\r", b"\xff", b"\0", "数".encode()[:2], b"hvd-hetero: ", b"Killed"]))


@given(st.lists(BYTES))
@settings(deadline=None, max_examples=200)
def test_rank_0_alone_is_passed_on_as_it_is(pieces: list[list[bytes]]) -> None:
    blocks = [b"".join(piece) for piece in pieces]
    assert put_together([(0, block) for block in blocks])[0] == b"".join(blocks)


def test_what_stands_between_the_pieces_of_a_long_line() -> None:
    """Lines of others are lines of their own, and every piece is named."""
    long = b"x" * (LINE_BYTES + 1)
    blocks = [(1, long), (1, b"y\n"), (2, long), (0, b"short\n"), (2, b"z"), (2, b"\n"), (1, b"\rbar\r")]
    printed, _ = put_together(blocks)
    named = b"rank 1: " + long + b"y\nrank 2: " + long + b"\nshort\nrank 2: z\n"
    assert printed == named + b"rank 1: \rrank 1: bar\r"


def test_lines_that_mean_something_to_the_launcher() -> None:
    lines = [b"hvd-hetero: error: rank 1 is broken\n", b"then\n", b"\n", b"Killed\n"]
    printed, output = put_together([(1, b"".join(lines))], failed=True)
    assert printed == lines[0] + b"rank 1: then\nrank 1: \n", "the shell's word about the rank's end is told otherwise"
    assert output.errors == {1: "rank 1 is broken"} and output.last(1) == "then" and output.last(0) == ""
    assert output.final_error is None
    assert put_together([(1, b"Killed\n")], failed=False)[0] == b"rank 1: Killed\n"


def test_whether_an_error_is_the_last_that_was_said() -> None:
    """Of any rank; blank lines, and what a shell says of a rank's end, are not said."""
    one, other = b"hvd-hetero: error: one\n", b"hvd-hetero: error: other\n"
    for blocks, final in (
        ([(0, b"first\n"), (1, one)], "one"), ([(1, one), (1, b"\nKilled\n")], "one"),
        ([(1, one), (0, b"then\n")], None),
        ([(1, one), (0, other)], "other"), ([(1, one), (0, b"no end")], None), ([], None),
    ):  # fmt: skip
        assert put_together(blocks, failed=True)[1].final_error == final


def test_a_line_without_an_end_is_not_kept() -> None:
    with open(os.devnull, "w") as nowhere:
        output, block = RankOutput({STDOUT: nowhere}), b"x" * BLOCK_BYTES
        tracemalloc.start()
        for _ in range(500):
            output.receive(STDOUT, 1, block)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_stream_that_does_not_block_gets_all_of_it() -> None:
    """Another program may have set it so, for a pipe that it shares."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    data, read = os.urandom(1 << 20), list[bytes]()

    def gather() -> None:
        with os.fdopen(reading, "rb") as file:
            read.append(file.read())

    reader = threading.Thread(target=gather)
    reader.start()
    write_all(Stream(writing), data)
    os.close(writing)
    reader.join()
    assert read == [data]


def test_a_stream_without_a_file_gets_text() -> None:
    stream = io.StringIO()
    write_all(stream, b"\xff and 1\n")
    assert stream.getvalue() == "\ufffd and 1\n"


def test_nobody_reads_any_more() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    output = RankOutput({STDOUT: Stream(writing)})
    for _ in range(10):
        output.receive(STDOUT, 0, b"line\n")
    os.close(writing)
