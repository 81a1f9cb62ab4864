"""A resolved run: its configuration, the depths it judges, and the hashes that say which run it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from reason import registry
from reason.errors import ConfigError
from reason.keys import walk
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
        deepest = self.config.depth
        return self.card.depth.depths(deepest) if self.config.eval.curve else [deepest]

    @property
    def sources(self) -> dict[str, str]:
        """What weights begin as, by key: ``{"backbone.source": "smollm2-135m"}``. From scratch: not in it."""
        return {key: self.flat[key] for key in self._marked("path", "settled") if self.flat[key]}

    def opener(self, key: str) -> str:
        """ "module:function" that opens the source named by ``key``: the key says so, or the backbone of its section."""
        told = next(k.metadata["opened"] for k in walk(type(self.config)) if k.name == key)
        return told or registry.card("backbones", self.flat[f"{key.rpartition('.')[0]}.name"]).opened

    @property
    def trains(self) -> bool:
        """Whether this run trains a model: as its method does, unless the method's own keys (``trains``) say otherwise."""
        return getattr(getattr(self.config, self.card.name), "trains", self.card.trains)

    def hashes(self, data_digest: str, source_digests: Mapping[str, str] | None = None) -> tuple[str, str]:
        """(train_hash, config_hash): which model this is, and which result. 64 hex digits each.

        source_digests: of what each of ``sources`` holds.

        Devices and paths are left out of both; depth and evaluation keys of the first: those of
        ``eval`` and those that a method's Config marks (``evaluation``). The card's version is in both.
        """
        whole = self._hashed() | {"version": self.card.version, "data_digest": data_digest}
        whole |= {f"digest of {key}": digest for key, digest in (source_digests or {}).items()}
        return _digest(self._shaping(whole)), _digest(whole)

    @property
    def judging(self) -> set[str]:
        """Keys besides ``eval.*`` that say how a trained model is judged."""
        unbound = set() if self.card.depth.bound else {"train_depth"}
        return {"depth", *unbound, *self._marked("evaluation")}

    def retrains(self, recorded: Mapping[str, Any]) -> list[str]:
        """Keys by which the model of a run that was ``recorded`` is another than this plan's."""
        return [k for k, v in self._shaping(self._hashed()).items() if recorded.get(k, v) != v]

    def _hashed(self) -> dict[str, Any]:
        """All but devices, and what says where something lies: the digests speak for that."""
        left_out = {"runs", "offline", *self._marked("path")}
        return {k: v for k, v in self.flat.items() if not k.startswith("hardware.") and k not in left_out}

    def _shaping(self, values: dict[str, Any]) -> dict[str, Any]:
        """Those of ``values`` that shape the trained model."""
        judging = self.judging
        return {k: v for k, v in values.items() if k not in judging and not k.startswith("eval.")}

    def _marked(self, mark: Literal["evaluation", "path"], value: Any = None) -> set[str]:
        """The keys, nested ones too, that carry ``mark`` (set to ``value``, if one is given)."""
        found = {k.name: k.metadata.get(mark) for k in walk(type(self.config))}
        return {name for name, source in found.items() if source and value in (None, source)}

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False, allow_unicode=True)


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_depth(depth: int, train_depth: int, axis: DepthAxis) -> None:
    """Refuse a depth that a model trained for ``train_depth`` cannot be judged at."""
    if depth < axis.least:
        raise ConfigError(
            f"depth={depth} is too small: the smallest depth is {axis.least} {axis.unit} ({axis.zero}).",
            f"Use depth={axis.least} or more.",
        )
    if axis.bound and depth > max(train_depth, axis.least):
        raise ConfigError(
            f"depth={depth} is greater than train_depth={train_depth}: "
            f"the model is not trained with that many {axis.unit}.",
            f"Use depth={max(train_depth, axis.least)}{' or less' * (train_depth > axis.least)}, or train with "
            f"train_depth={depth}.",
        )
