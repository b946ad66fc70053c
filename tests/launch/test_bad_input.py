"""What a user got wrong is said in one line, with the key, its value and a remedy, before any worker starts."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hvd_hetero.cli import CHECKING
from hvd_hetero.cluster import hardware
from hvd_hetero.launch.launcher import TRYING
from hvd_hetero.launch.program import first_slots, ranks_on

OWN = Path(__file__).parents[1] / "ranks"
PREFIX = "hvd-hetero: error: "


def assert_one_message(err: str, key: str, value: str, remedy: str) -> None:
    """One line ``KEY=VALUE: problem; remedy``, and nothing like a traceback."""
    assert err.startswith(PREFIX) and err.count("\n") == 1, err
    output, _, given_remedy = err.removeprefix(PREFIX).strip().partition("; ")
    assert output.startswith(f"{key}={value}"), err
    assert ": " in output.removeprefix(f"{key}={value}"), f"no problem is named: {err}"
    assert remedy in given_remedy, err


# ---- settings -------------------------------------------------------------------------------------------------------


def test_cuda_where_there_is_none(launched: Callable[..., tuple[int, str, str]]) -> None:
    status, _, err = launched("cluster.classes.fast.device=cuda")
    assert status == 2
    assert_one_message(err, "cluster.classes.fast.device", "'cuda'", "device: cpu")
    assert "shows 0 GPU(s)" in err


def test_one_gpu_for_two_ranks(
    launched: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with the key for it; with it, there is nothing to complain of but a driver that is not here."""
    gpu = SimpleNamespace(name="one", pci_domain_id=0, pci_bus_id=999, pci_device_id=0)
    monkeypatch.setattr(hardware, "_gpus", lambda: ([gpu], ""))
    classes = "cluster.classes={quick: {device: cuda, ranks: [0]}, slow: {device: cuda, ranks: [1]}, c: {ranks: [2]}}"
    status, _, err = launched(classes)
    assert status == 2
    assert_one_message(err, "cluster.classes.slow.device", "'cuda'", "cluster.share_gpus=true")
    with pytest.raises(pytest.fail.Exception, match="a process was started"):
        launched(classes, "cluster.share_gpus=true")


# ---- files ----------------------------------------------------------------------------------------------------------


def fashion_mnist(folder: Path, cut: int) -> Path:
    """Fashion-MNIST's four files with 20 black images a split; the last image file lacks ``cut`` bytes."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        images = struct.pack(">4i", 0x803, 20, 28, 28) + bytes(20 * 28 * 28)
        labels = struct.pack(">2i", 0x801, 20) + bytes(range(10)) * 2
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images[: len(images) - (cut if split == "t10k" else 0)])
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    return raw / "t10k-images-idx3-ubyte"


def test_a_truncated_dataset(launched: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    words = ["data.name=fashion_mnist", f"data.root={tmp_path}", "model.name=cnn", "train.batch_size=1"]
    file = fashion_mnist(tmp_path, cut=100)
    status, _, err = launched(*words)
    assert status == 2
    assert_one_message(err, str(file.parent), '"', "remove this folder and set data.download=true")
    assert "truncated" in err
    file.write_bytes(file.read_bytes() + bytes(100))
    status, _, err = launched(*words, "train.tau={fast: 32, slow: 32}")
    assert "training set has 20" in err, "whole, it is read; then the set is too small for a round"


def test_a_corrupt_archive(launched: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    whole = tmp_path / "cifar10-20k.npz"
    np.savez(whole, x=np.zeros(1000))
    assert zipfile.is_zipfile(whole)
    whole.write_bytes(whole.read_bytes()[:500])
    status, _, err = launched("data.name=cifar10", f"data.root={tmp_path}", "model.name=resnet20")
    assert status == 2
    assert_one_message(err, str(whole), "'", "fetch the file again")


@pytest.mark.parametrize("left", ["summary.json", "config.yaml"])
def test_a_folder_that_holds_a_run(
    launched: Callable[..., tuple[int, str, str]], tmp_path: Path, left: str
) -> None:
    """Whatever is left of a run, also of one that did not end; with run.overwrite the line is made."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / left).write_text("{}")
    status, out, err = launched(f"run.dir={folder}")
    assert (status, out) == (2, "")
    assert_one_message(err, "run.dir", f"'{folder}'", "run.overwrite=true")
    status, out, err = launched(f"run.dir={folder}", "run.overwrite=true", "--print")
    assert status == 0 and "horovodrun" in out and err == ""
    assert (folder / left).read_text() == "{}", "nothing is touched before the job starts"


