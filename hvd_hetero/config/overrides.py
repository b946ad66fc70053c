"""``key=value`` on a command line: which words are settings, and what their values are, to the last character."""

from __future__ import annotations

import dataclasses
import os
import re
from contextlib import suppress
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hvd_hetero.config.schema import Config
from hvd_hetero.errors import ConfigError

TEXTS = {
    f"{section.name}.{item.name}"
    for section in dataclasses.fields(Config)
    for item in dataclasses.fields(getattr(Config(), section.name))
    if item.type in ("str", "Optional[str]")
}
"""Keys whose values are texts."""
ENDS = {"{": "}", "[": "]", '"': '"', "'": "'"}
"""How a value ends that begins so, which makes it YAML and nothing else."""
MISREAD = re.compile(r"[#:\n]|^\s*[-+]?0[0-9_]")
"""Where YAML takes a plain value for something else: the rest for a comment, a number for one of base 60 or 8."""


def is_setting(word: str) -> bool:
    """Whether a word of a command line is ``key=value``; else it names a file, as every word does whose file exists."""
    key, equals, _ = word.partition("=")
    return bool(equals) and os.sep not in key and not os.path.isfile(word)


def parse_override(text: str) -> tuple[str, Any]:
    """The key and the value of ``key=value``; an empty value is None, and so is ``null``.

    Where a text is wanted, it is the value as it stands, only without quotes around the whole; a list or a mapping in
    its place stays one, to be refused. Any other value is YAML, but a text as it stands where YAML would drop or
    change a part of it.

    Raises:
        ConfigError: it is not that, or the value begins like YAML and is none.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError("argument", text, "is not key=value", "write for example train.epochs=10")
    if value in ("", "null"):
        return key, None
    try:
        return key, _text(value) if key in TEXTS else _value(value)
    except YAMLError as error:
        raise ConfigError(key, value, "is not a YAML value", "quote it, or correct its brackets") from error
    except OmegaConfBaseException as error:
        problem = f"cannot be resolved: {str(error).splitlines()[0]}"
        raise ConfigError(key, value, problem, r"correct what stands in ${...}, or write \${...}") from error


def _text(word: str) -> Any:
    if word[0] in ENDS:
        with suppress(YAMLError):
            value = _yaml(word)
            if not isinstance(value, str) or word[0] == word[-1]:
                return value
    return _resolved(word)


def _value(word: str) -> Any:
    begin, end = word.strip()[:1], word.strip()[-1:]
    if begin in ENDS or begin == "!":
        if ENDS.get(begin, end) != end:
            raise YAMLError("it resumed after its end")
        return _yaml(word)
    if MISREAD.search(word) is None:
        with suppress(YAMLError):
            value = _yaml(word)
            return _resolved(word) if isinstance(value, str) else value
    return _resolved(word)


def _yaml(word: str) -> Any:
    value: Any = OmegaConf.create(f"value: {word}").value
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _resolved(word: str) -> Any:
    """The text, with what ``${...}`` in it refers to."""
    return OmegaConf.create({"value": word}).value
