"""The import rules, read from the source: rooms have an order, Horovod has its room, every collective has a name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hvd_hetero"
BASE = {"errors", "files", "log", "secrets", "describe", "random_state", "torchvision_help", "compiler_help"}
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
    "planning.rebalance", "planning.sampling", "telemetry.stopwatch", "algorithms", "analysis.predict.simulator",
    "analysis.predict",
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
            if isinstance(called, ast.Attribute) and is_collective(called):
                yield called.attr, node


def is_collective(used: ast.Attribute) -> bool:
    """Whether this is one of Horovod's collectives, called or not."""
    owner, name = getattr(used.value, "id", ""), used.attr
    return owner == "hvd" and bool(NAMED.fullmatch(name) or name in UNNAMEABLE or name.endswith("_object"))


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


def test_every_collective_has_a_name() -> None:
    assert {name: lines for name, tree in MODULES if (lines := unnamed(tree))} == {}


def test_the_check_sees_every_use_of_a_collective() -> None:
    """Each is called on the spot or handed to a call, and stands in comm; there is no other way to use one."""
    for name, tree in MODULES:
        uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_collective(node)]
        assert len(uses) == len(list(collectives(tree))), name
    assert {room(name) for name, tree in MODULES if any(collectives(tree))} == {"comm"}


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


def rooms_that_use(*attributes: str) -> set[str]:
    return {
        room(name)
        for name, tree in MODULES
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in attributes
    }


def test_the_environment_is_read_in_launch_and_comm_only() -> None:
    assert rooms_that_use("environ", "getenv", "environb") == {"launch", "comm"}


def test_devices_are_looked_for_in_cluster_only() -> None:
    assert rooms_that_use("is_available", "device_count") == {"cluster"}


MADE = {"zeros", "ones", "empty", "full", "rand", "randn", "linspace"}


def test_no_tensor_is_of_the_default_type() -> None:
    """A user's module may have set another one, of which Horovod knows no sum, or which is another one on each rank."""
    found = [
        f"{name}:{node.lineno}"
        for name, tree in MODULES
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MADE
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if not any(keyword.arg == "dtype" for keyword in node.keywords)
    ]
    assert not found


CLASS_NAMES = {"fast", "slow", "gpu"}
ROLES = {
    "planning.plan",  # sampling.bias_to
    "algorithms.synchronous", "analysis.predict.predict",  # algorithm.participants, and its prediction
}
"""Where a setting asks for the class in a role, whatever it is called."""


def says_class_name(tree: ast.AST, constants: set[str]) -> bool:
    """Whether a class's name is written in this tree, or a constant that holds one."""
    return any(
        (isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in CLASS_NAMES)
        or (isinstance(node, ast.Name) and node.id in constants)
        or (isinstance(node, ast.Attribute) and node.attr in constants)
        for node in ast.walk(tree)
    )


def constants_of(tree: ast.Module) -> set[str]:
    """The constants of a module that hold a class's name, alone or with others, or another such constant."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and says_class_name(node.value, found):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def branches(tree: ast.AST, constants: set[str]) -> list[int]:
    """The lines that compare something with a class's name, by an operator, a case or a prefix."""
    names = constants | {
        alias.asname or alias.name
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        for alias in node.names if alias.name in constants
    }
    return [node.lineno for node in ast.walk(tree) for part in compared(node) if says_class_name(part, names)]


def compared(node: ast.AST) -> Sequence[ast.AST]:
    """What a node compares something with, if it does."""
    match node:
        case ast.Compare():
            return [node]
        case ast.Match():
            return [case.pattern for case in node.cases]
        case ast.Call(func=ast.Attribute(attr="startswith" | "endswith")):
            return node.args
        case ast.Subscript(value=ast.Dict()):
            return [node.value]
    return []


def test_no_code_branches_on_a_classs_name() -> None:
    """`fast` and `slow` are names in a config; the code knows them only as roles that a setting may ask for."""
    constants = set().union(*(constants_of(tree) for _, tree in MODULES))
    found = {name: lines for name, tree in MODULES if (lines := branches(tree, constants))}
    assert set(found) == ROLES, found


@pytest.mark.parametrize(("source", "bad"), [
    ("if name == 'fast': pass", True),
    ("if name in ('fast', 'cpu'): pass", True),
    ("if name.startswith('slow'): pass", True),
    ("FAST = 'fast'\nif name == FAST: pass", True),
    ("FAST: str = 'fast'\nQUICK = (FAST, 'quick')\nok = name not in QUICK", True),
    ("from roles import SLOW as tortoise\nif name == tortoise: pass", True),
    ("import roles\nif name == roles.SLOW: pass", True),
    ("match name:\n    case 'cpu' | 'gpu': pass", True),
    ("match name:\n    case roles.SLOW: pass", True),
    ("lr = {'fast': 1, 'slow': 2}[name]", True),
    ("if name == plan.fastest.name: pass", False),
    ("bias_to = 'fast'", False),
    ("if kind == 'quick': pass", False),
])
def test_the_check_for_class_names_itself(source: str, bad: bool) -> None:
    tree = ast.parse(source)
    assert bool(branches(tree, constants_of(tree) | {"SLOW"})) is bad
