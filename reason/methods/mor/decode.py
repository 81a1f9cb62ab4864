"""Prefill and decoding with a cache: each token computes the recursions that it takes, and nothing else.

Bae et al., arXiv 2507.10524; their code has no decoding. A causal route decides the depth of a token by the tokens
up to it, and a step's keys are those of the tokens that took it: so a pass with a cache, token by token or in chunks,
computes the same as ``network`` does over the whole text at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reason.backbones.decoder import Rope, rope_at
from reason.methods.mor.cache import Past
from reason.methods.mor.cached_pass import Segment, begin, finish, recurse, select_rows, write_exit_keys
from reason.methods.mor.halting import HaltingRule, choose_depths, exit_states, router_logits
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.token_selection import Route

Read = Literal["last", "all", "none"]  # the tokens whose logits are returned
Text = Sequence[int] | Tensor


def prefill(
    model: MixtureOfRecursions, past: Past, tokens: Text, route: Route | HaltingRule | None = None, *,
    cap: int | None = None, chunk: int | None = None, read: Read = "last",
) -> Tensor:  # fmt: skip
    """Read tokens (m,) that follow those of the past.

    Args:
        route, cap: see ``HaltingRule``.
        chunk: tokens computed at a time, which bounds the memory that states take; None: all. The result is
            the same.
        read: the tokens whose logits are returned.

    Returns:
        Logits of the next token: (1, V), (m, V) or (0, V).

    Raises:
        ConfigError: a route that cannot be decoded with.
        OutOfPages: too few free pages. The past is unchanged.
    """
    rule = route if isinstance(route, HaltingRule) else HaltingRule(model, route, cap)
    chunk = chunk or len(tokens)
    with all_or_no_logits([past]):
        logits = []
        for a in range(0, len(tokens), max(chunk, 1)):
            last = a + chunk >= len(tokens)
            wanted = read if last or read == "all" else "none"
            logits.append(extend(model, [past], [tokens[a : a + chunk]], [rule], wanted))
        return torch.cat(logits) if logits else _no_logits(model)


def step(
    model: MixtureOfRecursions, pasts: Sequence[Past], tokens: Sequence[int], rules: Sequence[HaltingRule]
) -> Tensor:  # fmt: skip
    """Decode one more token of each of B sequences: logits (B, V) of the next one.

    The rows go through the loop together, fewer at each recursion; see ``scheduler`` for keeping batches full.

    Raises:
        OutOfPages: too few free pages for one of them. All pasts are unchanged.
    """
    return extend(model, pasts, [[token] for token in tokens], rules)


def backfill(
    model: MixtureOfRecursions, past: Past, tokens: Text, start: int, route: Route | HaltingRule | None = None, *,
    cap: int | None = None, read: Read = "last",
) -> Tensor:  # fmt: skip
    """Read the tokens from position ``start`` on again, in one packed pass, under another route or cap.

    For when a cap is raised in the middle of a text: under the old one no token wrote keys of the deeper steps, and
    a token that now takes them would see none. Steps that were already taken are recomputed, because the states
    after them are not cached.

    Args:
        tokens: the whole text (T,), which begins with the tokens of the past.

    Returns:
        As ``prefill``, of the tokens from ``start`` on.

    Raises:
        OutOfPages: too few free pages. The past then ends at ``start``.
    """
    past.truncate(start)
    return prefill(model, past, tokens[start:], route, cap=cap, read=read)


@torch.inference_mode()
def extend(
    model: MixtureOfRecursions, pasts: Sequence[Past], tokens: Sequence[Text], rules: Sequence[HaltingRule],
    read: Read = "last",
) -> Tensor:  # fmt: skip
    """Append some tokens to several sequences, at least one to each, in one packed pass.

    Returns:
        Logits (n, V) of the tokens that ``read`` selects, sequence after sequence.

    Raises:
        OutOfPages: too few free pages. All pasts are unchanged.
    """
    return model.decoder.logits(states(model, pasts, tokens, rules, read))


@torch.inference_mode()
def states(
    model: MixtureOfRecursions, pasts: Sequence[Past], tokens: Sequence[Text], rules: Sequence[HaltingRule],
    read: Read = "last",
) -> Tensor:  # fmt: skip
    """As ``extend``, but what the head reads: (n, D)."""
    if not pasts:
        return model.decoder.embed.weight.new_empty(0, model.decoder.shape.hidden)
    with all_or_no_logits(pasts):
        decoder, device = model.decoder, pasts[0].cache.device
        segments = [
            Segment(past, np.arange(past.length, past.length + len(t)))
            for past, t in zip(pasts, tokens, strict=True)
        ]
        for past, positions, _ in segments:
            past.append(len(positions))
        ids = torch.cat([torch.as_tensor(text, dtype=torch.int64, device=device) for text in tokens])
        rope = decoder.rope(
            torch.from_numpy(np.concatenate([segment.positions for segment in segments])).to(device)
        )
        x = begin(decoder, segments, ids, rope)
        h = _loop(model, segments, rules, x, rope)
        rows = None
        if read != "all":
            ends = np.cumsum([len(segment.positions) for segment in segments]) - 1
            rows = ends if read == "last" else ends[:0]
        return finish(decoder, segments, h, rope, rows)


def _loop(
    model: MixtureOfRecursions, segments: list[Segment], rules: Sequence[HaltingRule], x: Tensor, rope: Rope
) -> Tensor:  # fmt: skip
    """From entry to the loop to its exit: (n, D) -> (n, D). A row is computed as long as its token is active."""
    decoder, n, whole = model.decoder, len(x), segments
    counts = [len(segment.positions) for segment in segments]
    entry, choice = choose_depths(model, x)
    choices = [None] * len(segments) if choice is None else np.split(choice, np.cumsum(counts)[:-1])
    max_depth = np.concatenate(
        [
            rule.max_depths(segment.positions, c)
            for rule, segment, c in zip(rules, segments, choices, strict=True)
        ]
    )
    deepest = max(1, int(max_depth.max()))
    threshold = np.full((len(rules), deepest), -np.inf)
    for one, rule in zip(threshold, rules, strict=True):
        one[: len(rule.thresholds)] = rule.thresholds[:deepest]
    threshold = np.repeat(threshold, counts, axis=0)  # (n, steps)
    rows, u, h = np.arange(n), x, x  # active rows, their states, and the latest states of all rows
    for step in range(deepest):
        logits, deciding = router_logits(model, step, u)
        stays = (max_depth > step) & (deciding > threshold[:, step])
        if step and not stays.any():
            break
        if step and not stays.all():
            exiting, staying = (
                torch.from_numpy(np.flatnonzero(mask)).to(x.device) for mask in (~stays, stays)
            )
            _exit(model, select_rows(segments, np.flatnonzero(~stays)), u[exiting], rope_at(rope, exiting))
            segments, u, logits, rope = (
                select_rows(segments, np.flatnonzero(stays)),
                u[staying],
                logits[staying],
                rope_at(rope, staying),
            )
            rows, max_depth, threshold = rows[stays], max_depth[stays], threshold[stays]
        segments = [segment._replace(step=step) for segment in segments]
        for past, positions, _ in segments:
            past.enter(step, positions)
        u = model.combine(u, recurse(decoder, segments, u, rope), logits)
        h = u if len(rows) == n else h.index_copy(0, torch.from_numpy(rows).to(x.device), u)
    if segments[0].step < model.recursions - 1:
        _exit(model, segments, u, rope)
    return exit_states(
        model, x, h, entry, lambda: np.concatenate([past.depth[positions] for past, positions, _ in whole])
    )


def _exit(model: MixtureOfRecursions, segments: Sequence[Segment], u: Tensor, rope: Rope) -> None:
    """Rows exit after the step they are at, before the last one, and write what the cache keeps of that."""
    segments = [segment._replace(step=segment.step + 1) for segment in segments]
    spans = [span for past, positions, _ in segments if (span := past.exit(positions)) is not None]
    if spans:
        write_exit_keys(model.decoder, segments, spans, u, rope)


def _no_logits(model: MixtureOfRecursions) -> Tensor:
    return model.decoder.embed.weight.new_empty(0, model.decoder.shape.vocab)


@contextmanager
def all_or_no_logits(pasts: Sequence[Past]) -> Iterator[None]:
    """Whatever goes wrong inside, the pasts are then unchanged."""
    lengths = [past.length for past in pasts]
    try:
        yield
    except BaseException:
        for past, length in zip(pasts, lengths, strict=True):
            past.truncate(length)
        raise
