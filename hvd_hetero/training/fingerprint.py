"""What has to be the same on all ranks of a job: versions, source files, settings. Hosts drift apart unnoticed."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hvd_hetero
from hvd_hetero.comm.horovod_build import build_info
from hvd_hetero.config.schema import COURSE, FIGURES, Config
from hvd_hetero.errors import ConfigError, Unquoted

PACKAGE = Path(hvd_hetero.__file__).parent
TARGETS = ("data.target", "model.target", "train.loss", "train.optimizer", "train.scheduler",
           "sampling.sample_weights")  # fmt: skip
"""Settings that may name a function of the user's own, ``package.module:function``; those of eval.metrics do so too,
and run.callbacks."""


MODEL = "tensors of the model's"


def fingerprint(config: Config, model: nn.Module) -> dict[str, str]:
    """This rank's, by what each thing is called: causes before their effects."""
    horovod = build_info()
    found = {
        "version of hvd-hetero": hvd_hetero.__version__,
        "source of hvd-hetero": digest_of(PACKAGE, PACKAGE.rglob("*.py")),
        "version of Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "version of torch": torch.__version__.split("+")[0],
        "version of Horovod": f"{horovod['version']} with {', '.join(horovod['fixes']) or 'no fixes'}",
    }
    found |= sources(config)
    found |= {key: json.dumps(value) for key, value in plain(config.settings(COURSE)).items()}
    return found | shapes(model)


def shapes(model: nn.Module) -> dict[str, str]:
    """Say for each part of a model what tensors it is made of; what values they have does not matter."""
    parts: dict[str, list[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        learns = "trained" if tensor.requires_grad else ""
        parts.setdefault(name.partition(".")[0], []).append(f"{name} {list(tensor.shape)} {tensor.dtype} {learns}")
    return {
        f"{MODEL} {part}": f"{len(lines)} ({hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:8]})"
        for part, lines in parts.items()
    }


def sources(config: Config) -> dict[str, str]:
    """Hashes of the files of the user's modules that settings name, by what they are called."""
    found, settings = {}, config.settings(FIGURES)
    targets = {key: settings[key] for key in TARGETS}
    for name, entry in config.eval.metrics.items():
        targets[f"eval.metrics.{name}"] = entry.get("target") if isinstance(entry, Mapping) else entry
    targets |= {f"run.callbacks[{i}]": path for i, path in enumerate(config.run.callbacks)}
    for key, target in targets.items():
        module = sys.modules.get(target.partition(":")[0]) if isinstance(target, str) and ":" in target else None
        file = None if module is None else getattr(module, "__file__", None)
        if file is not None:
            found[f"source of {key}={target}"] = digest_of(Path(file).parent, [Path(file)])
    return found


def made_with(config: Config) -> dict[str, Any]:
    """What a checkpoint remembers of how it was made, as JSON has it: settings by dotted key, and the sources."""
    return plain(config.settings(FIGURES)) | sources(config)


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are when they have been through JSON: a text in place of a date, a list in place of a tuple."""
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return found


def digest_of(folder: Path, files: Iterable[Path]) -> str:
    """A hash of files' names in a folder and of what is in them."""
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def check_same(fingerprints: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> None:
    """Makes sure that all ranks are alike; both arguments are by rank.

    Raises:
        ConfigError: naming the first rank that differs from rank 0, its host, and in what.
    """
    first = fingerprints[0]
    unlike = [(rank, other) for rank, other in enumerate(fingerprints) if other != first]
    for what in dict.fromkeys(what for each in (first, *(other for _, other in unlike)) for what in each):
        for rank, other in unlike:
            mine, theirs = first.get(what, "nothing"), other.get(what, "nothing")
            if mine != theirs:
                problem = f"so it is for rank {rank} on {hosts[rank]}, for rank 0 on {hosts[0]} it is {mine}"
                raise ConfigError(what, Unquoted(theirs), problem, _remedy(what, hosts[rank], hosts[0]))


def _remedy(what: str, host: str, first: str) -> str:
    if what.startswith("version of "):
        return f"install the same {what.removeprefix('version of ')} on {host} as on {first}"
    if what == "source of hvd-hetero":
        return f"bring {PACKAGE} on {host} up to date with that on {first}; both call it {hvd_hetero.__version__}"
    if what.startswith("source of "):
        return f"bring its file on {host} up to date with that on {first}"
    if what.startswith(MODEL):
        return "make the same model on all ranks, with the same names, shapes and types, and the same parts frozen"
    where = "" if host == first else f" ({host} and {first} have others)"
    return f"give all ranks the same configuration files and settings{where}"
