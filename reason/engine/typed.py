"""A configuration in the making: layers of text, merged one by one into OmegaConf over the dataclasses of a run.

Scalars arrive as the text that was written, and OmegaConf applies the type that the field declares. What it
leaves open stands here: ``null`` for optional keys, commas for lists, no ``nan`` among numbers, and ``${``
that opens no interpolation. Every refusal names the key, its layer, and the nearest thing that would do.
"""

from __future__ import annotations

import contextlib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf, TupleConfig, errors

from reason.engine.layers import RECORDED
from reason.errors import ConfigError, nearest
from reason.keys import walk

_NULL = ("null", "none", "~", "")


class Draft:
    """The keys of one run while its layers are merged.

    Attributes:
        keys: every key of the run, under its dotted name.
        origin: the layer that set each key; "default" where none did.
        written: the text of each key whose value is an interpolation, such as ``${train.steps}``.
    """

    def __init__(self, schema: type, method: str):
        self.keys = {k.name: k for k in walk(schema)}
        self.origin = dict.fromkeys(self.keys, "default")
        self.written: dict[str, str] = {}
        self._method = method
        self._config = OmegaConf.structured(schema)
        self._open: dict[str, Any] = {}  # interpolations that are still to be resolved

    def merge(self, where: str, values: Mapping[str, Any]) -> None:
        """Put a layer on top of those merged before.

        Raises:
            ConfigError: an unknown key, or a value that is not of the declared type.
        """
        for key, value in values.items():
            if key not in self.keys:
                raise _unknown(key, where, self.keys, self._method)
            self.origin[key] = where
            self.written.pop(key, None)
            self._open.pop(key, None)
            if where != RECORDED and interpolates(value):  # what was recorded is resolved
                self._open[key], self.written[key] = value, _text(value)
            else:
                self._set(key, value)

    def value(self, key: str) -> Any:
        """What a key stands for so far, its interpolation resolved.

        Raises:
            ConfigError: it is still ``???``, or an interpolation that cannot be resolved to the declared type.
        """
        if key in self._open:
            self._set(key, self._resolved(key))
        if OmegaConf.is_missing(self._config, key):
            raise self._missing(key)
        return OmegaConf.select(self._config, key)

    def fill(self, key: str, value: Any) -> None:
        """Settle what a key stands for; its layer, and what was written, stay."""
        self._open.pop(key, None)
        self._set(key, value)

    def finish(self) -> Any:
        """The object of the schema, interpolations resolved; the checks of its dataclasses run here.

        Raises:
            ConfigError: a key that is still ``???``, an interpolation that cannot be resolved, or a value that
                a dataclass refuses.
        """
        for key in sorted(k.partition("[")[0] for k in OmegaConf.missing_keys(self._config)):
            if key not in self._open:
                raise self._missing(key)
        for key, value in {key: self._resolved(key) for key in self._open}.items():
            self._set(key, value)
        try:
            return OmegaConf.to_object(self._config)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _resolved(self, key: str) -> Any:
        """Interpolations are resolved among plain values: what one stands for is then read like any other text."""
        plain: Any = OmegaConf.create(OmegaConf.to_container(self._config))
        for name, value in self._open.items():
            OmegaConf.update(plain, name, value, merge=False)
        return _select(plain, key, self.written, self.origin, self.keys, "is not a configuration key")

    def _set(self, key: str, value: Any) -> None:
        kind = _Kind.of(self.keys[key].type)
        value = kind.spelled(value)
        try:
            if kind.base is not str and "${" in str(value):
                raise errors.ValidationError("it would be read as an interpolation")
            if isinstance(value, list) and any(isinstance(item, (list, tuple, dict)) for item in value):
                raise errors.ValidationError("OmegaConf would accept it")
            OmegaConf.update(self._config, key, _escaped(value))
            texts = [v for v in (value if isinstance(value, list) else [value]) if v not in (None, "???")]
            if kind.base is float and not all(math.isfinite(float(text)) for text in texts):
                raise errors.ValidationError("it is not finite")
        except errors.ValidationError as error:
            raise self._wrong(key, value, kind) from error

    def _missing(self, key: str) -> ConfigError:
        return ConfigError(
            f"{key} is required but has no value: it is ???{_at(self.origin[key])}.",
            f"Set it, e.g. {key}={_Kind.of(self.keys[key].type).example}",
        )

    def _wrong(self, key: str, value: Any, kind: _Kind) -> ConfigError:
        text, at = _text(value), _at(self.origin[key])
        setting = f"{key}={text}{at}"
        if key in self.written:
            setting = f"{key}={self.written[key]}{at} resolves to {text!r}, which"
        if not kind.choices:
            return ConfigError(f"{setting} is not {kind.name}.", f"For example: {key}={kind.example}")
        wrong = next((v for v in value if v not in kind.choices), "") if isinstance(value, list) else text
        close = nearest(str(wrong), kind.choices)
        return ConfigError(
            f"{setting} is not {'a list of the choices' if kind.many else 'one of the choices'}.",
            (f"Did you mean {close!r}? " if close else "") + f"Choices: {', '.join(kind.choices)}.",
        )


