"""Reading and writing with a cache: each token computes the recursions that it takes, and nothing else.

Bae et al., arXiv 2507.10524; their code has no decoding. Any causal route decides the depth of a token by what stands
up to it, and a step's keys are those of the tokens that took it: so what is computed with a cache, token by token
or in chunks, is what ``network`` computes of the whole text at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from reason.methods.mor.cache import Past
from reason.methods.mor.pace import Pace, after, chosen, score
from reason.methods.mor.packed import Part, begin, finish, part_with, pick, recurse, turn
from reason.methods.mor.routes import Route

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions

Read = Literal["last", "all", "none"]  # of which tokens the head answers
Text = Sequence[int] | Tensor


def prefill(
    model: MixtureOfRecursions, past: Past, tokens: Text, route: Route | Pace | None = None, *,
    cap: int | None = None, chunk: int | None = None, read: Read = "last",
) -> Tensor:  # fmt: skip
    """Read tokens (m,) that follow what the past holds.

    Args:
        route, cap: see ``Pace``.
        chunk: tokens computed at a time, which bounds the memory that states take; None: all. The result is
            the same.
        read: the tokens whose logits are answered.

    Returns:
        Logits of the next token: (1, V), (m, V) or (0, V).

    Raises:
        ConfigError: a route that cannot be decoded with.
        OutOfPages: no room. The past is what it was.
    """
    pace = route if isinstance(route, Pace) else Pace(model, route, cap)
    chunk = chunk or len(tokens)
    with all_or_nothing([past]):
        answers = []
        for a in range(0, len(tokens), max(chunk, 1)):
            last = a + chunk >= len(tokens)
            wanted = read if last or read == "all" else "none"
            answers.append(extend(model, [past], [tokens[a : a + chunk]], [pace], wanted))
        return torch.cat(answers) if answers else _nothing(model)


def step(
    model: MixtureOfRecursions, pasts: Sequence[Past], tokens: Sequence[int], paces: Sequence[Pace]
) -> Tensor:  # fmt: skip
    """A further token of each of B sequences: logits (B, V) of the one after.

    The rows go through the loop together, fewer at each recursion; see ``scheduler`` for keeping batches full.

    Raises:
        OutOfPages: no room for one of them. All pasts are what they were.
    """
    return extend(model, pasts, [[token] for token in tokens], paces)


def backfill(
    model: MixtureOfRecursions, past: Past, tokens: Text, start: int, route: Route | Pace | None = None, *,
    cap: int | None = None, read: Read = "last",
) -> Tensor:  # fmt: skip
    """Read the tokens from position ``start`` on once more, in one packed pass, under another route or cap.

    For when a cap is raised in the middle of a text: under the old one no token left keys for the deeper steps, and
    a token that now goes there would see none. The steps that were taken already are computed along, because
    the states that tokens left them with are not kept.

    Args:
        tokens: the whole text (T,), of which the past holds the first ones.

    Returns:
        As ``prefill``, of the tokens from ``start`` on.

    Raises:
        OutOfPages: no room. The past then ends at ``start``.
    """
    past.truncate(start)
    return prefill(model, past, tokens[start:], route, cap=cap, read=read)


@torch.inference_mode()
def extend(
    model: MixtureOfRecursions, pasts: Sequence[Past], tokens: Sequence[Text], paces: Sequence[Pace],
    read: Read = "last",
) -> Tensor:  # fmt: skip
    """Some tokens more of several sequences, at least one of each, packed.

    Returns:
        Logits (n, V) of the tokens that ``read`` names, sequence after sequence.

    Raises:
        OutOfPages: no room. All pasts are what they were.
    """
    if not pasts:
        return _nothing(model)
    with all_or_nothing(pasts):
        decoder, device = model.decoder, pasts[0].cache.device
        parts = [
            Part(past, np.arange(past.length, past.length + len(t)))
            for past, t in zip(pasts, tokens, strict=True)
        ]
        for past, at, _ in parts:
            past.begin(len(at))
        ids = torch.cat([torch.as_tensor(text, dtype=torch.int64, device=device) for text in tokens])
        rope = decoder.rope(torch.from_numpy(np.concatenate([part.at for part in parts])).to(device))
        x = begin(decoder, parts, ids, rope)
        h = _loop(model, parts, paces, x, rope)
        rows = None
        if read != "all":
            ends = np.cumsum([len(part.at) for part in parts]) - 1
            rows = ends if read == "last" else ends[:0]
        return decoder.logits(finish(decoder, parts, h, rope, rows))


def _loop(
    model: MixtureOfRecursions, parts: list[Part], paces: Sequence[Pace], x: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:  # fmt: skip
    """From the loop's entry to its exit: (n, D) -> (n, D). A row is computed as long as its token stays."""
    decoder, n, whole = model.decoder, len(x), parts
    counts = [len(part.at) for part in parts]
    entry, wish = chosen(model, x)
    wishes = [None] * len(parts) if wish is None else np.split(wish, np.cumsum(counts)[:-1])
    limit = np.concatenate(
        [pace.limits(part.at, w) for pace, part, w in zip(paces, parts, wishes, strict=True)]
    )
    deepest = max(1, int(limit.max()))
    bar = np.full((len(paces), deepest), -np.inf)
    for one, pace in zip(bar, paces, strict=True):
        one[: len(pace.bars)] = pace.bars[:deepest]
    bar = np.repeat(bar, counts, axis=0)  # (n, steps)
    inside, u, h = np.arange(n), x, x  # the rows in the loop, their states, and the latest of all
    for taken in range(deepest):
        logits, heard = score(model, taken, u)
        stays = (limit > taken) & (heard > bar[:, taken])
        if taken and not stays.any():
            break
        if taken and not stays.all():
            gone, stay = (torch.from_numpy(np.flatnonzero(rows)).to(x.device) for rows in (~stays, stays))
            _leave(model, pick(parts, np.flatnonzero(~stays)), u[gone], turn(rope, gone))
            parts, u, logits, rope = (
                pick(parts, np.flatnonzero(stays)),
                u[stay],
                logits[stay],
                turn(rope, stay),
            )
            inside, limit, bar = inside[stays], limit[stays], bar[stays]
        parts = [part._replace(step=taken) for part in parts]
        for past, at, _ in parts:
            past.enter(taken, at)
        u = model.combine(u, recurse(decoder, parts, u, rope), logits)
        h = u if len(inside) == n else h.index_copy(0, torch.from_numpy(inside).to(x.device), u)
    if parts[0].step < model.recursions - 1:
        _leave(model, parts, u, rope)
    return after(model, x, h, entry, lambda: np.concatenate([past.depth[at] for past, at, _ in whole]))


def _leave(model: MixtureOfRecursions, parts: Sequence[Part], u: Tensor, rope: tuple[Tensor, Tensor]) -> None:
    """Rows leave after the step they are at, before the last one. What that leaves behind, the cache says."""
    parts = [part._replace(step=part.step + 1) for part in parts]
    runs = [run for past, at, _ in parts if (run := past.leave(at)) is not None]
    if runs:
        part_with(model.decoder, parts, runs, u, rope)


def _nothing(model: MixtureOfRecursions) -> Tensor:
    return model.decoder.embed.weight.new_empty(0, model.decoder.shape.vocab)


@contextmanager
def all_or_nothing(pasts: Sequence[Past]) -> Iterator[None]:
    """Whatever goes wrong inside, the pasts are then what they were."""
    lengths = [past.length for past in pasts]
    try:
        yield
    except BaseException:
        for past, length in zip(pasts, lengths, strict=True):
            past.truncate(length)
        raise
