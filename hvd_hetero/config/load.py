"""Merge files and command lines into the configuration, and check it.

Layers are merged in order: the schema's built-in values, then each file, then each ``key=value``. Sections merge key by
key; mappings with free keys (``cluster.classes``, ``train.tau``, any ``*args``) are replaced as a whole, while
``key=value`` may also reach inside one (``cluster.classes.slow.slowdown=4``). Arguments belong to what they are for: a
layer that names another loss, optimizer, scheduler, model or dataset, and no arguments, leaves it without any. A model
or dataset that is named takes the place of a target in a layer below. The built-in arguments of the loss are for
models and datasets that are named; beside the user's own it has those that a layer gives it.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hvd_hetero.config.overrides import parse_override
from hvd_hetero.config.renamed import layer_renamed, pairs_renamed, warn_of
from hvd_hetero.config.schema import AUTO, TRAIN, AlgorithmConfig, ClassConfig, Config
from hvd_hetero.config.validate import CLASS_NAME, check_integer, check_limits, check_name, check_together
from hvd_hetero.errors import ConfigError, nearest

ARGUMENTS_OF = dict.fromkeys(("data.name", "data.target", "model.name", "model.target"), "args") | {
    f"train.{name}": f"{name}_args" for name in ("loss", "optimizer", "scheduler")
}

Method = tuple[type[AlgorithmConfig], Callable[[Mapping[str, Any]], Mapping[str, str]]]


def load(
    files: str | Path | Sequence[str | Path] | None = (),
    overrides: Sequence[str] | Mapping[str, Any] | None = (),
    method: Callable[[str], Method] = lambda name: (AlgorithmConfig, lambda settings: {}),
    user_objects: bool = False,
) -> Config:
    """Merges files, then overrides, into a checked configuration.

    Args:
        files: YAML files, later ones winning. A file may name another that it builds on with a top-level ``base:``.
        overrides: ``key=value`` texts as on a command line, or a mapping of dotted keys to values.
        method: tells of a method, by name, the options class whose fields are the keys of ``algorithm``, and what
            it means by ``sampling.scheme`` and ``aggregation.weights`` where they are null.
        user_objects: a program gives a model or data of its own in place of those that are configured.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, a value is of the wrong type or out of its limits.
    """
    former: set[str] = set()
    layers = [layer_renamed(layer, former) for path in _paths(files) for layer in _read(path)]
    pairs = pairs_renamed(_pairs(overrides), former)
    warn_of(former)
    name = AlgorithmConfig().name
    for layer in layers:
        section = layer.get("algorithm")
        name = section.get("name", name) if isinstance(section, dict) else name
    options, defaults = method(str(dict(pairs).get("algorithm.name", name)))

    schema = Config(algorithm=options())
    merged = _merged(schema, layers, pairs)
    if user_objects or any(merged[part]["target"] is not None for part in ("data", "model")):
        no_loss_args = dataclasses.replace(schema, train=dataclasses.replace(schema.train, loss_args={}))
        merged = _merged(no_loss_args, layers, pairs)  # again: only all layers tell whose the model and the data are
    classes = merged["cluster"]["classes"]
    merged["cluster"]["classes"] = classes if classes == AUTO else _by_name("cluster.classes", classes)

    for key, value in defaults(merged).items():
        section, last = key.split(".")
        if isinstance(merged[section], dict) and merged[section][last] is None:
            merged[section][last] = value
    config: Config = typed("", schema, merged)
    check_together(config)
    if config.cluster.classes != AUTO:
        device_classes(config.cluster.classes)
    return config


def typed(prefix: str, schema: Any, values: Mapping[str, Any]) -> Any:
    """Fills a schema (a dataclass instance) with values: types checked and converted, limits enforced.

    Raises:
        ConfigError: naming the full key, its value and what is wanted.
    """
    filled: dict[str, Any] = {}
    for item in dataclasses.fields(schema):
        key, value = f"{prefix}{item.name}", values[item.name]
        default = getattr(schema, item.name)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, Mapping):
                raise ConfigError(key, value, "is a section, not a value", f"set one of its keys, {key}.KEY=VALUE")
            filled[item.name] = typed(f"{key}.", default, value)
            continue
        if repr(value) == repr(default):  # OmegaConf has nothing to say on it, and takes its time
            filled[item.name] = copy.deepcopy(value)
            continue
        node = OmegaConf.structured(_of_one_key(schema.__class__, item.name))
        try:
            if item.type == "bool" and isinstance(value, (int, float)) and value not in (0, 1):
                raise ValueError("OmegaConf would take it for true")
            OmegaConf.update(node, item.name, value, merge=False)
            value = node[item.name]
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(key, value, "has the wrong type", f"give {_type(item)}") from error
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        check_limits(key, value, item.metadata)
        filled[item.name] = value
    return dataclasses.replace(schema, **filled)


@cache
def _of_one_key(section: type, name: str) -> type:
    """Return a schema of one key of a section: OmegaConf takes its time for each key that a schema has."""
    return dataclasses.make_dataclass(section.__name__, [(name, get_type_hints(section)[name])])


def device_classes(classes: Mapping[str, Any]) -> dict[str, ClassConfig]:
    """Reads ``cluster.classes`` (not ``auto``) into its schema.

    Raises:
        ConfigError: as :func:`load`.
    """
    result = {}
    if not classes:
        raise ConfigError("cluster.classes", {}, "names no class", "write auto, or {name: {device: ..., ranks: ...}}")
    for name, content in classes.items():
        key = f"cluster.classes.{name}"
        check_name("cluster.classes", str(name), CLASS_NAME)
        if not isinstance(content, Mapping):
            raise ConfigError(key, content, "is not a mapping", "write {device: cpu, ranks: [...]}")
        schema = ClassConfig()
        values = dataclasses.asdict(schema)
        _merge(schema, values, content, f"{key}.")
        result[str(name)] = typed(f"{key}.", schema, values)
    return result


def has_helpers(config: Config) -> bool:
    """Whether a device class has another role than to train."""
    classes = config.cluster.classes
    return classes != AUTO and any(c.role != TRAIN for c in device_classes(classes).values())


def without_roles(config: Config) -> Config:
    """Return the configuration with all classes training, for what measures or judges them."""
    classes = config.cluster.classes
    if classes != AUTO:
        classes = {name: {**content, "role": TRAIN} for name, content in classes.items()}
    return dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, classes=classes))


def per_class(
    key: str, value: Any, names: Sequence[str], at_least: int = 1, word: str | None = None
) -> dict[str, int]:
    """Reads a setting that is one integer for all classes, or a mapping of class name to integer.

    Args:
        word: that may stand in place of an integer, and becomes 0.

    Raises:
        ConfigError: not an integer, below the limit, a class unknown or missing.
    """
    table = dict(value) if isinstance(value, Mapping) else dict.fromkeys(names, value)
    for name in table:
        if name not in names:
            raise ConfigError(f"{key}.{name}", table[name], "names no device class", f"{nearest(name, names)}")
    missing = [name for name in names if name not in table]
    if missing:
        raise ConfigError(key, value, f"gives nothing for class {missing[0]}", "name every class, or give one number")
    for name, number in table.items():
        where = f"{key}.{name}" if isinstance(value, Mapping) else key
        check_integer(where, number, at_least, word)
    return {name: 0 if number == word else number for name, number in table.items()}


# ---- layers ---------------------------------------------------------------------------------------------------------


def _paths(files: Any) -> list[Path]:
    listed = [files] if isinstance(files, (str, Path)) else [] if files is None else files
    if not isinstance(listed, Sequence) or not all(isinstance(path, (str, Path)) for path in listed):
        raise ConfigError("config", files, f"is a {type(files).__name__}", "give the path of a YAML file, or several")
    return [Path(path) for path in listed]


def _pairs(overrides: Any) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping) and all(isinstance(key, str) for key in overrides):
        return list(copy.deepcopy(dict(overrides)).items())  # later keys may reach into a caller's own mapping
    listed = () if overrides is None else overrides
    if isinstance(listed, (list, tuple)) and all(isinstance(text, str) for text in listed):
        return [parse_override(text) for text in listed]
    remedy = "give a mapping such as {'train.epochs': 10}, or a list of key=value texts"
    raise ConfigError("overrides", overrides, f"is a {type(overrides).__name__}", remedy)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    if path in seen:
        raise ConfigError("base", str(path), "the files name each other as base", "break the circle")
    layer = read_mapping(path)
    base = layer.pop("base", None)
    below = [] if base is None else _read(path.parent / str(base), (*seen, path))
    return [*below, layer]


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of one YAML file.

    Raises:
        ConfigError: there is no such file, it is no YAML, or no mapping.
    """
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError("config file", str(path), "does not exist", "check the path") from error
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError("config file", str(path), f"cannot be read: {problem}", "correct the file") from error
    if not OmegaConf.is_dict(content):
        raise ConfigError("config file", str(path), "is not a mapping", "write sections with keys, as in default.yaml")
    return OmegaConf.to_container(content)  # type: ignore[return-value]


