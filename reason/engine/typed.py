"""Types of configuration values: from text to what a field declares, and the words when it does not fit."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

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
    """Build the schema's object from dotted keys and text; the rest keeps its defaults.

    Raises:
        ConfigError: a value that is not of its declared type, or that its dataclass refuses.
    """
    tree: dict[str, Any] = {}
    for key, text in values.items():
        try:
            value = parse(text, fields[key])
        except ValueError as error:
            raise _wrong_type(key, text, fields[key], origin.get(key, "")) from error
        section, _, leaf = key.rpartition(".")
        tree.setdefault(section, {})[leaf] = value
    try:
        top = tree.pop("", {})
        kinds = typing.get_type_hints(schema)
        return schema(**top, **{section: kinds[section](**leaves) for section, leaves in tree.items()})
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


_TRUE, _FALSE, _NULL = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("null", "none", "~", "")


def parse(value: Any, kind: Any) -> Any:
    """Text to what the field declares. What is not text (a preset, a recorded run) is taken by its spelling.

    Raises:
        ValueError: it is not of that type.
    """
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        (inner,) = (k for k in typing.get_args(kind) if k is not type(None))
        return None if value is None or str(value).lower() in _NULL else parse(value, inner)
    if typing.get_origin(kind) in (list, tuple):
        parts = value if isinstance(value, (list, tuple)) else str(value).strip("[] ").split(",")
        return [
            parse(p.strip() if isinstance(p, str) else p, typing.get_args(kind)[0]) for p in parts if p != ""
        ]
    text = str(value)
    if typing.get_origin(kind) is Literal:
        if text not in typing.get_args(kind):
            raise ValueError(text)
        return text
    if kind is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError(text)
        return text.lower() in _TRUE
    assert kind in (int, float, str), f"a configuration field cannot be {kind}"
    if kind is float and not math.isfinite(float(text)):  # passes every comparison, and means nothing
        raise ValueError(text)
    return kind(text)


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
