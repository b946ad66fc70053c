"""Measured speeds of a cluster's classes, kept as JSON, and found again when the same is run on the same devices."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hvd_hetero.cluster.device_classes import Cluster, gpu_index
from hvd_hetero.config.schema import Config
from hvd_hetero.errors import ConfigError
from hvd_hetero.files import write_text

VERSION = 1
PACKAGES = ("torch", "horovod", "hvd-hetero")


@dataclass(frozen=True)
class ClassSpeed:
    """How fast one class is.

    Attributes:
        ranks: how many.
        step_sec: of one local step with all classes running at once; ``step_sec_alone``: with this one alone.
        by_batch: seconds of a step for other batch sizes, all classes running.
        jitter: standard deviation of a step's time over its mean.
        by_batch_alone: as ``by_batch``, all other ranks waiting.
    """

    name: str
    device: str
    ranks: int
    batch_size: int
    step_sec: float
    step_sec_alone: float
    by_batch: dict[str, float]
    jitter: float
    by_batch_alone: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """What was measured, of what (``key``), and what would be done with it.

    Attributes:
        average_sec: of one weighted average of the model with nobody late.
        tau: the local steps that would be taken, and ``predicted_blocked``, each class's share of waiting with them.
    """

    key: dict[str, Any]
    samples: int
    parameters: int
    parameter_bytes: int
    classes: list[ClassSpeed]
    average_sec: float
    tau: dict[str, int]
    predicted_blocked: dict[str, float]
    version: int = VERSION

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @property
    def step_sec(self) -> dict[str, float]:
        return {c.name: c.step_sec for c in self.classes}


def load_profile(path: Path) -> Profile:
    """Reads a profile.

    Raises:
        ConfigError: it cannot be read, or is none of ours.
    """
    remedy = "make one with hvd-hetero profile"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError("profile.file", str(path), f"cannot be read: {error.strerror}", remedy) from error
    except ValueError as error:
        raise ConfigError("profile.file", str(path), "is no JSON", remedy) from error
    version = content.get("version") if isinstance(content, Mapping) else None
    if version != VERSION:
        raise ConfigError("profile.file", str(path), f"has version {version}, not {VERSION}", remedy)
    try:
        profile = Profile(**{**content, "classes": [ClassSpeed(**c) for c in content["classes"]]})
        for name, sec in profile.step_sec.items():
            if not 0 < float(sec) < math.inf:
                raise ValueError(f"{name}.step_sec={sec}: is not a number above 0")
        for where, part in [("key", profile.key), *((f"{c.name}.by_batch", c.by_batch) for c in profile.classes)]:
            if not isinstance(part, Mapping):
                raise ValueError(f"{where} is a {type(part).__name__}, not a mapping")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("profile.file", str(path), f"is not a profile: {error}", remedy) from error
    return profile


def key_of(config: Config, cluster: Cluster) -> dict[str, Any]:
    """All that step times depend on: model, data, batch, optimizer, devices, threads, versions."""
    train = asdict(config.train)
    trained = {"data": asdict(config.data), "model": asdict(config.model), "loss": train["loss"]}
    speeds = ("optimizer", "optimizer_args", "groups", "autocast", "clip_norm", "compile", "channels_last",
              "matmul_precision", "micro_batches")  # fmt: skip
    trained |= {name: train[name] for name in speeds}
    text = json.dumps(trained, sort_keys=True, default=str)
    facts = {c.name: cluster.facts[c.ranks[0]] for c in cluster.classes}
    return {
        "model": config.model.target or config.model.name,
        "data": config.data.target or config.data.name,
        "trained": hashlib.sha256(text.encode()).hexdigest()[:16],
        "batch_size": train["batch_size"],
        "device": {c.name: facts[c.name].gpus[gpu_index(cluster, c.ranks[0])] if c.device == "cuda"
                   else facts[c.name].cpu for c in cluster.classes},
        "ranks": {c.name: len(c.ranks) for c in cluster.classes},
        "hosts": sorted(len(cluster.on_host(host)) for host in {f.host for f in cluster.facts}),
        "affinity": config.cluster.affinity,
        "threads": {c.name: c.threads for c in cluster.classes},
        "cores": {c.name: facts[c.name].cpus or len(facts[c.name].cores) for c in cluster.classes},
        "slowdown": {c.name: c.slowdown for c in cluster.classes},
        "versions": {name: _version(name) for name in PACKAGES},
    }


def kept_at(key: Mapping[str, Any]) -> Path:
    """Return where a profile with this key is kept by default."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "hvd-hetero" / "profiles" / f"{digest}.json"


def known_speeds(config: Config, cluster: Cluster) -> tuple[Profile, Path] | None:
    """What was measured before of just this, and where it is kept; None if there is nothing.

    Raises:
        ConfigError: ``profile.file`` is of something else, which is named.
    """
    if config.profile.file is not None:
        path = Path(config.profile.file)
        profile = load_profile(path)
        check_profile(profile, config, cluster)
        return profile, path
    if not config.profile.reuse:
        return None
    try:
        path = kept_at(key_of(config, cluster))
        profile = load_profile(path)
        check_profile(profile, config, cluster)
    except (ConfigError, RuntimeError):  # none is kept, nobody has a home, or what is kept is damaged
        return None
    return profile, path


def check_profile(profile: Profile, config: Config, cluster: Cluster) -> None:
    """Makes sure that a profile is of just this.

    Raises:
        ConfigError: naming what differs.
    """
    for name, wanted in key_of(config, cluster).items():
        if profile.key.get(name) != wanted:
            problem = f"was made with {name} {profile.key.get(name)}, this is {wanted}"
            remedy = "make one for this with hvd-hetero profile"
            raise ConfigError("profile.file", config.profile.file, problem, remedy)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