def test_a_folder_with_other_things_is_taken(
    launched: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert launched(f"run.dir={tmp_path}", "--print")[0] == 0


@pytest.mark.parametrize("text", ["train: [", "- 1", "train: {epochs: 3}}"])
def test_a_broken_file(launched: Callable[..., tuple[int, str, str]], tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    status, _, err = launched(str(file))
    assert status == 2
    assert_one_message(err, "config file", f"'{file}'", "")


def test_the_line_that_is_printed_names_everything(launched: Callable[..., tuple[int, str, str]]) -> None:
    """--print shows the line and starts nothing."""
    status, out, _ = launched("--print", "cluster.hosts=localhost:2,node7:3", "cluster.classes={a: {ranks: 0-4}}",
                              "cluster.start_timeout_sec=11", "cluster.network_interface=eth7", "train.epochs=3")
    assert status == 0
    for part in ("horovodrun --gloo -np 5 -H localhost:2,node7:3", "--start-timeout 11", "--network-interfaces eth7",
                 "hvd_hetero train", "train.epochs=3"):
        assert part in out, out


# ---- what only the ranks can find -----------------------------------------------------------------------------------


def messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.partition(PREFIX)[2] for line in (done.stdout + done.stderr).splitlines() if PREFIX in line]


def of_ranks(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What ranks said, as plain horovodrun prefixes it."""
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("[")]


@pytest.mark.parametrize(("words", "message"), [
    pytest.param(["-m", "hvd_hetero", "train", "train.epohs=3"],
                 "train.epohs=3: is not a known key; did you mean 'train.epochs'?", marks=pytest.mark.slow),
    (["-m", "hvd_hetero", "train", "model.target=own_parts:model_unless_rank_1"], "rank 1: model.target="),
    pytest.param(["bad_object.py"], "loss='CrossEntropyLoss': is not per sample", marks=pytest.mark.slow),
], ids=["all ranks", "one rank", "a user's program"])
def test_plain_horovodrun_says_it_once(
    horovodrun: Callable[..., Any], tmp_path: Path, words: list[str], message: str
) -> None:
    """horovodrun itself exits with 1 and a traceback of its own; of the ranks' there is none."""
    folder = str(tmp_path / "run")
    done = horovodrun(2, [sys.executable, *words, folder if "bad_object.py" in words else f"run.dir={folder}"], cwd=OWN)
    assert done.returncode != 0
    assert len(messages(done)) == 1 and messages(done)[0].startswith(message), done.stderr
    assert not [text for text in of_ranks(done) if "Traceback" in text]
    assert "Exit code: 2" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.horovod
def test_the_launcher_starts_nothing(tmp_path: Path) -> None:
    """The real one, with a Python to run horovodrun by that would tell."""
    (tmp_path / "python").write_text(f"#!/bin/sh\ntouch {tmp_path / 'was-started'}\n")
    (tmp_path / "python").chmod(0o755)
    code = f"import sys; sys.executable = '{tmp_path}/python'; from hvd_hetero.cli import main; sys.exit(main())"
    for words, status in ((["data.args={train_limit: 0}"], 2), ([], 0)):
        done = subprocess.run([sys.executable, "-c", code, "launch", f"run.dir={tmp_path / 'run'}", *words],
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stderr
        assert (tmp_path / "was-started").exists() == (status == 0)
        phases = [line for line in done.stdout.splitlines() if line in (CHECKING, TRYING) or "starting " in line]
        assert phases == [CHECKING, TRYING, *(["starting 2 ranks on localhost"] if status == 0 else [])], done.stdout
    assert not (tmp_path / "run").exists()


def test_where_ranks_are_is_told_in_a_few_words() -> None:
    assert ranks_on([("localhost", 1)]) == "1 rank on localhost"
    assert ranks_on([("a", 2), ("b", 1), ("a", 1)]) == "4 ranks on a, b"
    assert ranks_on([(f"node{i}", 8) for i in range(16)]) == "128 ranks on 16 hosts"


def test_a_program_ends_with_the_line_of_its_rank(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    """Nothing was tried out beforehand, and horovodrun's own words are kept back."""
    words = ["run", "-np", "2", sys.executable, "bad_object.py", str(tmp_path / "run")]
    done = hvd_hetero(words, cwd=OWN)
    assert done.returncode == 2 and done.stdout == "starting 2 ranks on localhost\n"
    assert_one_message(done.stderr, "loss", "'CrossEntropyLoss'", "reduction='none'")


def test_ranks_take_the_first_slots() -> None:
    assert first_slots([("a", 2), ("b", 2), ("c", 1)], 3) == [("a", 2), ("b", 1)]


@pytest.mark.slow
def test_a_class_too_slow_for_tau_is_found_by_measurement(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    """It ends the job like any other bad input: one message, status 2."""
    done = hvd_hetero(["launch", f"run.dir={tmp_path / 'run'}", "train.tau=2", "profile.seconds=0.2",
                       "cluster.classes.slow.slowdown=40"])
    assert done.returncode == 2, done.stderr
    assert len(messages(done)) == 1, done.stderr
    assert messages(done)[0].startswith("train.tau=2: class slow is")
    assert "train.tau=" in messages(done)[0].rpartition("; ")[2]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


def test_settings_may_follow_options(launched: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {epochs: 3}")
    status, out, _ = launched("mine.yaml", "--print", "train.lr=0.5")
    assert status == 0 and "mine.yaml train.lr=0.5" in out
    assert launched("--print", "train.epohs=3")[0] == 2


def test_an_unknown_option(launched: Callable[..., tuple[int, str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        launched("--prnt", "train.lr=0.5")
    assert caught.value.code == 2
    assert "--prnt" in capsys.readouterr().err


def test_version_of_the_command() -> None:
    """The command that ranks run is the one this environment holds."""
    done = subprocess.run([Path(sys.executable).with_name("hvd-hetero"), "--version"], capture_output=True, text=True)
    import hvd_hetero

    assert done.stdout.strip() == hvd_hetero.__version__
