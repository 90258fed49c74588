"""Settings of a run: a frozen dataclass, filled from a YAML file and `key=value` overrides.

OmegaConf checks keys and types against the dataclass; this module reads the text, replaces `${NAME}`
and `${NAME:-default}` by environment variables, refuses the conversions of OmegaConf that hide a
mistake, and turns every error into one sentence.
"""

import copy
import dataclasses
import difflib
import json
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dinocell.errors import ConfigError

Settings = TypeVar("Settings")


class _Unquoted(str):
    """The text of an unquoted number or boolean, and in `meaning` what YAML reads."""

    meaning: Any


class _Loader(yaml.SafeLoader):
    """YAML that keeps the text of numbers: the dataclass decides what `24:00:00`, `007` or `no` is."""


def _unquoted(loader: _Loader, node: yaml.ScalarNode) -> _Unquoted:
    text = _Unquoted(node.value)
    text.meaning = yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
    return text


_NUMBERS = (":bool", ":float", ":int")
_RESOLVED = (*_NUMBERS, ":null", ":merge")
_Loader.yaml_implicit_resolvers = {
    first: [item for item in resolvers if item[0].endswith(_RESOLVED)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag in _NUMBERS:
    _Loader.add_constructor(f"tag:yaml.org,2002{_tag}", _unquoted)

# What a field of each type takes; float("1e-4"), because YAML reads a number without a dot as text.
_ACCEPTED: dict[Any, Any] = {bool: bool, int: int, float: (float, int, str), str: str}


def load_settings(
    kind: type[Settings], path: str | Path, overrides: Sequence[str] = ()
) -> Settings:
    """Read a YAML file with the keys of the frozen dataclass `kind`, change single keys, and build it.

    Overrides are `key=value` with dotted keys, the value in YAML: `optimizer.lr=1e-4`,
    `data.datasets.0.weight=2`.

    Raises ConfigError (the file is missing or not YAML, a key is unknown, or a value has the wrong
    type or range).
    """
    return config_from_mapping(kind, read_settings(path, overrides))


def read_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested keys of a file after its overrides; numbers and booleans keep their text.

    An override replaces the whole value at its key: `environment={}` empties a section.

    Raises ConfigError (the file (none: only the overrides) or an override cannot be read).
    """
    settings = {} if path is None else _read(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ConfigError(
                f"An override must be key=value, got {override!r}: for example optimizer.lr=1e-4"
            )
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(
                f"The value of {key} must be YAML, got {text!r}: put quotes around it"
            ) from error
        node: Any = settings
        for part in parts[:-1]:
            index = _index(node, part, key)
            inner = node[index] if isinstance(node, list) else node.get(index)
            # A copy, because a YAML alias may share it with another key.
            node[index] = {} if inner is None else copy.copy(inner)
            node = node[index]
        node[_index(node, parts[-1], key)] = value
    return settings


def _index(node: Any, part: str, key: str) -> Any:
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError(
            f"The override {key} must lead to a key, but what stands before {part} is a value: end the key at that value"
        )
    if not (part.isascii() and part.isdecimal() and int(part) < len(node)):
        raise ConfigError(
            f"The override {key} must name one of {len(node)} items, got {part}: count from 0"
        )
    return int(part)


def _read(path: Path) -> dict[str, Any]:
    try:
        mapping = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(
            f"The configuration must be a readable file, got {path} ({error.strerror}): check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The configuration must be UTF-8 text, got {path}: is it a YAML file?"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).replace('"<unicode string>"', path.name).split())
        raise ConfigError(
            f"The configuration must be YAML, got {path} ({reason}): correct that line"
        ) from error
    if not isinstance(mapping, (dict, type(None))):
        raise ConfigError(
            f"The configuration must be a mapping of keys, got {type(mapping).__name__} in {path}: "
            "write `key: value` lines"
        )
    return mapping or {}


def _fitted(value: Any, hint: Any, where: str) -> Any:
    """`value` with unquoted scalars read as the type `hint` needs, and text ready for OmegaConf.

    Refuses what OmegaConf converts or does not check: text for a number, a number for a boolean, and
    the items of a list or section.
    """
    arguments = [item for item in typing.get_args(hint) if item is not ...]
    if type(None) in arguments:
        return None if value is None else _fitted(value, arguments[0], where)
    if isinstance(value, _Unquoted):
        is_text = hint is str and value.lower() not in ("true", "false")
        value = str(value) if is_text else value.meaning
    require(value != "???", f"`{where}` must be a value, got '???': replace this placeholder")
    if hint in _ACCEPTED and (
        not isinstance(value, _ACCEPTED[hint]) or isinstance(value, bool) != (hint is bool)
    ):
        raise ConfigError(
            f"`{where}` must be of type {hint.__name__}, got {value!r}: write a value of that type"
        )
    if isinstance(value, str):  # without a reference in it, as OmegaConf sees it
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", _expand_environment(value))
    if hint is float and str(value).strip().lstrip("+-").lower() in ("inf", "infinity", "nan"):
        raise ConfigError(f"`{where}` must be a finite number, got {value}: write another number")
    if isinstance(value, str):
        return value
    inner = arguments[-1] if arguments else None
    if isinstance(value, Mapping):
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        return {
            str(key): _fitted(item, hints.get(key, inner), f"{where}.{key}" if where else str(key))
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_fitted(item, inner, f"{where}[{index}]") for index, item in enumerate(value)]
    return value


def _expand_environment(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        found = os.environ.get(match[1]) or match[2]
        if found is None:
            raise ConfigError(
                f"The environment variable {match[1]} must be set for {text!r}, got none: set it, or "
                f"write ${{{match[1]}:-default}}"
            )
        return found

    return re.sub(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}", replace, text)


def config_from_mapping(kind: type[Settings], mapping: Mapping[str, Any]) -> Settings:
    """Build a configuration dataclass from nested mappings, checking keys and types.

    A field of type `str` takes an unquoted number of a file or override as its text (`name=3` is "3",
    `time=24:00:00`), also `yes`, `no`, `on` and `off`, but neither `true` nor `false`.  Fields of other
    types take what YAML 1.1 reads (`seed=010` is 8), and no quoted number.

    Raises ConfigError (an unknown key (the message names the nearest known one and all of them), a
    missing key, or a value of another type).
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue

    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"The configuration must be a mapping of keys, got {mapping!r}: write `key: value` lines"
        )
    settings = _merged(OmegaConf.structured(kind), kind, (), _fitted(mapping, kind, ""))
    try:
        return typing.cast("Settings", OmegaConf.to_object(settings))
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"The configuration must have the key {error.full_key}, got none: add this key"
        ) from error


