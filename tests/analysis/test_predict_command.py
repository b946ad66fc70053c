"""``hvd-hetero plan``: its table and files, what it refuses and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_hetero.cli import main

EQUAL = ["cluster.classes={fast: {ranks: [0]}, slow: {ranks: [1]}}", "train.batch_size=4", "train.epochs=3"]
SPEEDS = ["--step-ms", "fast=1,slow=8", "--params", "1000", "--samples", "1440"]


def profile(**changes: Any) -> dict[str, Any]:
    """As ``hvd-hetero profile`` writes it."""
    fast = {"name": "fast", "device": "cpu", "ranks": 1, "batch_size": 16, "step_sec": 0.003, "step_sec_alone": 0.003,
            "by_batch": {"8": 0.002, "16": 0.003, "32": 0.005}, "jitter": 0.0}
    slow = {**fast, "name": "slow", "step_sec": 0.03, "by_batch": {}}
    key = {"model": "mlp", "batch_size": 16, "device": {"fast": "x", "slow": "x"}, "threads": {}, "versions": {}}
    return {"version": 1, "key": key, "samples": 4000, "parameters": 1000, "parameter_bytes": 4000,
            "classes": [fast, slow], "average_sec": 0.01, "tau": {}, "predicted_blocked": {}} | changes


def saved(folder: Path, content: Any) -> str:
    (folder / "profile.json").write_text(json.dumps(content))
    return str(folder / "profile.json")


def test_from_a_profile_to_table_and_pictures(tmp_path: Path, hvd_hetero: Callable[..., Any]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra [report]")
    done = hvd_hetero(["plan", *EQUAL, "train.batch_size=16", "train.tau=20", "--profile", saved(tmp_path, profile()),
                       "--cores", "4", "--out", tmp_path / "out"])
    assert done.returncode == 0, done.stderr
    for words in ("sync_sgd, all", "eager_sgd, majority", "Recommended: tau", "without it",
                  "Class slow was timed at one batch size", "fitted to the measured 10 ms",
                  "of 2 ranks on 1 host of 4 cores", "hvd.init grows fastest", "A round's bookkeeping"):
        assert words in done.stdout
    assert "Class fast was timed" not in done.stdout
    content = json.loads((tmp_path / "out/table.json").read_text())
    local = next(row for row in content["methods"] if row["label"] == "unbalanced, biased local SGD")
    assert local["tau"] == {"fast": 20, "slow": 2} and local["seconds"] == pytest.approx(local["averages"] * 0.07)
    assert content["recommended"]["tau_fastest"] in [row["tau_fastest"] for row in content["sweep"]]
    start = content["start"]
    assert start["seconds"] == pytest.approx(sum(start["phases"].values())) and start["fastest"] == "hvd.init"
    smaller = next(row for row in content["batches"] if row["scale"] == 0.5)
    assert smaller["batch_size"] == {"fast": 8, "slow": 8}
    for name in ("methods.png", "tau.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_neither_torch_nor_horovod_is_imported(tmp_path: Path) -> None:
    """With everything that the command does, pictures included."""
    arguments = ["plan", *EQUAL, *SPEEDS, "--out", str(tmp_path)]
    code = f"""