def interpolates(value: Any) -> bool:
    """Whether a value, or an item of it, is an interpolation in OmegaConf's grammar."""
    if "${" not in str(value):
        return False
    try:
        OmegaConf.create([value])
    except errors.GrammarParseError:
        return False
    return True


def resolved(key: str, where: str, values: Mapping[str, Any]) -> str:
    """What ``values[key]`` stands for while there is no schema yet: the name of a method, backbone or dataset.

    Raises:
        ConfigError: it refers to what is neither among ``values`` nor in the environment.
    """
    if not interpolates(values[key]):
        return str(values[key])
    plain = OmegaConf.create()
    for name, value in values.items():
        with contextlib.suppress(errors.OmegaConfBaseException):  # refused in words once there is a schema
            OmegaConf.update(plain, name, value, merge=False)
    absent = "no layer sets; names of methods, backbones and datasets cannot refer to default values"
    return str(_select(plain, key, {key: _text(values[key])}, {key: where}, values, absent))


@dataclass(frozen=True)
class _Kind:
    """What a field may be declared as: ``base``, perhaps null, perhaps a list of it."""

    base: Any  # int, float, bool, str or a Literal
    optional: bool
    many: bool

    @classmethod
    def of(cls, declared: Any) -> _Kind:
        optional = isinstance(declared, types.UnionType) or typing.get_origin(declared) is typing.Union
        if optional:
            (declared,) = (k for k in typing.get_args(declared) if k is not type(None))
        many = typing.get_origin(declared) in (list, tuple)
        base = typing.get_args(declared)[0] if many else declared
        assert base in (int, float, bool, str) or typing.get_origin(base) is Literal, f"no key can be {base}"
        return cls(base, optional, many)

    def spelled(self, value: Any) -> Any:
        """A value as OmegaConf reads it: text, a list of texts, or None."""
        if self.optional and (value is None or str(value).lower() in _NULL):
            return None
        if not self.many:
            return _scalar(value)
        parts = value if isinstance(value, (list, tuple)) else str(value).strip("[] ").split(",")
        return [_scalar(part.strip() if isinstance(part, str) else part) for part in parts if part != ""]

    @property
    def choices(self) -> list[str]:
        return list(map(str, typing.get_args(self.base))) if typing.get_origin(self.base) is Literal else []

    @property
    def name(self) -> str:
        one, several, *_ = _WORDS[self.base]
        return (f"a list of {several}" if self.many else one) + " (or null)" * self.optional

    @property
    def example(self) -> str:
        return self.choices[0] if self.choices else _WORDS[self.base][3 if self.many else 2]


_WORDS = {  # for one value and for a list of them, and an example of each
    int: ("a whole number", "whole numbers", "3", "1,2,3"),
    float: ("a number", "numbers", "0.001", "0.1,0.5"),
    bool: ("true or false", "true or false", "true", "true,false"),
    str: ("text", "texts", "TEXT", "ONE,TWO"),
}


def _escaped(value: Any) -> Any:
    """Text in which OmegaConf sees no interpolation."""
    if isinstance(value, (list, tuple)):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _scalar(value: Any) -> Any:
    """Its text; what is no scalar stays, for OmegaConf to refuse."""
    return value if value is None or isinstance(value, (list, tuple, dict)) else str(value)


def _text(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value))
    return "null" if value is None else str(value)