def _merged(settings: Any, kind: Any, path: tuple[str, ...], value: Any) -> Any:
    """`settings` with `value` at `path`; an error names the key and what its dataclass `kind` knows."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    nested = value
    for key in reversed(path):
        nested = {key: nested}
    try:
        return OmegaConf.merge(settings, nested)
    except (OmegaConfBaseException, TypeError) as error:
        where, parent, key = ".".join(path), kind, path[-1] if path else ""
        if isinstance(error, OmegaConfBaseException) and error.full_key:
            where, parent, key = error.full_key, error.object_type, str(error.key)
            value = getattr(error, "value", value)
        elif isinstance(value, Mapping):  # the error does not say which of the keys
            inner = typing.get_type_hints(kind)[key] if path else kind
            for name, item in value.items():
                settings = _merged(settings, inner, (*path, name), item)
        known: dict[str, str] = {}
        if dataclasses.is_dataclass(parent):
            known = {
                field.name: field.type.__name__ if isinstance(field.type, type) else str(field.type)
                for field in dataclasses.fields(parent)
            }
        if isinstance(error, ConfigKeyError) and key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {where.removesuffix(key)}{near[0]}?" if near else "remove it"
            raise ConfigError(
                f"Each key of the configuration must be known, got '{where}': {hint} "
                f"(known: {', '.join(known)})"
            ) from error
        raise ConfigError(
            f"`{where}` must be of type {known.get(key, 'str')}, got {value!r}: write a value of that type"
        ) from error


def config_to_mapping(config: Any) -> dict[str, Any]:
    """Nested plain dict of a configuration dataclass, ready for YAML or JSON (tuples as lists)."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(config))))


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `holds`."""
    if not holds:
        raise ConfigError(message)


def require_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ConfigError unless the value of key `name` is one of `choices`."""
    known = ", ".join(str(choice) for choice in choices)
    require(value in choices, f"{name} must be one of {known}, got {value!r}: choose one of them")


def require_at_least(name: str, value: float | None, least: float) -> None:
    """Raise ConfigError unless the value of key `name` is at least `least`, or None."""
    fits = value is None or value >= least
    require(fits, f"{name} must be at least {least}, got {value}: give a larger number")