import sys
from hvd_hetero.cli import main
status = main({arguments!r})
print(status, [name for name in ("torch", "horovod") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_without_matplotlib_a_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", *EQUAL, *SPEEDS, "--out", str(tmp_path)]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_the_seed_decides(capsys: pytest.CaptureFixture[str]) -> None:
    output = []
    for seed in (1, 1, 2):
        assert main(["plan", *EQUAL, *SPEEDS, "--jitter", "fast=0.2,slow=0.1", f"run.seed={seed}"]) == 0
        output.append(capsys.readouterr().out)
    assert output[0] == output[1] != output[2]


@pytest.mark.slow
def test_how_steps_vary_may_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    output = {}
    for distribution in ("none", "normal", "lognormal", None):
        words = ["--jitter", "fast=0.2,slow=0.1", *([] if distribution is None else ["--jitter-law", distribution])]
        assert main(["plan", *EQUAL, *SPEEDS, *words]) == 0
        output[distribution] = capsys.readouterr().out
    assert output[None] == output["lognormal"] and len({output["none"], output["normal"], output["lognormal"]}) == 3


def test_the_configuration_may_name_more_ranks_than_were_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = 'cluster.classes={fast: {ranks: "0-799"}, slow: {ranks: "800-999"}}'
    words = ["plan", *EQUAL, classes, "train.tau=20", "--profile", saved(tmp_path, profile()), "--samples", "1000000"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "class fast, ranks 800" in out and "measured with 1 ranks and is planned with 800" in out


def test_a_profile_of_a_disturbed_machine_is_good_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = profile()
    content["classes"][1]["jitter"] = 2.5
    words = ["plan", *EQUAL, "train.batch_size=16", "train.tau=20", "--profile", saved(tmp_path, content)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "Class slow's measured jitter of 2.5 is taken as 2" in out and "jitter 2\n" in out


def test_automatic_classes_are_those_of_the_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "cluster.classes=auto", "--profile", saved(tmp_path, profile())]) == 0
    assert "class slow, ranks 1" in capsys.readouterr().out


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "says"), [
    (["--step-ms", "fast=1,slow=0"], "--step-ms slow=0.0: is not a number above 0"),
    (["--step-ms", "fast=1,slow=-3"], "is not a number above 0"),
    (["--step-ms", "fast=1,slow=nan"], "is not a number above 0"),
    (["--step-ms", "fast=1,slwo=8"], "'slwo' names no device class; did you mean 'slow'?"),
    (["--step-ms", "fast=1"], "gives nothing for class slow; name every class: --step-ms fast=MILLISECONDS"),
    (["--step-ms", "fast=1,slow"], "'slow' is not CLASS=NUMBER"),
    (["--step-ms", "fast=1,fast=2,slow=8"], "names fast twice"),
    (["--jitter", "fast=-0.1"], "is not between 0 and 2"),
    (["--jitter-law", "gamma"], "--jitter-law='gamma': is no distribution of steps"),
    (["--jitter", "slow=3"], "is not between 0 and 2 for class slow"),
    (["--latency-ms", "-1"], "--latency-ms=-1.0: is not 0 or more"),
    (["--bandwidth-mbit", "0"], "--bandwidth-mbit=0.0: is not a number above 0"),
    (["--samples", "0"], "--samples=0: is not a number above 0"),
    (["--cores", "0"], "--cores=0: is not a number above 0"),
    (["--model-mb", "3"], "--model-mb says the same"),
    (["train.tua=3"], "is not a known key"),
    (["algorithm.participants=fast"], "is not a known key"),
    (["algorithm.name=sgd"], "is not a known method"),
    (["--samples", "4"], "no tau can be planned"),
    (["cluster.classes=auto"], "does not tell how many ranks each class has"),
    (["--profile", "nowhere.json"], "cannot be read"),
])
def test_bad_input_ends_with_status_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *EQUAL, *SPEEDS, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hvd-hetero: error: ") and says in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(("excluded", "says"), [
    ("--step-ms", "gives nothing for class fast"),
    ("--params", "give --params N or --model-mb MB"),
    ("--samples", "give --samples N"),
])
def test_what_is_missing_is_named(excluded: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = SPEEDS.index(excluded)
    assert main(["plan", *EQUAL, *SPEEDS[:place], *SPEEDS[place + 2 :]]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "says"), [
    ({"version": 2}, "has version 2, not 1"),
    ({"samples": 0}, "samples=0: is not a number above 0"),
    ({"average_sec": -1}, "average_sec=-1: is not 0 or more"),
    ({"classes": []}, "has no classes"),
    ({"classes": [{**profile()["classes"][0], "step_sec": 0}]}, "fast.step_sec=0: is not a number above 0"),
    ({"classes": [{**profile()["classes"][0], "by_batch": {"8": -1}}]}, "fast.by_batch.8=-1: is not a number above 0"),
    ({"classes": profile()["classes"][:1]}, "gives nothing for class slow"),
])
def test_profiles_that_cannot_be(
    changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *EQUAL, "--profile", saved(tmp_path, profile(**changes))]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["plan", *EQUAL, *SPEEDS, "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
