"""Lists of hosts as users, schedulers and MPI write them, and commands for other hosts."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_hetero.cluster.hosts import SSH, expand, parse_hosts, ranges, read_host_file, remote_command
from hvd_hetero.errors import ConfigError

FILE = """# two kinds of machines
gpu1 slots=2   # with a card each
gpu1:1

cpu[01-02] slots = 4 max_slots=8
n1,n2:3
spare
"""


def test_hosts() -> None:
    assert parse_hosts("a:2, b.c-d:14,127.0.0.1") == [("a", 2), ("b.c-d", 14), ("127.0.0.1", 1)]
    assert parse_hosts("n[1-2,7]:2,a:1,n2:3,b slots=4") == [("n1", 2), ("n2", 5), ("n7", 2), ("a", 1), ("b", 4)]


@pytest.mark.parametrize("text", ["", "a:", "a:0", "a:x", "a:2,,b:1", "a:2 b:2", "a:-1", "-oProxyCommand", "n[1-",
                                  "n]1", "n[2-1]", "n[]", "n[a b]", "a slots=0", "a slots=2 gpus=1", "$(x)"])
def test_hosts_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hosts(text)
    assert caught.value.key == "cluster.hosts"


def test_a_host_file(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(FILE)
    assert read_host_file(tmp_path / "hosts", "k") == [
        ("gpu1", 3), ("cpu01", 4), ("cpu02", 4), ("n1", 1), ("n2", 3), ("spare", 1)
    ]


@pytest.mark.parametrize(("text", "key", "problem"), [
    ("a:1\n# b\nc cores=2\n", "hosts line 3", "'c cores=2' is not host:slots"), ("# none\n", "k", "names no host"),
    (None, "k", "No such file"),
])
def test_a_host_file_that_cannot_be_read(text: str | None, key: str, problem: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_host_file(tmp_path / "hosts", "k")
    assert caught.value.key.endswith(key) and problem in caught.value.problem


# ---- names with brackets --------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 120)
PARTS = st.builds(lambda first, more, width: f"{first:0{width}d}" + (f"-{first + more:0{width}d}" if more else ""),
                  NUMBERS, st.integers(0, 12), st.integers(1, 4))
BRACKETS = st.lists(PARTS, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
LETTERS = st.text("abz-.", min_size=1, max_size=3)
NAMES = st.builds(lambda head, pairs: head + "".join(a + b for a, b in pairs),
                  LETTERS, st.lists(st.tuples(BRACKETS, st.sampled_from(["", "x", "-r"])), max_size=3))


@given(st.lists(NAMES, min_size=1, max_size=3).map(",".join))
def test_host_lists_are_read_as_another_program_reads_them(text: str) -> None:
    hostlist = pytest.importorskip("hostlist", reason="python-hostlist is what it is compared with: --extra dev")
    assert expand(text) == hostlist.expand_hostlist(text, allow_duplicates=True)


@given(st.text("ab0129[],-", max_size=12))
def test_a_list_of_anything_ends(text: str) -> None:
    hostlist = pytest.importorskip("hostlist", reason="python-hostlist is what it is compared with: --extra dev")
    try:
        known = hostlist.expand_hostlist(text, allow_duplicates=True)
    except hostlist.BadHostlist:
        return  # some of it is read all the same: brackets in brackets
    if ",," not in f",{text},":  # an item that is missing is no list here
        assert expand(text) == known


def test_brackets_in_brackets() -> None:
    assert expand("n[1,x[2-3],9]y") == ["n1y", "nx2y", "nx3y", "n9y"]


@given(st.sets(st.integers(0, 40)))
def test_ranges(numbers: set[int]) -> None:
    assert ranges(numbers) == "" if not numbers else {int(n) for n in expand(f"[{ranges(numbers)}]")} == numbers


# ---- on another host ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shell", "words"), [
    (SSH, [*shlex.split(SSH)[:-2], "h1", "cd x; y"]),
    ("blaunch", ["blaunch", "h1", "cd x; y"]),
    ("run --on={host} sh -c {command}", ["run", "--on=h1", "sh", "-c", "cd x; y"]),
    ("env 'A=b c' rsh -n {host}", ["env", "A=b c", "rsh", "-n", "h1", "cd x; y"]),
])
def test_a_command_on_another_host(shell: str, words: list[str]) -> None:
    assert remote_command(shell, "h1", "cd x; y") == words


def test_the_command_is_one_word() -> None:
    command = "printf '%s|' \"a b\" '{host}' $0"
    done = subprocess.run(remote_command("sh -c {command} {host}", "h1", command), capture_output=True, text=True)
    assert done.stdout == "a b|{host}|h1|"
