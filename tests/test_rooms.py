"""The import rules, read from the source: rooms have an order, Horovod has its room, every collective has a name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hvd_hetero"
BASE = {"errors", "files", "log", "secrets", "describe", "random_state", "torchvision_help"}
ROOMS = ["config", "cluster", "planning", "telemetry", "data", "models", "comm", "checkpoint", "worker", "algorithms",
         "training", "launch", "analysis", "cli", "__main__"]
"""Each may import from those before it, and all from the base."""
LAYER = dict.fromkeys(BASE, 0) | {room: number for number, room in enumerate(ROOMS, 1)}

Module = tuple[str, ast.Module]


def modules() -> list[Module]:
    """Every file of the package by its dotted name below the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append((name, ast.parse(path.read_text(), str(path))))
    return found


MODULES = modules()
NAMES = {name for name, _ in MODULES}
assert MODULES[0][0] == "", "the package itself, which only names what its users may call"


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a tree, inside functions too; dotted, absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """The package's own modules that a tree imports, by their names below the package; the package itself aside."""
    names = {name.removeprefix("hvd_hetero.") for name in imported(tree) if name.startswith("hvd_hetero.")}
    found = {name if name in NAMES else name.rpartition(".")[0] for name in names}
    return (found & NAMES) - {""}


def room(module: str) -> str:
    return module.split(".")[0]


def test_the_rooms_are_those_of_the_table() -> None:
    assert {room(name) for name in NAMES} - {""} == set(LAYER)


@pytest.mark.parametrize(("name", "tree"), MODULES[1:], ids=[name for name, _ in MODULES[1:]])
def test_imports_point_to_rooms_above_in_the_table(name: str, tree: ast.Module) -> None:
    later = {other for other in own_imports(tree) if LAYER[room(other)] > LAYER[room(name)]}
    assert not later, f"{name} imports from rooms that come after its own"


def test_no_circle_of_imports() -> None:
    """Not even on one floor, or through a package's own parts."""
    below = {name: own_imports(tree) - {name} for name, tree in MODULES}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path[path.index(name):], name))}"
        for other in below[name]:
            visit(other, (*path, name))

    for name in below:
        visit(name, ())


def test_only_comm_imports_horovod() -> None:
    users = {name for name, tree in MODULES if any(room(other) == "horovod" for other in imported(tree))}
    assert users, "somebody must"
    assert {room(name) for name in users} == {"comm"}


@pytest.mark.parametrize("module", [
    "errors", "config.load", "config.schema", "cluster.device_classes", "planning.plan", "planning.local_steps",
    "planning.rebalance", "planning.sampling", "telemetry.stopwatch", "analysis.predict.simulator", "analysis.predict",
])
def test_planning_runs_without_torch_and_horovod(module: str) -> None:
    assert module in NAMES
    code = f"import sys, hvd_hetero.{module}; print([m for m in ('torch', 'horovod') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_command_answers_without_torch() -> None:
    """Help must not take the seconds that importing torch takes."""
    code = "import sys, hvd_hetero.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


# ---- Horovod's collectives ------------------------------------------------------------------------------------------

NAMED = re.compile(r"(grouped_|sparse_)?(allreduce|allgather|broadcast|alltoall|reducescatter)(_async)?_?")
UNNAMEABLE = {"barrier", "join", "broadcast_parameters", "broadcast_optimizer_state"}


def collectives(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls of Horovod's collectives, however Horovod was imported, and of what is handed one to call."""
    for node in ast.walk(tree):
        for called in (node.func, *node.args) if isinstance(node, ast.Call) else ():
            name = called.attr if isinstance(called, ast.Attribute) else ""
            owner = getattr(getattr(called, "value", None), "id", "")
            if owner == "hvd" and (NAMED.fullmatch(name) or name in UNNAMEABLE or name.endswith("_object")):
                yield name, node


def unnamed(tree: ast.AST) -> list[str]:
    """Collectives without a name of their own: Horovod would count them, and ranks that differ in count deadlock."""
    return [
        f"line {call.lineno}: hvd.{called}"
        for called, call in collectives(tree)
        if called in UNNAMEABLE or "name" not in {word.arg for word in call.keywords}
    ]


def test_horovod_is_always_imported_as_hvd() -> None:
    """So that the test below sees every call; and nothing is imported out of it but exceptions."""
    for name, tree in MODULES:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert all(alias.asname == "hvd" for alias in node.names if alias.name == "horovod.torch"), name
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("horovod"):
                assert node.module != "horovod.torch", name


@pytest.mark.parametrize(("name", "tree"), [m for m in MODULES if room(m[0]) == "comm"], ids=lambda x: x if x else None)
def test_every_collective_has_a_name(name: str, tree: ast.Module) -> None:
    assert unnamed(tree) == []


def test_there_are_collectives_to_check() -> None:
    assert sum(len(list(collectives(tree))) for _, tree in MODULES) >= 8


@pytest.mark.parametrize(("line", "bad"), [
    ("hvd.allreduce_async_(x, op=hvd.Sum, name='a')", False),
    ("hvd.allreduce_async_(x, op=hvd.Sum)", True),
    ("hvd.broadcast_async_(x, 0)", True),
    ("hvd.allgather(x)", True),
    ("call(hvd.allgather_async, x)", True),
    ("call(hvd.allgather_async, x, name='a')", False),
    ("hvd.grouped_allreduce_([x], op=hvd.Sum)", True),
    ("hvd.broadcast_object(x, 0)", True),
    ("hvd.barrier()", True),
    ("hvd.poll(h)", False),
    ("self.broadcast(x)", False),
])
def test_the_check_itself(line: str, bad: bool) -> None:
    assert bool(unnamed(ast.parse(line))) is bad


# ---- other rules ----------------------------------------------------------------------------------------------------


def test_the_environment_is_read_in_launch_and_comm_only() -> None:
    readers = {
        room(name)
        for name, tree in MODULES
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
    }
    assert readers <= {"launch", "comm"}


def test_devices_are_looked_for_in_cluster_only() -> None:
    lookers = {
        room(name)
        for name, tree in MODULES
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("is_available", "device_count")
    }
    assert lookers <= {"cluster", "launch"}


def test_no_code_branches_on_a_classs_name() -> None:
    """`fast` and `slow` are names in a config; only the plan knows them, as roles that `bias_to` may ask for."""
    for name, tree in MODULES:
        if name in ("config.load", "config.schema", "planning.plan"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                assert not words & {"fast", "slow", "gpu"}, f"{name}, line {node.lineno}"
