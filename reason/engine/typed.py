"""Types of configuration values: from text to what a field declares, and the words when it does not fit."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

import yaml

from reason.errors import ConfigError, nearest


def leaves(schema: type, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, declared type) of every leaf of a dataclass."""
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from leaves(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", hints[f.name]


def values_of(config: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from values_of(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", list(value) if isinstance(value, (list, tuple)) else value


def typed(schema: type, fields: dict[str, Any], values: dict[str, Any], origin: dict[str, str]) -> Any:
    """Build the schema's object from dotted keys and text."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.structured(schema)
    for key, text in values.items():
        kind = fields[key]
        try:
            OmegaConf.update(tree, key, _parse(text, kind))
        except (OmegaConfBaseException, ValueError) as error:
            raise _wrong_type(key, text, kind, origin.get(key, "")) from error
    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"The configuration does not resolve: {error}", "Check the ${...} in it."
        ) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _parse(text: Any, kind: Any) -> Any:
    """Text to what OmegaConf checks: raw for strings, null for optionals, YAML for lists."""
    if not isinstance(text, str):
        return text
    choices = typing.get_args(kind)
    optional = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    if optional and text.lower() in ("null", "none", "~", ""):
        return None
    if typing.get_origin(kind) is Literal and text not in choices:
        raise ValueError(text)
    if typing.get_origin(kind) in (list, tuple):
        return yaml.safe_load(f"[{text.strip('[]')}]")
    return text


def _wrong_type(key: str, text: Any, kind: Any, where: str) -> ConfigError:
    at = f" ({where})" if where and where != "command line" else ""
    if typing.get_origin(kind) is Literal:
        choices = [str(c) for c in typing.get_args(kind)]
        close = nearest(str(text), choices)
        return ConfigError(
            f"{key}={text}{at} is not one of the choices.",
            (f"Did you mean {close!r}? " if close else "") + f"Choices: {', '.join(choices)}.",
        )
    return ConfigError(f"{key}={text}{at} is not {_describe(kind)}.", f"For example: {key}={_example(kind)}")


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(_describe(k) for k in typing.get_args(kind) if k is not type(None)) + " (or null)"
    if typing.get_origin(kind) in (list, tuple):
        return "a list"
    return names.get(kind, str(kind))


def _example(kind: Any) -> str:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return _example(typing.get_args(kind)[0])
    return {int: "3", float: "0.001", bool: "true"}.get(kind, "1,2,3")


def unknown_key(key: str, where: str, fields: dict[str, Any], method: str) -> ConfigError:
    # Compare leaves too: `lr` and `batchsize` are far from `train.lr` and `train.batch_size` as wholes.
    leaf = nearest(key.split(".")[-1], [k.split(".")[-1] for k in fields])
    close = [nearest(key, fields)] if "." in key else []
    close = [k for k in close if k] or [k for k in fields if leaf and k.split(".")[-1] == leaf]
    meant = " or ".join(repr(k) for k in close[:3])
    sections = {k.split(".")[0] for k in fields if "." in k}
    if key in sections:
        return ConfigError(
            f"{key!r} is a group of keys.",
            f"Set one of them, e.g. {next(k for k in fields if k.startswith(key + '.'))}=...",
        )
    at = "" if where == "command line" else f" in {where}"
    return ConfigError(
        f"Unknown key {key!r}{at}.",
        (f"Did you mean {meant}? " if meant else "") + f"`reason show {method}` lists every key.",
    )
