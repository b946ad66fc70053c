"""data.download: torchvision fetches published files from a server of the tests, once for all ranks of a host."""

from __future__ import annotations

import fcntl
import importlib
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import everything
from published_files import Attributes, make_cifar, make_mnist, md5, pack_cifar, served
from together import together

from hvd_hetero.data import load, published
from hvd_hetero.errors import ConfigError

datasets = importlib.import_module("torchvision.datasets")  # hvd_hetero has to be there first

JOB = """
import sys
from hvd_hetero.cli import main
from torchvision.datasets import CIFAR10

for name, value in {attributes!r}.items():
    setattr(CIFAR10, name, value)
sys.exit(main(sys.argv[1:]))
"""
SETTINGS = ["train", "data.name=cifar10", "data.download=true", "model.name=resnet20", "train.epochs=1",
            "train.batch_size=2", "train.tau={fast: 2, slow: 1}",
            "cluster.classes={fast: {ranks: 0}, slow: {ranks: 1}}", "checkpoint.every_sec=null"]  # fmt: skip


def fetch(root: Path, name: str = "cifar10") -> Any:
    return load(name, str(root), None, {}, download=True)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray], Attributes]:
    """A server's folder with the archive of CIFAR-10, its pixels, and what torchvision is to know of it."""
    server = tmp_path / "server"
    server.mkdir()
    pixels, attributes = make_cifar(tmp_path / "made", rows=8)
    return server, pixels, attributes | pack_cifar(tmp_path / "made", server) | {"url": ""}


def use(monkeypatch: pytest.MonkeyPatch, attributes: Attributes, address: str, name: str = "CIFAR10") -> None:
    for key, value in (attributes | {"url": f"{address}/cifar-10-python.tar.gz"}).items():
        monkeypatch.setattr(getattr(datasets, name), key, value)


def test_it_is_fetched_into_a_new_folder_once(
    packed: tuple[Path, dict[str, np.ndarray], Attributes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, pixels, attributes = packed
    root = tmp_path / "new" / "root"
    with served(server) as (address, fetched):
        use(monkeypatch, attributes, address)
        for where in (root, root, root / "cifar-10-batches-py"):
            assert np.array_equal(everything(fetch(where).train)[0].numpy(), pixels["train"])
        first = len(fetched)
        assert set(fetched) == {"/cifar-10-python.tar.gz"}
        output = capsys.readouterr().err
        assert output.count(f"downloading CIFAR10 into {root}\n") == 1 and "100%" in output, "with progress"
        (root / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut")
        with pytest.raises(ConfigError, match="truncated or corrupt.*data.download=true") as caught:
            load("cifar10", str(root), None, {})
        assert caught.value.key == str(root / "cifar-10-batches-py")
        assert len(fetch(root).test) == len(pixels["test"])
        assert len(fetched) == first, "the archive is still there, and unpacked once more"


def test_a_folder_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_mnist(tmp_path / "FashionMNIST" / "raw")
    monkeypatch.setattr(published, "_download", lambda *_: pytest.fail("all is there"))
    assert len(fetch(tmp_path, "fashion_mnist").train) == 12


def test_mnist_from_its_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = make_mnist(tmp_path / "server", ".gz")
    files = [(path.name, md5(path)) for path in sorted((tmp_path / "server").iterdir())]
    monkeypatch.setattr(datasets.MNIST, "resources", files)
    with served(tmp_path / "server") as (address, _):
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{address}/"])
        data = fetch(tmp_path / "root", "mnist")
    assert np.array_equal(everything(data.test)[0].squeeze(1).numpy(), pixels["t10k"])


def test_what_ends_a_download(
    packed: tuple[Path, dict[str, np.ndarray], Attributes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _, attributes = packed

    def refused(root: Path, why: str) -> None:
        with pytest.raises(ConfigError, match=rf"CIFAR10 cannot be downloaded into {root}: .*{why}") as caught:
            fetch(root)
        assert (caught.value.key, caught.value.value) == ("data.download", True)
        assert socket.getdefaulttimeout() is None

    with served(server) as (address, _):
        use(monkeypatch, attributes | {"tgz_md5": "0" * 32}, address)
        refused(tmp_path / "a", "corrupted")
        use(monkeypatch, attributes, f"{address}/nowhere")
        refused(tmp_path / "c", "404")
        use(monkeypatch, attributes, address)
        (tmp_path / "file").write_text("")
        refused(tmp_path / "file", "File ?[eE]xists")
        assert len(fetch(tmp_path / "c").train), "what has failed before does not count"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(monkeypatch, attributes, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(published, "SILENCE_SEC", 0.2)
        refused(tmp_path / "b", "timed out")


def test_one_that_waits_shares_the_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lock is held here as by another process, which then fails."""
    with (tmp_path / published.LOCK).open("a+") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = pool.submit(fetch, tmp_path)
        while "waiting for the download of CIFAR10" not in capsys.readouterr().err:
            assert not other.done(), other.result()
            time.sleep(0.01)
        lock.write("no route")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_UN)
        with pytest.raises(ConfigError, match="no route"):
            other.result()


@pytest.mark.parametrize(("name", "target", "message"), [
    ("tiny_imagenet", None, "downloads no 'tiny_imagenet'"), ("digits", None, "downloads no 'digits'"),
    (None, "own:data", "named datasets"),
])
def test_what_cannot_be_downloaded(tmp_path: Path, name: str | None, target: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(name, str(tmp_path), target, {}, download=True)
    assert caught.value.key == "data.download"


def test_two_ranks_of_a_host_fetch_once_and_fail_together(
    horovodrun: Callable[..., Any], packed: tuple[Path, dict[str, np.ndarray], Attributes], tmp_path: Path
) -> None:
    server, _, attributes = packed

    def run(name: str, address: str) -> Any:
        program = tmp_path / f"{name}.py"
        program.write_text(JOB.format(attributes=attributes | {"url": address}))
        folders = [f"data.root={tmp_path / f'{name}-data'}", f"run.dir={tmp_path / name}"]
        return horovodrun(2, [sys.executable, program, *SETTINGS, *folders])

    with served(server) as (address, fetched):
        good, bad = together(lambda: run("good", f"{address}/cifar-10-python.tar.gz"),
                             lambda: run("bad", f"{address}/none.tar.gz"))
    assert good.returncode == 0, good.stderr
    assert "downloading CIFAR10 into" in good.stdout + good.stderr
    assert fetched.count("/cifar-10-python.tar.gz") == 2, "one GET looks for a redirect, one fetches"
    assert (tmp_path / "good" / "summary.json").exists()
    errors = [line for line in (bad.stdout + bad.stderr).splitlines() if "error: " in line]
    assert len(errors) == 1 and "error: data.download=True: CIFAR10 cannot be downloaded" in errors[0], bad.stderr
    assert "404" in errors[0] and "Exit code: 2" in bad.stderr
