"""The schema of the configuration: every key, its type, its built-in value and its limits."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Optional

from omegaconf import OmegaConf

AUTO = "auto"
RESHAPE = "reshape"
TRAIN, EVALUATE, SCORE = "train", "evaluate", "score"
"""What a device class is for."""


class Decides(IntEnum):
    """What a key decides. The same is asked of two configurations for different ends, see :meth:`Config.settings`."""

    NUMBERS = 0
    """What the model becomes, up to rounding: a checkpoint is resumed with the same value only."""
    LENGTH = 1
    """Where the run ends."""
    FIGURES = 2
    """How fast the run is, and what is measured of it."""
    COURSE = 3
    """Nothing in the result, but all ranks go by it."""
    NOTHING = 4
    """Where things are: every rank may have a value of its own."""


NUMBERS, LENGTH, FIGURES, COURSE, NOTHING = Decides


def _key(default: Any, decides: Decides = NUMBERS, **limits: Any) -> Any:
    """A schema field with what it decides, and its limits: ``at_least``, ``above``, ``at_most``, ``choices``."""
    metadata = {"decides": decides, **limits}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    dir: Optional[str] = _key(None, NOTHING)  # noqa: UP045 (OmegaConf reads the annotations at run time)
    seed: int = _key(0, at_least=0, at_most=2**32 - 1)
    overwrite: bool = _key(False, NOTHING)
    resume: Optional[str] = _key(None, NOTHING, choices=(AUTO, RESHAPE))  # noqa: UP045
    name: Optional[str] = _key(None, NOTHING)  # noqa: UP045
    trace_rounds: int = _key(8, COURSE, at_least=0)
    watchdog_sec: Optional[float] = _key(600.0, COURSE, above=0)  # noqa: UP045
    callbacks: list[str] = _key([], COURSE)
    trackers: list[str] = _key(["tensorboard"], NOTHING)


@dataclass(frozen=True)
class LaunchConfig:
    environment: list[str] = _key([], NOTHING)
    discovery_sec: Optional[float] = _key(None, NOTHING, above=0)  # noqa: UP045


@dataclass(frozen=True)
class ClassConfig:
    """One device class as the user writes it: a device, and which ranks belong to it."""

    device: str = _key("cpu", choices=("cpu", "cuda"))
    ranks: Any = None
    hosts: Optional[str] = None  # noqa: UP045
    slots: Any = None
    slowdown: float = _key(1.0, at_least=1.0, at_most=10000.0)
    threads: Optional[int] = _key(None, at_least=1, at_most=1024)  # noqa: UP045
    role: str = _key(TRAIN, choices=(TRAIN, EVALUATE, SCORE))


@dataclass(frozen=True)
class ClusterConfig:
    hosts: Optional[str] = _key(None, FIGURES)  # noqa: UP045
    remote_shell: Optional[str] = _key(None, NOTHING)  # noqa: UP045
    classes: Any = _key(
        {"fast": {"device": "cpu", "ranks": [0]}, "slow": {"device": "cpu", "ranks": [1], "slowdown": 8.0}},
        FIGURES,
    )
    affinity: bool = _key(True, FIGURES)
    gpu_cores: int = _key(2, FIGURES, at_least=1)
    share_gpus: bool = _key(False, FIGURES)
    network_interface: Optional[str] = _key(None, FIGURES)  # noqa: UP045
    start_timeout_sec: int = _key(60, COURSE, at_least=1)
    gloo_timeout_sec: int = _key(120, COURSE, at_least=1)
    cycle_time_ms: float = _key(1.0, FIGURES, above=0)
    too_slow: str = _key("error", choices=("error", "shrink_batch", "wait_avoiding", "leave_out"))


@dataclass(frozen=True)
class DataConfig:
    name: Optional[str] = "digits"  # noqa: UP045
    root: Optional[str] = _key(None, NOTHING)  # noqa: UP045
    download: bool = _key(False, NOTHING)
    target: Optional[str] = None  # noqa: UP045
    args: dict[str, Any] = _key({})
    workers: int = _key(0, FIGURES, at_least=0, at_most=256)


@dataclass(frozen=True)
class ModelConfig:
    name: Optional[str] = "mlp"  # noqa: UP045
    target: Optional[str] = None  # noqa: UP045
    args: dict[str, Any] = _key({})


@dataclass(frozen=True)
class TrainConfig:
    batch_size: Any = 4
    micro_batches: Any = 1
    epochs: Optional[int] = _key(40, LENGTH, at_least=1)  # noqa: UP045
    max_fast_steps: Optional[int] = _key(None, LENGTH, at_least=1)  # noqa: UP045
    max_samples: Optional[int] = _key(None, LENGTH, at_least=1)  # noqa: UP045
    max_train_sec: Optional[float] = _key(None, LENGTH, above=0)  # noqa: UP045
    patience: Optional[int] = _key(None, LENGTH, at_least=1)  # noqa: UP045
    epoch_length: str = _key("dataset", choices=("dataset", "fast_steps"))
    tau: Any = AUTO
    tau_overhead: float = _key(0.02, above=0, at_most=1)
    tau_margin: float = _key(0.1, at_least=0, at_most=0.5)
    adapt_tau: bool = True
    loss: str = "cross_entropy"
    loss_args: dict[str, Any] = _key({"label_smoothing": 0.1})
    optimizer: str = "SGD"
    lr: float = _key(0.02, above=0)
    optimizer_args: dict[str, Any] = _key({"momentum": 0.9})
    groups: list[Any] = _key([])
    scheduler: Optional[str] = None  # noqa: UP045
    scheduler_args: dict[str, Any] = _key({})
    scheduler_unit: str = _key("epoch", choices=("epoch", "round"))
    warmup_rounds: int = _key(0, at_least=0)
    clip_norm: Optional[float] = _key(None, above=0)  # noqa: UP045
    autocast: Optional[str] = _key(None, choices=(AUTO, "bf16", "fp16"))  # noqa: UP045
    matmul_precision: str = _key("highest", choices=("highest", "high", "medium"))
    channels_last: bool = False
    compile: Optional[str] = _key(None, FIGURES, choices=("default", "reduce-overhead", "max-autotune"))  # noqa: UP045


@dataclass(frozen=True)
class SamplingConfig:
    scheme: Optional[str] = _key(None, choices=("separate", "uniform", "unified", "infobatch", "importance"))  # noqa: UP045
    high_loss_ratio: float = _key(0.5, at_least=0, at_most=1)
    bias_to: str = "fast"
    until: float = _key(1.0, above=0, at_most=1)
    anneal: bool = _key(False)
    selection: str = _key("hard", choices=("hard", "soft"))
    smoothing: float = _key(0.0, at_least=0, at_most=0.999)
    block: int = _key(1, at_least=1)
    prune_ratio: float = _key(0.5, at_least=0, at_most=0.95)
    sample_weights: Optional[str] = None  # noqa: UP045

    @property
    def is_weighted(self) -> bool:
        """Whether samples carry weights to the loss."""
        return self.scheme in ("infobatch", "importance") or self.sample_weights is not None


@dataclass(frozen=True)
class AggregationConfig:
    weights: Optional[str] = _key(None, choices=("steps", "uniform", "normalised"))  # noqa: UP045
    max_extrapolation: float = _key(2.0, at_least=1)
    anneal_from: Optional[float] = _key(None, at_least=0, at_most=0.999)  # noqa: UP045
    mode: str = _key("blocking", choices=("blocking", "solo", "majority", "quorum"))
    quorum: Optional[float] = _key(None, above=0)  # noqa: UP045
    sync_every: int = _key(32, at_least=1)
    max_lag: int = _key(32, at_least=1)
    patience_sec: float = _key(0.05, at_least=0)
    wire: str = _key("float32", choices=("float32", "float16", "int8"))
    path: str = _key(AUTO, FIGURES, choices=(AUTO, "flat", "hierarchical", "measured"))
    chunk_mb: Optional[float] = _key(None, FIGURES, at_least=0.01)  # noqa: UP045
    optimizer_state: str = _key("local", choices=("local", "average", "average_seed", "reset"))
    outer_lr: float = _key(1.0, above=0)
    outer_momentum: float = _key(0.0, at_least=0, at_most=1)
    outer_nesterov: bool = False
    delayed: bool = False
    delay_steps: Optional[int] = _key(None, at_least=0)  # noqa: UP045
    own_weight: float = _key(0.0, at_least=0, at_most=1)
    state: dict[str, Any] = _key({})
    nan: str = _key("leave_out", LENGTH, choices=("leave_out", "stop"))


@dataclass(frozen=True)
class AlgorithmConfig:
    """What every method has; a method's own options are a frozen subclass in its file."""

    name: str = "biased_local_sgd"
    mode: Optional[str] = None  # noqa: UP045


