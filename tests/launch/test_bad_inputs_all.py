"""Whatever a user may get wrong: one line with key or file, value and remedy, status 2, and nothing is started."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from bad_commands import COMMANDS, GOOD, OBJECTS
from bad_files import CHECKPOINTS, DATA, OTHERS, Case
from bad_settings import SETTINGS

import hvd_hetero
from hvd_hetero.cli import main
from hvd_hetero.errors import UserError

pytestmark = pytest.mark.horovod

OWN = Path(__file__).parents[1] / "ranks"
BY_SETTINGS = [Case(",".join(words), None, ["launch", *words], f"{key}={value}", remedy)
               for words, key, value, remedy in SETTINGS]
CASES = [*BY_SETTINGS, *COMMANDS, *DATA, *OTHERS, *CHECKPOINTS]


@pytest.fixture(autouse=True)
def nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process, and no trainer: Horovod would be started there."""

    def refuse(*args: Any, **options: Any) -> None:
        pytest.fail(f"something was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr("hvd_hetero.training.api.Trainer", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(OWN))


def test_there_are_many_and_no_two_are_the_same() -> None:
    assert len(CASES) + len(OBJECTS) >= 250
    assert len({(case.name, *case.words) for case in CASES}) == len(CASES)
    assert len({tuple(case.words) for case in BY_SETTINGS}) == len(BY_SETTINGS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    if case.make is not None:
        case.make(folder)
    words = [word.replace("{tmp}", str(folder)) for word in case.words]
    try:
        status: Any = main(words)
    except SystemExit as left:  # argparse has its own way
        status = left.code
    output = capsys.readouterr()
    assert status == 2
    assert "Traceback" not in output.out + output.err
    if words[:1] == ["doctor"] and not output.err:  # what it finds is its result
        message = output.out.splitlines()[-1].removeprefix("problem: ")
    else:
        assert output.out == ""
        *usage, line = output.err.splitlines()
        assert not usage or usage[0].startswith("usage: "), output.err
        message = line.partition("error: ")[2]
    assert message.startswith(case.begins.replace("{tmp}", str(folder))), message
    assert case.remedy in message.removeprefix(case.begins), message
    assert not (folder / "was-run").exists(), "code in a file was run"
    assert not list(tmp_path.glob("run*")) and not list(tmp_path.glob(".hvd*")), "something was left behind"


@pytest.mark.parametrize(("given", "begins", "remedy"), [case[1:] for case in OBJECTS], ids=[c[0] for c in OBJECTS])
def test_bad_object(given: dict[str, Any], begins: str, remedy: str, tmp_path: Path) -> None:
    """A program that is the whole job gets the exception; of a job, rank 0 says it (tests/launch/test_bad_input.py)."""
    objects = {**GOOD, **given}
    config, overrides = objects.pop("config", None), objects.pop("overrides", {})
    if isinstance(overrides, dict) and all(isinstance(key, str) for key in overrides):
        alone = {"cluster.classes": {"a": {"ranks": 0}}, "train.tau": {"a": 4}, "run.dir": str(tmp_path)}
        overrides = alone | overrides
    with pytest.raises(UserError) as caught:
        hvd_hetero.train(config, overrides, **objects)
    message = str(caught.value)
    assert message.startswith(begins) and remedy in message.partition("; ")[2], message
    assert "\n" not in message