def _at(where: str) -> str:
    return "" if where in ("", "command line") else f" ({where})"


# --- words ------------------------------------------------------------------------------------------


def _select(
    plain: Any, key: str, written: dict[str, str], origin: dict[str, str], keys: Iterable[str], absent: str
) -> Any:
    """The value of a key among plain values, its interpolation resolved.

    absent: what to say of a key that is referred to and is not there.

    Raises:
        ConfigError: it cannot be; it names the key to blame, which is another where interpolations follow each other.
    """
    try:
        value = OmegaConf.select(plain, key)
        if isinstance(value, (ListConfig, TupleConfig)):
            return OmegaConf.to_container(value, resolve=True)
        if isinstance(value, DictConfig):
            raise errors.InterpolationResolutionError(_GROUP)
        return value
    except errors.OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        name = (re.findall(r"'([^']+)'", reason) or [""])[0]  # of what was not found
        blamed = next((k for k, text in written.items() if name and name in text), key)
        setting = f"{blamed}={written[blamed]}{_at(origin[blamed])}"
        raise _unresolved(setting, error, reason, name, keys, absent) from error


_GROUP = "Interpolation to parent node detected"  # OmegaConf's words where the group holds the key itself


def _unresolved(
    setting: str, error: Exception, reason: str, name: str, keys: Iterable[str], absent: str
) -> ConfigError:
    if "nvironment variable" in reason:
        return ConfigError(
            f"{setting}: the environment variable {name} is not set.",
            f"Set it, or give a default value: ${{oc.env:{name},VALUE}}",
        )
    if isinstance(error, errors.InterpolationKeyError):
        close = " or ".join(f"${{{k}}}" for k in _close(name.lstrip("."), keys))
        return ConfigError(
            f"{setting} refers to {name!r}, which {absent}.",
            f"Did you mean {close}?" if close else "`reason show NAME` lists every key.",
        )
    if "ecursi" in reason:
        return ConfigError(f"{setting} refers to itself.", "Set one of the keys in the cycle to a value.")
    if reason == _GROUP:
        return ConfigError(
            f"{setting} refers to a section, not a key.", "Refer to one of its keys, such as ${train.steps}."
        )
    if isinstance(error, errors.UnsupportedInterpolationType):
        return ConfigError(
            f"{setting}: there is no resolver {reason.split()[-1]!r}.",
            "Use ${KEY} for another key and ${oc.env:NAME} for an environment variable.",
        )
    return ConfigError(
        f"{setting} cannot be resolved: {reason}.", "See OmegaConf's documentation for the syntax of ${...}."
    )


def _close(key: str, keys: Iterable[str]) -> list[str]:
    """The keys that ``key`` may have been meant to be: of its own section first, then of any."""
    keys = list(keys)
    section = key
    while "." in section:
        section = section.rpartition(".")[0]
        inside = [k for k in keys if k.startswith(f"{section}.")]
        if found := _alike(key.removeprefix(f"{section}."), inside):
            return found
    whole = nearest(key, keys) if "." in key else ""
    return [whole] if whole else _alike(key.split(".")[-1], keys)


def _alike(leaf: str, keys: list[str]) -> list[str]:
    """Leaves are compared: `batchsize` is far from `train.batch_size` as a whole."""
    close = nearest(leaf.split(".")[-1], [k.split(".")[-1] for k in keys])
    return [k for k in keys if close and k.split(".")[-1] == close][:3]


def _unknown(key: str, where: str, keys: Iterable[str], method: str) -> ConfigError:
    inside = next((k for k in keys if k.startswith(f"{key}.")), None)
    if inside:
        return ConfigError(f"{key!r} is a section, not a key.", f"Set one of its keys, e.g. {inside}=...")
    if where == RECORDED:
        return ConfigError(
            f"This run was recorded by another version of reason, or of the package of {method}: it has the unknown "
            f"key {key!r}.",
            "Install the versions listed in its env.json, or start a new run.",
        )
    meant = " or ".join(repr(k) for k in _close(key, keys))
    at = "" if where == "command line" else f" in {where}"
    return ConfigError(
        f"Unknown key {key!r}{at}.",
        (f"Did you mean {meant}? " if meant else "") + f"`reason show {method}` lists every key.",
    )
