"""Documents and comments name only what exists: files, modules, classes, settings, and what links point to."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from hvd_hetero import algorithms
from hvd_hetero.config.schema import Config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hvd_hetero"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
ARCHITECTURE = ROOT / "docs" / "architecture.md"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?<![\w./-])((?:[\w-]+/)*[\w-]+\.py|(?:scripts|configs|docs|tests|docker)/[\w./-]*\w)")
OWN_NAME = re.compile(r"\bhvd_hetero(?:\.\w+)+")
OWN_FILE = re.compile(r"\b(?:hvd_hetero|docs)/[\w/]*\w\.(?:py|md)\b")
REFERENCE = re.compile(r":\w+:`~?(hvd_hetero[\w.]+)`")
SECTIONS = [section.name for section in dataclasses.fields(Config)]
SETTING = re.compile(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})\.[\w*]+)")
ENDINGS = {"py", "json", "jsonl", "csv", "pt", "md"}
"""A word such as ``checkpoint.py`` is a file's name, not a setting."""
FIGURES = {"eval.final_accuracy"}
"""Keys of ``summary.json`` that look like settings."""
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(text: str) -> Iterator[str]:
    """Every span and block of code but Python's, in which ``model.parameters()`` is no setting."""
    yield from (block for language, block in FENCE.findall(text) if language != "python")
    prose = FENCE.sub("", text)
    yield from SPAN.findall(prose)
    yield from (line for line in prose.splitlines() if line.startswith("    "))


def missing_files(text: str) -> set[str]:
    """Files that code names and that are neither below the root nor below the package."""
    found = {file for part in code(text) for file in FILE.findall(part)}
    return {file for file in found if not any((place / file).exists() for place in (ROOT, PACKAGE, ROOT / "docs"))}


def missing_names(text: str) -> set[str]:
    """Dotted names of the package that cannot be imported."""
    return {dotted for dotted in OWN_NAME.findall(text) if not exists(dotted)}


def exists(dotted: str) -> bool:
    first, *rest = dotted.split(".")
    found = importlib.import_module(first)
    path = first
    for part in rest:
        path = f"{path}.{part}"
        try:
            found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
        except ImportError:
            return False
    return True


def settings() -> set[str]:
    """Every key that any method has."""
    configs = [Config(algorithm=algorithms.get(name).Options()) for name in algorithms.REGISTRY]
    return {key for config in configs for key in config.built_in()}


def missing_settings(text: str) -> set[str]:
    """Settings that the schema does not know; ``train.max_*`` stands for all that begin so."""
    known = settings()
    found = {key for part in code(text) for key in SETTING.findall(part)} - FIGURES
    return {key for key in found
            if key.rpartition(".")[2] not in ENDINGS and not any(fnmatch(other, key) for other in known)}


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken_links(path: Path, text: str) -> set[str]:
    """Links to files that do not exist, or to headings that are not there."""
    broken = set()
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, place = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        readable = target.suffix == ".md" and target.exists()
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if readable else []
        if not target.exists() or (place and place not in map(anchor, headings)):
            broken.add(link)
    return broken


def unknown_classes(text: str) -> set[str]:
    """Classes, or ``Class.attribute``, that no module of the package defines."""
    defined = {
        node.name: ast.unparse(node)
        for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    found = {span for span in SPAN.findall(FENCE.sub("", text)) if re.fullmatch(r"[A-Z][a-z]\w*(\.\w+)?", span)}
    unknown = set()
    for span in found:
        owner, _, attribute = span.partition(".")
        if owner not in defined or not re.search(rf"\b{attribute}\b", defined[owner]):
            unknown.add(span)
    return unknown


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_files_and_names_exist(path: Path) -> None:
    text = path.read_text()
    assert missing_files(text) | missing_names(text) == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_settings_are_in_the_schema(path: Path) -> None:
    assert missing_settings(path.read_text()) == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path, path.read_text()) == set()


def test_pictures_are_small() -> None:
    sizes = {name(path): path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()}
    assert sizes and max(sizes.values()) < 100_000


def test_classes_in_architecture_exist() -> None:
    assert unknown_classes(ARCHITECTURE.read_text()) == set()


@pytest.mark.parametrize(("title", "path", "needed"), [
    ("policy", "hvd_hetero.algorithms.synchronous.Lockstep", "make_plan(step_sec)"),
    pytest.param("executor", "hvd_hetero.algorithms.execution.base.Executor", "run_round(batches)",
                 marks=pytest.mark.horovod),
])
def test_the_parts_of_a_method_exist(title: str, path: str, needed: str) -> None:
    """The tables under "A new method"."""
    section = (ROOT / "docs" / "methods.md").read_text().partition("## A new method")[2]
    table = section.partition(f"| {title} | |\n")[2].partition("\n\n")[0]
    parts = [span for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for span in SPAN.findall(row)]
    assert needed in parts
    module, _, owner = path.rpartition(".")
    found = getattr(importlib.import_module(module), owner)
    for part in parts:
        name, _, arguments = part.rstrip(")").partition("(")
        assert hasattr(found, name) or name in inspect.get_annotations(algorithms.Policy), part
        if arguments:
            assert list(inspect.signature(getattr(found, name)).parameters)[1:] == arguments.split(", "), part


def test_comments_and_docstrings_name_what_exists() -> None:
    """Files by their path in the tree, and the names of the package in references such as ``:class:`...```."""
    stale = set()
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("configs/**/*.yaml")]:
        text = path.read_text()
        stale |= {(name(path), file) for file in OWN_FILE.findall(text) if not (ROOT / file).exists()}
        stale |= {(name(path), dotted) for dotted in REFERENCE.findall(text) if not exists(dotted)}
    assert stale == set()


@pytest.mark.parametrize(("check", "text", "found"), [
    (missing_files, "see `training/epochs.py` and `training/epoch.py`", {"training/epochs.py"}),
    (missing_files, "```\nscripts/bench/nothing --seconds 3\n```", {"scripts/bench/nothing"}),
    (missing_names, "`hvd_hetero.trian` or `hvd_hetero.train`, `hvd_hetero.planning.plan`", {"hvd_hetero.trian"}),
    (missing_settings, "`train.passes=3`, `train.epochs=3`, `train.max_*`, `model.pt`", {"train.passes"}),
    (missing_settings, "```python\nmodel.parameters()\n```", set()),
    (unknown_classes, "`ConfigError`, `UserError.nothing`, `Nothing`", {"UserError.nothing", "Nothing"}),
], ids=range(6))
def test_the_checks_themselves(check, text: str, found: set[str]) -> None:
    assert check(text) == found


def test_the_check_of_links(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One `two`, three\n")
    text = "[x](a.md#one-two-three) [y](a.md#four) [z](b.md) [w](https://nowhere.invalid)"
    assert broken_links(tmp_path / "c.md", text) == {"a.md#four", "b.md"}
