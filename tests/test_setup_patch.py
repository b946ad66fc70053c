"""How scripts/setup applies the patch to Horovod's source, without a patch program."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from installer import wheel  # noqa: E402

PATCH = """\
A comment.

--- a/old.txt
+++ b/old.txt
@@ -1,3 +1,4 @@
 one
-two
+zwei
+dos
 three
@@ -6,2 +7,2 @@
 six
-seven
+sieben
--- a/new/file.txt
+++ b/new/file.txt
@@ -0,0 +1,2 @@
+fresh
+lines
"""


def test_patch_is_applied(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("one\ntwo\nthree\nfour\nfive\nsix\nseven\n")
    assert wheel.apply_patch(PATCH, tmp_path) == ["old.txt", "new/file.txt"]
    assert (tmp_path / "old.txt").read_text().split() == "one zwei dos three four five six sieben".split()
    assert (tmp_path / "new" / "file.txt").read_text() == "fresh\nlines\n"


def test_patch_wants_its_context(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("one\n2\nthree\n")
    with pytest.raises(ValueError, match=r"old.txt, line 1: not what the patch expects"):
        wheel.apply_patch(PATCH, tmp_path)


def test_our_patch_is_well_formed(tmp_path: Path) -> None:
    """Each hunk has the lines that it announces: applied to its old lines, it gives the new ones."""
    patch = wheel.PATCH.read_text()
    for name, hunks in _hunks(patch).items():
        size = max(begin + len(old) for begin, old, _ in hunks)
        lines = ["unrelated"] * size
        for begin, old, _ in hunks:
            lines[begin - 1 : begin - 1 + len(old)] = old
        if any(old for _, old, _ in hunks):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("\n".join(lines) + "\n")
    changed = wheel.apply_patch(patch, tmp_path)
    for name, hunks in _hunks(patch).items():
        assert all("\n".join(new) in (tmp_path / name).read_text() for _, _, new in hunks)
    assert "horovod/_hvd_hetero_fixes.py" in changed and "horovod/common/gloo/gloo_context.cc" in changed


def _hunks(patch: str) -> dict[str, list[tuple[int, list[str], list[str]]]]:
    """For each file its hunks: first line, lines before, lines after."""
    found: dict[str, list[tuple[int, list[str], list[str]]]] = {}
    for file in patch.split("\n--- a/")[1:]:
        name, _, *body = file.split("\n")
        for hunk in "\n".join(body).split("@@ -")[1:]:
            head, *lines = hunk.rstrip("\n").split("\n")
            begin = int(head.split(",")[0])
            old = [line[1:] for line in lines if not line.startswith("+")]
            found.setdefault(name, []).append((begin, old, [line[1:] for line in lines if line[:1] != "-"]))
    return found
