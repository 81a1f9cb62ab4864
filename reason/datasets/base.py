"""What a dataset is to the rest: a card that names it, and an object with a digest and views."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class DatasetCard:
    """A dataset as the command line sees it. The entry point in group ``reason.datasets`` names one."""

    name: str
    summary: str
    views: tuple[str, ...]  # of "sequences", "chats", "problems", "text"
    Config: type  # dataclass with `name` first; comments give units
    target: str  # "module:function", called as function(config, offline=bool) -> Dataset
    licence: str = ""
    citation: str = ""
    sources: tuple[str, ...] = field(default_factory=tuple)  # where it comes from, in the order tried


class Dataset(Protocol):
    """A loaded dataset. A view is a method named after it: ``dataset.sequences(...)``."""

    name: str
    digest: str  # 32 hex digits of sha256 over canonical rows and the loader's version
    info: dict[str, Any]  # counts to print and log
    notes: list[str]  # sentences that a reader of the results should know
