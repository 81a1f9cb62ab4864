"""A resolved run: its configuration, the depths it judges, and the hashes that say which run it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from reason.errors import ConfigError
from reason.keys import marked
from reason.methods.base import DepthAxis, MethodCard


@dataclass
class Plan:
    """One run, resolved: what `--dry-run` prints and what the runner executes.

    ``config`` is an object with one attribute per section (``config.train.lr``), ``flat`` the same
    values under dotted keys, ``origin`` the layer that set each key, ``written`` the text of those values that
    were written as an interpolation.
    """

    experiment: str
    card: MethodCard
    config: Any
    flat: dict[str, Any]
    origin: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)

    @property
    def depths(self) -> list[int]:
        """The depths that the run evaluates, ascending."""
        low = self.card.depth.least if self.config.eval.curve else self.config.depth
        return list(range(low, self.config.depth + 1))

    @property
    def source(self) -> str:
        """What the weights begin as; "" = from scratch."""
        return getattr(self.config.backbone, "source", "")

    def hashes(self, data_digest: str, source_digest: str = "") -> tuple[str, str]:
        """(train_hash, config_hash): which model this is, and which result. 64 hex digits each.

        source_digest: of what ``source`` holds.

        Devices and paths are left out of both; depth and evaluation keys of the first: those of
        ``eval`` and those that a method's Config marks (``evaluation``).
        """
        whole = {
            k: v for k, v in self.flat.items() if not k.startswith("hardware.") and k not in self._paths()
        }
        whole["data_digest"] = data_digest
        if source_digest:
            whole["source_digest"] = source_digest
        train = {k: v for k, v in whole.items() if k not in self.judging and not k.startswith("eval.")}
        return _digest(train), _digest(whole)

    @property
    def judging(self) -> set[str]:
        """Keys besides ``eval.*`` that say how a trained model is judged."""
        return {"depth", *self._marked(self.card.name, "evaluation")}

    def retrains(self, recorded: Mapping[str, Any]) -> list[str]:
        """Keys by which the model of a run that was ``recorded`` is another than this plan's."""
        others = self._paths() | self.judging
        return [
            key
            for key, value in self.flat.items()
            if not key.startswith(("hardware.", "eval."))
            and key not in others
            and recorded.get(key, value) != value
        ]

    def _paths(self) -> set[str]:
        """Keys that say where something lies: the digests speak for them."""
        sections = ("dataset", "backbone", self.card.name)
        return {"runs", "offline"}.union(*(self._marked(section, "path") for section in sections))

    def _marked(self, section: str, mark: Literal["evaluation", "path"]) -> set[str]:
        """Keys of a section, and of those nested in it, whose fields carry ``mark``."""
        return marked(type(getattr(self.config, section)), mark, f"{section}.")

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False, allow_unicode=True)


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_depth(depth: int, train_depth: int, axis: DepthAxis) -> None:
    """Refuse a depth that a model trained for ``train_depth`` cannot be judged at."""
    if depth < axis.least:
        raise ConfigError(
            f"depth={depth} is below the least: it starts at {axis.least} {axis.unit} ({axis.zero}).",
            f"Use depth={axis.least} or more.",
        )
    if axis.bound and depth > max(train_depth, axis.least):
        raise ConfigError(
            f"depth={depth} is beyond train_depth={train_depth}: "
            f"this model is not trained for so many {axis.unit}.",
            f"Use depth={max(train_depth, axis.least)}{' or less' * (train_depth > axis.least)}, or train with "
            f"train_depth={depth}.",
        )
