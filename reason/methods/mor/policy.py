"""A routed decoder as a language model whose texts are forked, continued and scored: ``reason.backbones.generation``.

A row is a ``Past``, a fork a copy of its pages; which recursions a token takes is decided by the tokens up to it, so forks
have the depths of the text that they were copied from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from reason.backbones.cache import Ids, State
from reason.backbones.config import RecursiveConfig
from reason.backbones.decoder import RecursiveDecoder
from reason.backbones.from_run import MODEL, again, identity_of, model_file, read_file, read_network
from reason.backbones.generation import Batch
from reason.backbones.tokens import Tokens
from reason.backbones.weights import read_tensors
from reason.errors import ConfigError, DataError
from reason.files import Altered, read_json, sha256
from reason.methods.mor.cache import MoRCache, Past
from reason.methods.mor.calibrate import profile_thresholds
from reason.methods.mor.config import MorConfig
from reason.methods.mor.decode import states
from reason.methods.mor.halting import HaltingRule
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.outcomes import decoder_flops
from reason.methods.mor.token_selection import Route, evaluation_route

PASS = 512  # tokens of a prompt computed at a time


class RoutedRows:
    """``CachedLM`` of a Mixture-of-Recursions network.

    Args:
        route, cap: see ``HaltingRule``.
        context: tokens that a text can have.
        cache: None: one of its own, in the key-value mode that the model is evaluated with.

    Raises:
        ConfigError: a route that looks ahead.
    """

    def __init__(
        self, model: MixtureOfRecursions, context: int, route: Route | None = None, cap: int | None = None,
        cache: MoRCache | None = None,
    ):  # fmt: skip
        self.model, self.context = model, context
        self.rule, self.cache = HaltingRule(model, route, cap), cache or MoRCache(model)
        self._pasts: dict[int, Past] = {}
        self._next = 0

    def open(self, texts: Sequence[Ids]) -> tuple[list[int], State]:
        for text in texts:
            if not 0 < len(text) <= self.context:
                raise DataError(
                    f"A text has {len(text):,} tokens; this model reads from 1 to {self.context:,}.",
                    "Shorten the text, or train with a larger backbone.context.",
                )
        rows = [self._add(self.cache.open()) for _ in texts]
        for row, text in zip(rows, texts, strict=True):
            for a in range(0, len(text) - 1, PASS):
                self._states([row], [text[a : min(a + PASS, len(text) - 1)]], "none")
        return rows, self._read(rows, [text[-1:] for text in texts], "last")

    def step(self, rows: Sequence[int], tokens: Tensor) -> State:
        return self._read(rows, [[token] for token in tokens.tolist()], "last")

    def read(self, rows: Sequence[int], texts: Sequence[Ids], keep: bool) -> Iterator[State]:
        for row, text in zip(rows, texts, strict=True):
            past = self._pasts[row]
            length = past.length
            if length + len(text) > self.context:
                raise DataError(
                    f"A text would grow to {length + len(text):,} tokens; this model reads {self.context:,}."
                )
            yield self._read([row], [text], "all")
            if not keep:
                past.truncate(length)

    def fork(self, rows: Sequence[int], lengths: Sequence[int] | None = None) -> list[int]:
        made = []
        for i, row in enumerate(rows):
            past = self._pasts[row].fork()
            if lengths is not None:
                past.truncate(lengths[i])
            made.append(self._add(past))
        return made

    def close(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._pasts.pop(row).free()

    def _add(self, past: Past) -> int:
        self._pasts[self._next] = past
        self._next += 1
        return self._next - 1

    def _states(self, rows: Sequence[int], texts: Sequence[Ids], read: str) -> Tensor:
        pasts = [self._pasts[row] for row in rows]
        return states(self.model, pasts, texts, [self.rule] * len(rows), read)  # type: ignore[arg-type]

    def _read(self, rows: Sequence[int], texts: Sequence[Ids], read: str) -> State:
        hidden = self._states(rows, texts, read)
        with torch.inference_mode():
            return State(self.model.decoder.logits(hidden).float(), hidden)


# --- a finished run as a language model for other methods ----------------------------------------------


@dataclass(frozen=True)
class RunSource:
    """A finished run of mor, not yet in memory: ``MethodCard.language_model``.

    folder: of the run, whose depth and thresholds hold. owner: of the run that trained the model.
    """

    folder: Path
    owner: Path
    config: Mapping[str, Any]  # of the run, nested
    fitted: Mapping[str, Any] | None  # its calibration
    mean_depth: float  # recursions of a token, when it was judged
    tokens: Tokens

    @property
    def where(self) -> str:
        return f"run {self.folder.name}"

    @cached_property
    def digest(self) -> str:
        """sha256 of the weights and of all that decides how it writes."""
        told = [
            self.config["mor"],
            self.config["depth"],
            self.config["seed"],
            self.fitted,
            self.tokens.digest,
        ]
        return hashlib.sha256(
            f"{sha256(self.owner / MODEL)} {json.dumps(told, sort_keys=True)}".encode()
        ).hexdigest()

    def load(self) -> RoutedModel:
        """The model, in memory."""
        kept = read_network(self.owner)
        assert kept is not None
        shape, lora, _ = kept
        backbone, own = self.config["backbone"], self.config["mor"]
        trained = self.config["train_depth"]
        decoder = RecursiveDecoder(
            RecursiveConfig(**backbone), shape=shape, recursions=max(trained, 1), lora=lora
        )
        mor = MorConfig(**own) if trained else MorConfig(routing="none")
        model = MixtureOfRecursions(decoder, mor, backbone["init_std"], None, bool(backbone["source"]))
        try:
            tensors, _ = read_tensors(self.owner / MODEL)
            model.load_state_dict(tensors)
        except (OSError, ValueError, RuntimeError, SafetensorError, Altered) as error:
            raise DataError(
                f"The model of {self.where} cannot be read: {error}.", again(self.owner)
            ) from error
        return RoutedModel(self, model.eval())


class RoutedModel(nn.Module):
    """A routed decoder with its tokenizer, in the place of ``backbones.causal.Causal`` where nothing is trained."""

    def __init__(self, source: RunSource, model: MixtureOfRecursions):
        super().__init__()
        self.model, self.tokens, self.where, self.source = model, source.tokens, source.where, source.where
        self._depth, self._seed = source.config["depth"], source.config["seed"]
        self._mean_depth = source.mean_depth
        thresholds = profile_thresholds(source.fitted, model.config.profile)
        self._route = evaluation_route(
            model.config, model.recursions, torch.zeros(1, 1, dtype=torch.int64), thresholds, self._seed
        )
        self.context: int = source.config["backbone"]["context"]
        self.width = model.decoder.shape.hidden
        self.eos = frozenset({source.tokens.eos})

    @property
    def flops_per_token(self) -> float:
        """As ``Causal.flops_per_token``, at the mean depth that the run spent when it was judged."""
        sizes = decoder_flops(self.model)
        looped = sizes.block * (sizes.layer + sizes.correction) * self._mean_depth
        return float(sizes.ends * sizes.layer + looped + sizes.head)

    def batch(self) -> Batch:
        """An empty batch to generate in, with a cache of its own."""
        return Batch(RoutedRows(self.model, self.context, self._route, self._depth), self.tokens, self.eos)


def open_source(folder: Path, offline: bool = False) -> RunSource:
    """A finished run of mor as a language model. offline: moot, as nothing is fetched.

    Raises:
        ConfigError: a route that looks ahead, so that nothing can be written with it.
        DataError: files are missing or broken.
    """
    where = f"run {folder.name}"
    identity = identity_of(folder, where)
    owner = model_file(folder, identity, where).parent.parent
    kept = read_network(owner)
    if kept is None:
        raise DataError(f"{where} has no {MODEL}.", again(owner))
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        result = read_file(folder, "result.json", where, again(folder))
        judged = next(entry for entry in result["curve"] if entry["depth"] == config["depth"])
        mean_depth = float(judged["effective_depth"])
        fitted = (
            read_json(folder / "calibration.json")["fitted"]
            if (folder / "calibration.json").is_file()
            else None
        )
    except (OSError, ValueError, KeyError, TypeError, StopIteration, yaml.YAMLError) as error:
        raise DataError(f"The files of {where} cannot be used: {error!r}.", again(folder)) from error
    own = config["mor"]
    if config["train_depth"] and own["routing"] in ("expert",) and (own["route"] == "topk" or fitted is None):
        raise ConfigError(
            f"{where} routes by top-k, which looks ahead: which tokens it chooses depends on tokens that are not written yet.",
            f"Calibrate its thresholds first: reason evaluate {folder} mor.route=threshold",
        )
    if config["train_depth"] and own["routing"] == "random":
        raise ConfigError(
            f"{where} draws its depths at random by the whole text, so it cannot write one token by token.",
            "Use a run with another mor.routing.",
        )
    return RunSource(folder, owner, config, fitted, mean_depth, kept[-1])
