"""Check limits of settings, and settings that contradict each other. Pure."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

from hvd_hetero.config.schema import AUTO, Config
from hvd_hetero.errors import ConfigError, nearest

RUN_NAME, CLASS_NAME = re.compile(r"\w[\w .+-]*"), re.compile(r"\w[\w+-]*")
VARIABLES = re.compile(r"[A-Za-z0-9_*?\[\]!-]+")
"""The name of a run becomes that of a folder; the name of a class stands in dotted keys and in ``CLASS=NUMBER,...``."""


def check_limits(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    """Refuses a value outside the limits that the schema declares for its key.

    Raises:
        ConfigError: it is.
    """
    if value is None:
        return
    if "choices" in limits and value not in limits["choices"]:
        raise ConfigError(key, value, "is not one of the choices", nearest(value, limits["choices"]))
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, value, "is not a finite number", "give a finite number")
    if "at_least" in limits and value < limits["at_least"]:
        raise ConfigError(key, value, f"is below {limits['at_least']}", f"give {limits['at_least']} or more")
    if "above" in limits and value <= limits["above"]:
        raise ConfigError(key, value, f"is not above {limits['above']}", f"give a number above {limits['above']}")
    if "at_most" in limits and value > limits["at_most"]:
        raise ConfigError(key, value, f"is above {limits['at_most']}", f"give {limits['at_most']} or less")


def check_integer(key: str, value: Any, at_least: int, word: str | None = None) -> None:
    """Refuses what is no integer, or below a limit; nor the word that may stand in place of one.

    Raises:
        ConfigError: it is.
    """
    if word is not None and value == word:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        other = "" if word is None else f", or {word}"
        raise ConfigError(key, value, "is not an integer", f"give an integer of {at_least} or more{other}")
    check_limits(key, value, {"at_least": at_least})


def check_together(config: Config) -> None:
    """Refuses what can be seen to be wrong in the settings as a whole; whether the classes exist is known later.

    Raises:
        ConfigError: naming the key.
    """
    train = config.train
    for key in ("tau", "batch_size", "micro_batches"):
        value = getattr(train, key)
        word = AUTO if key == "micro_batches" or (key == "tau" and value == AUTO) else None
        table = value if isinstance(value, Mapping) else {None: value}
        if not table:
            raise ConfigError(f"train.{key}", value, "is empty", "give a number, or one for each class")
        for name, number in table.items():
            check_integer(f"train.{key}.{name}" if name is not None else f"train.{key}", number, 1, word)
    if (train.epochs, train.max_fast_steps, train.max_samples, train.max_train_sec) == (None,) * 4:
        raise ConfigError("train.epochs", None, "nothing says when the run ends", "set it, or one of train.max_*")
    if train.scheduler is None and train.scheduler_args:
        problem = "are arguments of no scheduler, train.scheduler is null"
        raise ConfigError("train.scheduler_args", train.scheduler_args, problem, "set train.scheduler, or leave them")
    if config.data.name is None and config.data.target is None:
        raise ConfigError("data.name", None, "no dataset is given", "set data.name or data.target")
    if config.model.name is None and config.model.target is None:
        raise ConfigError("model.name", None, "no model is given", "set model.name or model.target")
    for key, text in (("run.dir", config.run.dir), ("profile.file", config.profile.file)):
        if text is not None and (not text.strip() or "\0" in text):
            raise ConfigError(key, text, "is no path", "give one, or null")
    if (shell := config.cluster.remote_shell) is not None:
        try:
            words = shlex.split(shell)
        except ValueError as error:
            raise ConfigError("cluster.remote_shell", shell, f"is no command: {error}", "close the quote") from error
        if not words:
            raise ConfigError("cluster.remote_shell", shell, "is no command", "give one, or null for ssh")
        if any("{command}" in word and word != "{command}" for word in words):  # it would not be put in there
            remedy = "let it stand alone, as in sh -c 'rsh $0 \"$1\"' {host} {command}"
            raise ConfigError("cluster.remote_shell", shell, "has {command} within a word", remedy)
    for pattern in config.launch.environment:
        if VARIABLES.fullmatch(pattern) is None:
            remedy = "give names or patterns (MY_*); values are taken from where it is launched"
            raise ConfigError("launch.environment", pattern, "is no variable's name", remedy)
    saves = config.checkpoint.every_sec is not None or config.checkpoint.every_rounds is not None
    if (every_sec := config.launch.discovery_sec) is not None and not saves:
        problem = "hosts are taken in by a checkpoint, and there is none"
        raise ConfigError("launch.discovery_sec", every_sec, problem, "set checkpoint.every_sec=60")
    if config.run.resume is not None and config.run.dir is None:
        raise ConfigError("run.resume", config.run.resume, "names no run to go on from", "set run.dir to its folder")
    if config.run.name is not None:
        check_name("run.name", config.run.name, RUN_NAME)


def check_name(key: str, name: str, form: re.Pattern[str]) -> None:
    """Refuses a name that could not stand where it is going to stand.

    Raises:
        ConfigError: it is empty, or has other characters.
    """
    if form.fullmatch(name) is None:
        others = "blanks, ., _, - and +" if form is RUN_NAME else "_, - and +"
        raise ConfigError(key, name, "cannot be a name here", f"use letters and digits, and after the first {others}")
