"""The keys of a configuration: fields of dataclasses that carry their meaning, and a walk over them.

Everything that is configured is a dataclass: the sections that every run has, the Config of a method, a
backbone or a dataset, and the sections nested in these. A field made by ``key`` says what it means to the
people who read ``reason show``, and whether it shapes the model.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal


def key(
    default: Any, meaning: str, *, evaluation: bool = False, path: bool | Literal["settled"] = False, opened: str = "",
    aside: bool = False,
) -> Any:  # fmt: skip
    """A field of a configuration dataclass.

    Args:
        default: its value where no layer sets it; a list is copied for each object.
        meaning: what it means, with its unit and where the default comes from, as ``reason show`` prints it.
        evaluation: it shapes how a model is judged and not the model: a sweep over it trains once.
        path: it says where something lies. It stays out of hashes, because the digest speaks for the content,
            and is made absolute when a plan is resolved; "settled" = its dataclass does so itself.
        opened: for the source of a network (settled): "module:function", called as f(source, offline), whose answer has the
            source's ``digest``. Empty: what the card of the section's backbone names.
        aside: it changes nothing of what the method answers, only what is measured beside it or written down: reports do not
            tell configurations apart by it.
    """
    metadata = {"meaning": meaning, "evaluation": evaluation, "path": path, "opened": opened, "aside": aside}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Key:
    """One key of a configuration, found by ``walk``."""

    name: str  # dotted, below the dataclass that was walked: "reward.source"
    type: Any  # as declared, resolved from its annotation
    metadata: Mapping[str, Any]  # what ``key`` was given

    @property
    def meaning(self) -> str:
        return self.metadata.get("meaning", "")


def walk(schema: type, prefix: str = "") -> Iterator[Key]:
    """Every key of a dataclass and of the dataclasses nested in it, at any depth, in order."""
    for f, declared in _fields(schema):
        if is_dataclass(declared):
            yield from walk(typing.cast(type, declared), f"{prefix}{f.name}.")
        else:
            yield Key(f"{prefix}{f.name}", declared, f.metadata)


@functools.cache
def _fields(schema: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(schema)
    return [(f, hints[f.name]) for f in fields(schema)]


def marked(schema: type, mark: Literal["evaluation", "path", "aside"], prefix: str = "") -> set[str]:
    """The names of the keys that carry a mark, whichever it is set to."""
    return {k.name for k in walk(schema, prefix) if k.metadata.get(mark)}