def _merged(schema: Config, layers: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the schema's values with all layers over them, which stay as they are."""
    merged = dataclasses.asdict(schema)
    layers, pairs = copy.deepcopy((layers, pairs))
    for layer in layers:
        _merge(schema, merged, layer, "")
    named = {part for key, _ in pairs for part in (key, key.rpartition(".")[0])}
    for key, value in pairs:
        _assign(schema, merged, key, value, named)
    return merged


def _merge(schema: Any, target: dict[str, Any], layer: Mapping[str, Any], prefix: str) -> None:
    names = [item.name for item in dataclasses.fields(schema)]
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if name not in names:
            raise ConfigError(key, value, "is not a known key", _nearest_key(prefix, name, names))
        section = getattr(schema, str(name))
        if dataclasses.is_dataclass(section):
            if not isinstance(value, Mapping):
                raise ConfigError(key, value, "is a section, not a value", f"give it keys, for example {key}: {{...}}")
            _merge(section, target[name], value, f"{key}.")
        else:
            arguments = ARGUMENTS_OF.get(key)
            other = name == "name" and value is not None and "target" not in layer and target.get("target") is not None
            if arguments is not None and arguments not in layer and (target[name] != value or other):
                target[arguments] = {}
            target[name] = value
            if other:
                target["target"] = None  # of a layer below, and would win


def _assign(schema: Any, target: Any, key: str, value: Any, named: Collection[str]) -> None:
    *path, last = key.split(".")
    node, level, prefix = target, schema, ""
    for part in path:
        if level is not None:
            names = [item.name for item in dataclasses.fields(level)]
            if part not in names:
                raise ConfigError(key, value, "is not a known key", _nearest_key(prefix, part, names))
            level = getattr(level, part)
            level = level if dataclasses.is_dataclass(level) else None
        if prefix == "cluster." and part == "classes" and node[part] != AUTO:
            node[part] = _by_name("cluster.classes", node[part])
        if node and part not in node:
            raise ConfigError(key, value, f"there is no {prefix}{part}", nearest(part, list(node)))
        node, prefix = node.get(part), f"{prefix}{part}."
        if not isinstance(node, dict):
            raise ConfigError(key, value, f"{prefix[:-1]} is no mapping", f"set {prefix[:-1]} as a whole")
    if level is not None:
        beside = (ARGUMENTS_OF.get(key, ""), "target")
        keep = {name: node[name] for name in beside if f"{prefix}{name}" in named and name in node}
        _merge(level, node, {**keep, last: value}, prefix)
    else:
        node[last] = value


def _nearest_key(prefix: str, name: Any, names: Sequence[str]) -> str:
    """Look for the nearest key in the section first, then in all sections."""
    if difflib.get_close_matches(str(name), names, n=1, cutoff=0.6):
        return nearest(f"{prefix}{name}", [f"{prefix}{other}" for other in names])
    keys = [f"{s.name}.{k}" for s in dataclasses.fields(Config) for k in dataclasses.asdict(getattr(Config(), s.name))]
    same = [key for key in keys if key.split(".")[-1] == str(name)]
    return f"did you mean {same[0]!r}?" if same else nearest(f"{prefix}{name}", keys)


def _by_name(key: str, classes: Any) -> dict[str, Any]:
    if isinstance(classes, Mapping):
        return dict(classes)
    if isinstance(classes, list) and all(isinstance(item, Mapping) and "name" in item for item in classes):
        names = [item["name"] for item in classes]
        if len(set(names)) < len(names):
            raise ConfigError(key, names, "two classes have the same name", "give each class a name of its own")
        return {str(item["name"]): {k: v for k, v in item.items() if k != "name"} for item in classes}
    raise ConfigError(key, classes, "is no set of device classes", "write auto, or {name: {device: ..., ranks: ...}}")


def _type(item: dataclasses.Field[Any]) -> str:
    if item.type == "Any":
        return "plain YAML: a number, a text, a list or a mapping"
    text = str(item.type)
    if text.startswith("list"):
        return "a list, [A, B]"
    return f"a value of type {text.removeprefix('Optional[').removesuffix(']') if 'Optional' in text else text}"
