"""Files that are refused: of datasets, weights, profiles and checkpoints.

A case has a name, what makes its files in a folder, the words of the command with ``{tmp}`` for that folder, and what
the message says: its beginning, and a part of its remedy. Code of a file, were it run, would make ``{tmp}/was-run``.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from store_helpers import save_round

from hvd_hetero import algorithms
from hvd_hetero.checkpoint import Store
from hvd_hetero.config.load import load
from hvd_hetero.training.fingerprint import made_with

AGAIN = "fetch the file again"
DOWNLOAD = "set data.download=true"
BATCHES = "cifar-10-batches-py"
PROFILE = "make one with hvd-hetero profile"
ALONE = ["cluster.classes={a: {ranks: 0}}", "train.tau={a: 4}"]


class Case(NamedTuple):
    name: str
    make: Callable[[Path], Any] | None
    words: Sequence[str]
    begins: str
    remedy: str


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder / "was-run"),)


# ---- datasets -------------------------------------------------------------------------------------------------------


def fashion(name: str, content: Callable[[bytes], bytes] | None, folder: str = "fashion-mnist",
            ending: str = ".gz") -> Callable[[Path], None]:
    """Fashion-MNIST of 20 images a split, one file of it changed, or left out."""

    def make(tmp: Path) -> None:
        (tmp / folder).mkdir(parents=True)
        for split in ("train", "t10k"):
            files = {f"{split}-images-idx3-ubyte": struct.pack(">4i", 0x803, 20, 28, 28) + bytes(20 * 28 * 28),
                     f"{split}-labels-idx1-ubyte": struct.pack(">2i", 0x801, 20) + bytes(range(10)) * 2}
            for each, raw in files.items():
                if each == name and content is None:
                    continue
                raw = content(raw) if each == name and content is not None else raw
                (tmp / folder / f"{each}{ending}").write_bytes(gzip.compress(raw) if ending else raw)

    return make


def cifar(content: Any) -> Callable[[Path], None]:
    """CIFAR-10 in the published layout, whose third batch is given, and of which no checksum is right."""

    def make(tmp: Path) -> None:
        (tmp / BATCHES).mkdir()
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
            this = content(tmp) if callable(content) else content
            put = this if name == "data_batch_3" else {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
            (tmp / BATCHES / name).write_bytes(put if isinstance(put, bytes) else pickle.dumps(put))

    return make


def npz(name: str, **arrays: Any) -> Callable[[Path], None]:
    return lambda tmp: np.savez(tmp / name, **arrays)


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda tmp: (tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def both(*makers: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(tmp: Path) -> None:
        for maker in makers:
            maker(tmp)

    return make


def data(name: str, *words: str) -> list[str]:
    return ["launch", f"data.name={name}", "data.root={tmp}", *words]


CODED = np.zeros((2, 3, 32, 32), np.uint8)
OBJECTS = np.array([{"a": 1}, {"b": 2}], dtype=object)
TRAIN, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
RAW = ("FashionMNIST/raw", "")
PACKED = {"jpeg": np.zeros(4, np.uint8), "offsets": np.array([0, 4]), "y": [0], "split": [0]}

DATA = [
    Case("fashion none", None, data("fashion_mnist"), "data.root=", DOWNLOAD),
    Case("fashion no file", fashion(TRAIN, None), data("fashion_mnist"), "data.root=", "FashionMNIST/raw"),
    Case("fashion magic", fashion(TRAIN, lambda raw: b"\x89PNG" + raw[4:]), data("fashion_mnist"),
         "{tmp}/fashion-mnist/" + TRAIN + ".gz", AGAIN),
    Case("fashion empty", fashion(TRAIN, lambda raw: b""), data("fashion_mnist"),
         "{tmp}/fashion-mnist/" + TRAIN + ".gz", AGAIN),
    Case("fashion labels", fashion(LABELS, lambda raw: raw[:-1] + b"\xff"), data("fashion_mnist"),
         "{tmp}/fashion-mnist/" + LABELS + ".gz", AGAIN),
    Case("fashion few", fashion(LABELS, lambda raw: struct.pack(">2i", 0x801, 3) + bytes(3)), data("fashion_mnist"),
         "{tmp}/fashion-mnist/" + LABELS + ".gz", AGAIN),
    Case("fashion gzip", both(fashion(LABELS, None), text(f"fashion-mnist/{LABELS}.gz", "no gzip")),
         data("fashion_mnist"), "{tmp}/fashion-mnist/" + LABELS + ".gz", AGAIN),
    Case("fashion raw magic", fashion(TRAIN, lambda raw: b"\x89PNG" + raw[4:], *RAW), data("fashion_mnist"),
         "{tmp}/FashionMNIST/raw", DOWNLOAD),
    Case("fashion raw empty", fashion(TRAIN, lambda raw: b"", *RAW), data("fashion_mnist"), "{tmp}/FashionMNIST/raw",
         DOWNLOAD),
    Case("fashion raw no file", fashion(TRAIN, None, *RAW), data("fashion_mnist"), "{tmp}/FashionMNIST/raw", DOWNLOAD),
    Case("fashion raw few", fashion(LABELS, lambda raw: struct.pack(">2i", 0x801, 3) + bytes(3), *RAW),
         data("fashion_mnist"), "{tmp}/FashionMNIST/raw", AGAIN),
    Case("cifar none", None, data("cifar10"), "data.root=", DOWNLOAD),
    Case("cifar evil", cifar(lambda tmp: {"data": Evil(tmp), "labels": []}), data("cifar10"), "{tmp}/" + BATCHES,
         DOWNLOAD),
    Case("cifar foreign", cifar(b"\x89PNG and so on"), data("cifar10"), "{tmp}/" + BATCHES, DOWNLOAD),
    Case("cifar100 empty", lambda tmp: (tmp / "cifar-100-python").mkdir(), data("cifar100"), "{tmp}/cifar-100-python",
         DOWNLOAD),
    Case("download into a file", text("x", ""), data("cifar10", "data.download=true", "data.root={tmp}/x"),
         "data.download=True: CIFAR10 cannot be downloaded into {tmp}/x: ", "check the network"),
    Case("download none", None, data("tiny_imagenet", "data.download=true"), "data.download=True",
         "data.download=false"),
    Case("npz objects", npz("cifar10-1k.npz", x_train_coded=OBJECTS, y_train=[0], x_test_coded=CODED, y_test=[0]),
         data("cifar10"), "{tmp}/cifar10-1k.npz", AGAIN),
    Case("npz keys", npz("cifar10-1k.npz", x=CODED), data("cifar10"), "{tmp}/cifar10-1k.npz", AGAIN),
    Case("npz dtype", npz("cifar10-1k.npz", x_train_coded=CODED.astype(float), y_train=[0, 1], x_test_coded=CODED,
         y_test=[0]),
         data("cifar10"), "{tmp}/cifar10-1k.npz", AGAIN),
    Case("npz part", npz("cifar10-1k.npz", x=CODED), data("cifar10", "data.args={parts: [2k]}"), "data.args.parts=",
         "1k"),
    Case("flowers none", None, data("flowers102"), "data.root=", "setid.mat"),
    Case("flowers mat", lambda tmp: (tmp / "flowers-102" / "jpg").mkdir(parents=True), data("flowers102"),
         "{tmp}/flowers-102", DOWNLOAD),
    Case("flowers packed", npz("flowers102-64.npz", **PACKED), data("flowers102"), "{tmp}/flowers102-64.npz", AGAIN),
    Case("flowers size", npz("flowers102-64.npz", **PACKED), data("flowers102", "data.args={size: 0}"),
         "data.args.size=0",
         "pixels"),
    Case("tiny none", None, data("tiny_imagenet"), "data.root=", "val_annotations.txt"),
    Case("tiny empty", lambda tmp: [(tmp / d).mkdir() for d in ("train", "val")], data("tiny_imagenet"), "{tmp}/train",
         AGAIN),
    Case("tiny class", both(lambda tmp: [(tmp / d).mkdir(parents=True) for d in ("train/n01", "val")],
         text("train/n01/x.JPEG", ""), text("val/val_annotations.txt", "a\tb")),
         data("tiny_imagenet"), "{tmp}/val/val_annotations.txt", AGAIN),
    Case("folders none", None, data("image_folder"), "data.root=", "train and val"),
    Case("folders image", both(lambda tmp: [(tmp / d).mkdir(parents=True) for d in ("train/a", "test/a")],
         text("train/a/x.png", "no image"), text("test/a/x.png", "no image")),
         data("image_folder"), "{tmp}/train/a/x.png", AGAIN),
    Case("ag_news row", both(text("train.csv", "1,a\n"), text("test.csv", "1,a,b\n")), data("ag_news"),
         "{tmp}/train.csv", AGAIN),
    Case("ag_news class", both(text("train.csv", "9,a,b\n"), text("test.csv", "1,a,b\n")), data("ag_news"),
         "{tmp}/train.csv", AGAIN),
    Case("ag_news bytes", both(text("train.csv", b"\xff\xfe\x00"), text("test.csv", "1,a,b\n")), data("ag_news"),
         "{tmp}/train.csv", AGAIN),
    Case("ag_news xz", both(*(text(f"ag_news_{s}.csv.xz", "no xz") for s in ("train", "test"))), data("ag_news"),
         "{tmp}/ag_news_train.csv.xz", AGAIN),
    Case("ag_news tokenizer", None, data("ag_news", "data.args={tokenizer: /none}"), "data.args.tokenizer=", "'hash'"),
]


# ---- weights and profiles -------------------------------------------------------------------------------------------


SMALL = "{image_size: 8, patch_size: 4, layers: 1, heads: 1, hidden_dim: 8, mlp_dim: 8, weights: '{tmp}/w'}"
VIT = ["launch", "model.name=vit", f"model.args={SMALL}"]


def profile(**changes: Any) -> Callable[[Path], None]:
    c = {"name": "fast", "device": "cpu", "ranks": 1, "batch_size": 4, "step_sec": 0.1, "step_sec_alone": 0.1,
         "by_batch": {}, "jitter": 0.0} | changes.pop("of_class", {})
    content = {"version": 1, "key": {}, "samples": 9, "parameters": 9, "parameter_bytes": 9, "classes": [c],
               "average_sec": 1.0, "tau": {}, "predicted_blocked": {}} | changes
    return lambda tmp: (tmp / "p.json").write_text(json.dumps(content))


TAKEN = ["launch", "profile.file={tmp}/p.json"]
PLANNED = ["plan", "--profile", "{tmp}/p.json"]

OTHERS = [
    Case("weights none", None, VIT, "model.args.weights=", "path of a file"),
    Case("weights evil", lambda tmp: torch.save({"w": Evil(tmp)}, tmp / "w"), VIT, "model.args.weights=", "state dict"),
    Case("weights cut", lambda tmp: (torch.save({"w": torch.ones(99)}, tmp / "w"), os.truncate(tmp / "w", 300)), VIT,
         "model.args.weights=", "state dict"),
    Case("weights foreign", text("w", "hello"), VIT, "model.args.weights=", "state dict"),
    Case("weights list", lambda tmp: torch.save([1], tmp / "w"), VIT, "model.args.weights=", "state dict"),
    Case("weights other", lambda tmp: torch.save({"w": torch.ones(9)}, tmp / "w"), VIT, "model.args.weights=",
         "architecture"),
    Case("profile none", None, TAKEN, "profile.file=", PROFILE),
    Case("profile bytes", text("p.json", b"\xff\xfe\x00"), TAKEN, "profile.file=", PROFILE),
    Case("profile evil", lambda tmp: (tmp / "p.json").write_bytes(pickle.dumps(Evil(tmp))), TAKEN, "profile.file=",
         PROFILE),
    Case("profile version", profile(version=7), TAKEN, "profile.file=", PROFILE),
    Case("profile classes", profile(classes=3), TAKEN, "profile.file=", PROFILE),
    Case("profile key", profile(key=3), TAKEN, "profile.file=", PROFILE),
    Case("profile nan", profile(of_class={"step_sec": float("nan")}), TAKEN, "profile.file=", PROFILE),
    Case("profile more", profile(more=3), TAKEN, "profile.file=", PROFILE),
    Case("profile of another", profile(), TAKEN, "profile.file=", PROFILE.replace("one", "one for this")),
    Case("plan by_batch", profile(of_class={"by_batch": [1]}), PLANNED, "profile.file=", PROFILE),
    Case("plan samples", profile(samples="x"), PLANNED, "{tmp}/p.json: samples=", "above 0"),
    Case("plan no class", profile(classes=[]), PLANNED, "{tmp}/p.json=", PROFILE),
    Case("profile to", None, ["profile", "profile.file=/dev/null/x"], "profile.file=", "choose another"),
]


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def saved(
    damage: Callable[[Path], Any] = lambda folder: None, ranks: int = 1, **others: Any
) -> Callable[[Path], None]:
    """A checkpoint of the run that ``RESUMED`` is, then damaged."""

    def make(tmp: Path) -> None:
        (tmp / "run").mkdir()
        config = load((), [*ALONE, f"run.dir={tmp}/run"], algorithms.method)
        save_round(Store(tmp / "run"), 10, [{"w": torch.ones(9)}] * ranks, {**made_with(config), **others})
        damage(tmp / "run" / "checkpoints" / "000010")

    return make


def flipped(name: str) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (folder / name).write_bytes(raw)

    return damage


RESUMED = ["train", *ALONE, "run.dir={tmp}/run", "run.resume=auto"]
AT = "{tmp}/run/checkpoints/000010"
ANEW = "start anew"

CHECKPOINTS = [
    Case("checkpoint tensors cut", saved(lambda f: os.truncate(f / "rank0000.safetensors", 50)), RESUMED, AT, ANEW),
    Case("checkpoint json cut", saved(lambda f: os.truncate(f / "rank0000.json", 9)), RESUMED, AT, ANEW),
    Case("checkpoint manifest cut", saved(lambda f: os.truncate(f / "manifest.json", 99)), RESUMED, AT, ANEW),
    *(Case(f"checkpoint flipped {name}", saved(flipped(name)), RESUMED, AT, ANEW)
      for name in ("rank0000.safetensors", "rank0000.json", "manifest.json")),
    Case("checkpoint shard gone", saved(lambda f: (f / "rank0000.json").unlink()), RESUMED, AT, ANEW),
    Case("checkpoint evil", saved(lambda f: (f / "rank0000.json").write_bytes(pickle.dumps(Evil(f.parents[2])))),
         RESUMED, AT,
         ANEW),
    Case("checkpoint evil manifest",
         saved(lambda f: (f / "manifest.json").write_bytes(pickle.dumps(Evil(f.parents[2])))),
         RESUMED, AT, ANEW),
    Case("checkpoint foreign", saved(lambda f: (f / "manifest.json").write_text("{}")), RESUMED, AT, ANEW),
    Case("checkpoint format", saved(lambda f: (f / "manifest.json").write_text(
        (f / "manifest.json").read_text().replace('"format": 6', '"format": 1'))), RESUMED, AT, "use hvd-hetero"),
    Case("checkpoint of another setting", saved(**{"train.lr": 7.5}), RESUMED,
         "train.lr=0.02: the checkpoint of round 10 was made with 7.5", "run.resume=reshape"),
    Case("checkpoint of other ranks", saved(ranks=2), RESUMED, AT, "start 2 ranks"),
    Case("checkpoints elsewhere", lambda tmp: ((tmp / "run").mkdir(), (tmp / "run" / "checkpoints").symlink_to(tmp)),
         RESUMED,
         "run.dir=", "remove the link"),
]
