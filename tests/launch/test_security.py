"""What is read runs no code, what is written stays where it belongs, and what is kept tells no secret."""

from __future__ import annotations

import ast
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from store_helpers import save_round, some_state

from hvd_hetero import algorithms, data, models
from hvd_hetero.analysis.report.write import slug
from hvd_hetero.checkpoint import CheckpointError, Store
from hvd_hetero.cli import main
from hvd_hetero.config.load import load
from hvd_hetero.errors import ConfigError
from hvd_hetero.files import check_no_links, check_writable, restrict_umask, write_text
from hvd_hetero.planning.speed_profile import load_profile
from hvd_hetero.secrets import without_passwords
from hvd_hetero.telemetry.run_folder import RunFolder
from hvd_hetero.training.api import run_dir

pytestmark = pytest.mark.horovod

PACKAGE = Path(__file__).parents[2] / "hvd_hetero"
CALLS = [(path, node) for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
         if isinstance(node, ast.Call)]


@pytest.fixture
def careless() -> Iterator[None]:
    """A umask that lets everybody do everything."""
    before = os.umask(0)
    yield
    os.umask(before)


# ---- no code from files ---------------------------------------------------------------------------------------------


def test_nothing_is_unpickled() -> None:
    """Readers are asked for plain tensors and arrays; CIFAR's own pickles go through a reader that admits no code."""
    loads = [ast.unparse(call) for _, call in CALLS if ast.unparse(call.func) in ("torch.load", "np.load")]
    assert loads and all("weights_only=True" in text or "allow_pickle=False" in text for text in loads), loads
    unpickling = {"pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "dill.load", "marshal.loads",
                  "joblib.load", "yaml.load", "yaml.unsafe_load", "eval", "exec", "shelve.open"}
    assert not [(path.name, call.lineno) for path, call in CALLS if ast.unparse(call.func) in unpickling]
    nodes = [(path, node) for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    assert not [path for path, node in nodes if isinstance(node, ast.Import) for n in node.names if n.name == "pickle"]
    names = {n.name for _, node in nodes if isinstance(node, ast.ImportFrom) and node.module == "pickle"
             for n in node.names}  # fmt: skip
    assert names <= {"UnpicklingError"}, "what torch's reader of plain tensors raises"
    assert not [call.lineno for _, call in CALLS for k in call.keywords
                if k.arg in ("shell", "trust_remote_code") and ast.unparse(k.value) == "True"]


@pytest.mark.parametrize("name", ["os:system", "own_parts:norm_net", "os", "torch.nn.Linear", "../mlp", "__builtins__"])
def test_a_name_imports_nothing(name: str) -> None:
    """Only what is called a target is a path; train.loss, optimizer and scheduler are, if there is a colon in them."""
    before = set(sys.modules)
    for look_up in (lambda: models.build(name, None, {}), lambda: data.load(name, "/", None, {}),
                    lambda: algorithms.method(name)):
        with pytest.raises(ConfigError):
            look_up()
    assert set(sys.modules) == before


def test_neither_checkpoint_nor_profile_imports_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"target": "planted:make", "class": "planted.Thing", "$type": "planted", "__reduce__": ["planted"]}
    state = {**some_state(), "optimizer": names, "planted": torch.ones(2)}
    checkpoint = save_round(Store(tmp_path), 10, [state])
    assert checkpoint.load(0)["optimizer"] == names, "text is text"
    c = {"name": "planted", "device": "planted", "ranks": 1, "batch_size": 1, "step_sec": 1.0, "step_sec_alone": 1.0,
         "by_batch": {}, "jitter": 0.0}
    (tmp_path / "p.json").write_text(json.dumps(
        {"version": 1, "key": {"model": "planted:make"}, "samples": 1, "parameters": 1, "parameter_bytes": 4,
         "classes": [c], "average_sec": 1.0, "tau": {}, "predicted_blocked": {}}))
    assert load_profile(tmp_path / "p.json").key == {"model": "planted:make"}
    assert "planted" not in sys.modules


# ---- what is written, and where -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("careless")
def test_every_command_takes_rights_from_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of plan is looked at; ranks, whoever starts them, do the same (tests/launch/test_security_jobs.py)."""
    out = tmp_path / "new" / "out"
    words = ["plan", "--step-ms", "fast=1,slow=2", "--samples", "10000", "--params", "10", "--out", str(out)]
    assert main(words) == 0
    made = [tmp_path / "new", out, *out.iterdir()]
    assert len(made) > 2 and not [path for path in made if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)]


@pytest.mark.parametrize(("umask", "left"), [(0, 0o022), (0o002, 0o022), (0o077, 0o077), (0o027, 0o027)])
@pytest.mark.usefixtures("careless")
def test_a_stricter_umask_stays(umask: int, left: int) -> None:
    os.umask(umask)
    restrict_umask()
    assert os.umask(0) == left


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "out.json").symlink_to(precious)
    write_text(tmp_path / "out.json", "new")
    assert (tmp_path / "out.json").read_text() == "new" and not (tmp_path / "out.json").is_symlink()
    (tmp_path / ".out.json.part").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        write_text(tmp_path / "out.json", "newer")
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "mlflow", "wandb", "checkpoint", "checkpoints"])
def test_a_link_in_a_runs_folder_is_refused(tmp_path: Path, name: str) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    (run / name).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=f"{name} in it is a link to .*remove the link"):
        RunFolder(run, overwrite=True)
    assert not elsewhere.exists()


def test_a_link_to_the_runs_folder_itself_is_fine(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    RunFolder(tmp_path / "run", overwrite=False).close()
    assert (tmp_path / "disk" / "metrics.jsonl").exists()


def test_a_checkpoint_goes_through_no_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "000010").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="is a link"):
        Store(tmp_path).write_shard(10, 0, some_state())
    assert not list(elsewhere.iterdir())


def test_names_stay_in_their_folders() -> None:
    """A run's name is checked; labels become file names without anything special in them."""
    assert run_dir(load((), {"run.name": "v1.2 of mine"}, algorithms.method)).parent == Path("runs")
    for name in ("../x", "/x", "a/b", "..", ".", "a\nb", "", "-x"):
        with pytest.raises(ConfigError, match="run.name"):
            load((), {"run.name": name}, algorithms.method)
    for label in ("../../x", "/etc/passwd", "..", "a/b", "a\0b", "\n", "~"):
        assert Path(slug(label)).parts == (slug(label),) and slug(label) not in (".", "..")


def test_what_cannot_be_written_is_said_beforehand_and_nothing_is_left(tmp_path: Path) -> None:
    check_writable("x", tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/none/x")):
        with pytest.raises(ConfigError, match="cannot be written"):
            check_writable("x", path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="loop in it is a link"):
        check_no_links("x", tmp_path, ("loop",))


# ---- secrets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "kept"), [
    ("train.lr=0.1", "train.lr=0.1"),
    ("data.args={url: 'https://me:hunter2@host/x'}", "data.args={url: 'https://***@host/x'}"),
    ("data.args={url: 'https://host/x?token=hunter2&page=3'}", "data.args={url: 'https://host/x?token=***&page=3'}"),
    ("data.args={api_key: hunter2, size: 3}", "data.args={api_key: ***, size: 3}"),
    ("data.args.password=hunter2", "data.args.password=***"),
    ("data.args.tokenizer=/models/bert", "data.args.tokenizer=/models/bert"),
    ("run.dir=me@host:x", "run.dir=me@host:x"),
])
def test_a_kept_command_line_is_without_passwords(word: str, kept: str) -> None:
    assert without_passwords(word) == kept