@dataclass(frozen=True)
class ProfileConfig:
    seconds: float = _key(2.0, FIGURES, above=0)
    warmup_steps: int = _key(5, FIGURES, at_least=0)
    reuse: bool = _key(True, FIGURES)
    file: Optional[str] = _key(None, FIGURES)  # noqa: UP045


@dataclass(frozen=True)
class CheckpointConfig:
    every_sec: Optional[float] = _key(60.0, COURSE, at_least=0)  # noqa: UP045
    every_rounds: Optional[int] = _key(None, COURSE, at_least=1)  # noqa: UP045
    memory_sec: Optional[float] = _key(None, COURSE, at_least=0)  # noqa: UP045
    keep: int = _key(2, COURSE, at_least=1)


@dataclass(frozen=True)
class DelaysConfig:
    distribution: Optional[str] = _key(None, FIGURES, choices=("random_ranks", "lognormal", "linear_skew"))  # noqa: UP045
    seed: Optional[int] = _key(None, FIGURES, at_least=0)  # noqa: UP045
    sec: float = _key(0.32, FIGURES, at_least=0)
    ranks: int = _key(2, FIGURES, at_least=1)
    sigma: float = _key(1.0, FIGURES, at_least=0)


@dataclass(frozen=True)
class EvalConfig:
    every_epochs: int = _key(1, FIGURES, at_least=1)
    batch_size: int = _key(256, FIGURES, at_least=1)
    metrics: dict[str, Any] = _key({"accuracy": "accuracy"}, FIGURES)
    best: Any = _key(None, FIGURES)
    average: str = _key("none", FIGURES, choices=("none", "ema", "lawa"))
    half_life: Optional[float] = _key(None, FIGURES, above=0)  # noqa: UP045
    last: int = _key(5, FIGURES, at_least=1)


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    delays: DelaysConfig = field(default_factory=DelaysConfig)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, fit to be given to another run."""
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self)))

    def digest(self) -> str:
        """A hash of all that decides what a run is, its figures included."""
        text = json.dumps(self.settings(FIGURES), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def settings(self, up_to: Decides) -> dict[str, Any]:
        """The values by dotted key, of those keys that decide as much or more: ``{"train.lr": 0.02}``."""
        return {key: getattr(section, item.name) for key, section, item in self._keys() if decides(item) <= up_to}

    def built_in(self) -> dict[str, Any]:
        """The built-in values by dotted key, of this method's options too."""
        return {key: getattr(type(section)(), item.name) for key, section, item in self._keys()}

    def _keys(self) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
        for part in dataclasses.fields(self):
            section = getattr(self, part.name)
            for item in dataclasses.fields(section):
                yield f"{part.name}.{item.name}", section, item


def decides(item: dataclasses.Field[Any]) -> Decides:
    """What a schema's key decides; the numbers, if it does not say."""
    return Decides(item.metadata.get("decides", NUMBERS))
