"""A routed decoder as a language model whose texts are forked, continued and scored: ``reason.backbones.generation``.

A row is a ``Past``, a fork a copy of its pages; which recursions a token takes is decided by the tokens up to it, so forks
have the depths of the text that they were copied from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from reason.backbones.cache import Ids, State
from reason.errors import DataError
from reason.methods.mor.cache import MoRCache, Past
from reason.methods.mor.decode import states
from reason.methods.mor.halting import HaltingRule
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.token_selection import Route

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
