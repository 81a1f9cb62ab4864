"""The network over packed rows of sequences that have a past: each part of a pass, against the cache.

Rows of several sequences stand one after another, and may stand at several steps of the loop: its weights are the
same for all, but for corrections of low rank, which go run by run of rows at the same step. Products take all rows at once; attention goes sequence by sequence, because each has keys of its
own, and reads them where they lie. (Padding keys to a common length copies them for every token and layer: on a CPU
faster below some 256 keys, slower above, up to twice as long.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reason.backbones.decoder import RecursiveDecoder, Rope, Use
from reason.methods.mor.cache import Past, Run, Seen


class Part(NamedTuple):
    """The rows of one sequence: its tokens at positions ``at``, ascending, which have begun and entered ``step``."""

    past: Past
    at: np.ndarray
    step: int = 0


def begin(decoder: RecursiveDecoder, parts: Sequence[Part], tokens: Tensor, rope: Rope) -> Tensor:
    """Embedding and first layer: (n,) tokens -> (n, D)."""
    x = decoder.embed(tokens)
    return x if decoder.first is None else Glance.of_ends(parts).through(decoder.first, 0, x, rope)


def recurse(decoder: RecursiveDecoder, parts: Sequence[Part], x: Tensor, rope: Rope) -> Tensor:
    """Once through the block, the rows of each part at its step: (n, D) -> (n, D)."""
    glance = Glance.of_steps(parts)
    steps, writers = glance.steps, glance.writers
    for j in range(len(decoder.block)):
        x = glance.through(decoder.at(j, steps), j, x, rope, decoder.at(j, writers))
    return x


def part_with(
    decoder: RecursiveDecoder, parts: Sequence[Part], runs: Sequence[Run], x: Tensor, rope: Rope
) -> None:
    """Keys made from the states x (n, D) that rows left with, into the runs that ``Past.leave`` named for the parts,
    which are at the step that they do not take any more."""
    counts, steps = [len(part.at) for part in parts], [(len(part.at), part.step) for part in parts]
    for j in range(len(decoder.block)):
        _write(runs, counts, j, *decoder.at(j, steps).keys_values(x, rope))


def finish(
    decoder: RecursiveDecoder, parts: Sequence[Part], x: Tensor, rope: Rope, read: np.ndarray | None = None
) -> Tensor:  # fmt: skip
    """Last layer and norm: (n, D) -> (m, D), the rows ``read``, ascending; None: all. Every row leaves its keys."""
    layer = decoder.last
    if read is None:
        return decoder.norm(x if layer is None else Glance.of_ends(parts).through(layer, 1, x, rope))
    index = torch.from_numpy(read).to(x.device)
    if layer is None:
        return decoder.norm(x[index])
    Glance.of_ends(parts).leave(1, *layer.keys_values(x, rope))
    x = x[index]
    if len(read):
        mixed = Glance.of_ends(pick(parts, read)).look(1, layer.queries(x, turn(rope, index)))
        x = layer.finish(x, mixed)
    return decoder.norm(x)


def turn(rope: Rope, index: Tensor) -> Rope:
    """The angles of some rows."""
    return rope[0][index], rope[1][index]


def pick(parts: Sequence[Part], index: np.ndarray) -> list[Part]:
    """The parts of some rows, by their numbers, ascending."""
    ends = np.cumsum([len(part.at) for part in parts])
    kept, last, first = [], 0, 0
    for part, end, cut in zip(parts, ends, np.searchsorted(index, ends), strict=True):
        if cut > last:
            kept.append(Part(part.past, part.at[index[last:cut] - first], part.step))
        last, first = cut, end
    return kept


def _write(runs: Sequence[Run], counts: list[int], layer: int, key: Tensor, value: Tensor) -> None:
    """Keys and values (n, h_kv, d_h), of as many rows as counted for each run."""
    for run, k, v in zip(runs, key.split(counts), value.split(counts), strict=True):
        run.write(layer, k, v)


class Glance:
    """What the rows of one pass through some layers see and leave, made up once for all these layers."""

    def __init__(self, parts: Sequence[Part], seen: Sequence[Seen], write: Sequence[bool]):
        self.parts, self.seen, self.write = parts, seen, write
        self.counts = [len(part.at) for part in parts]

    @property
    def steps(self) -> list[tuple[int, int]]:
        """(rows, step) of each part."""
        return [(count, part.step) for count, part in zip(self.counts, self.parts, strict=True)]

    @property
    def writers(self) -> list[tuple[int, int]]:
        """(rows, step) of each part that leaves keys."""
        return [one for one, write in zip(self.steps, self.write, strict=True) if write]

    @cached_property
    def masks(self) -> list[Tensor | bool | None]:
        return [_mask(one, part.at) for part, one in zip(self.parts, self.seen, strict=True)]

    @cached_property
    def singly(self) -> bool:
        """Whether every part is one row that sees all of one run."""
        parts = zip(self.counts, self.masks, self.seen, strict=True)
        return all(count == 1 and mask is None and not one.others for count, mask, one in parts)

    @classmethod
    def of_ends(cls, parts: Sequence[Part]) -> Glance:
        """At the first and at the last layer, which every token passes."""
        return cls(parts, [Seen(part.past.ends) for part in parts], [True] * len(parts))

    @classmethod
    def of_steps(cls, parts: Sequence[Part]) -> Glance:
        """In the block."""
        seen = [part.past.seen(part.step) for part in parts]
        return cls(parts, seen, [part.past.writes(part.step) for part in parts])

    def through(
        self, layer: Use, j: int, x: Tensor, rope: Rope, writer: Use | None = None
    ) -> Tensor:  # fmt: skip
        """Layer, which the runs know by the number j: (n, D) -> (n, D). Rows that leave no keys compute none.

        writer: the layer for only the rows that leave keys, where it is another.
        """
        if all(self.write):

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                self.leave(j, k, v)
                return self.look(j, q)

            return layer(x, rope, attend)
        if any(self.write):
            rows = np.flatnonzero(np.repeat(self.write, self.counts))
            index = torch.from_numpy(rows).to(x.device)
            self.leave(j, *(writer or layer).keys_values(x[index], turn(rope, index)))
        return layer.finish(x, self.look(j, layer.queries(x, rope)))

    def leave(self, j: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values (m, h_kv, d_h) of the rows that leave any."""
        runs = [one.run for one, write in zip(self.seen, self.write, strict=True) if write]
        if len(k) == len(runs):  # a row each, by the shortest way
            pairs = torch.stack((k, v), 1).unsqueeze(2)  # (m, 2, 1, h_kv, d_h)
            for run, pair in zip(runs, pairs.unbind(), strict=True):
                run.rows[j].select(3, run.count - 1).copy_(pair)
        else:
            counts = [count for count, write in zip(self.counts, self.write, strict=True) if write]
            _write(runs, counts, j, k, v)

    def look(self, j: int, q: Tensor) -> Tensor:
        """Attention of queries (n, h, d_h) to what their parts see, themselves included -> (n, h, d_h)."""
        if self.singly:
            # The heads that share a key stand as rows of one query, which spares copying keys for each.
            kv_heads = self.seen[0].run.cache.kv_heads
            grouped = q.unflatten(1, (kv_heads, -1)).unsqueeze(1)  # (n, 1, h_kv, h / h_kv, d_h)
            mixed = [
                F.scaled_dot_product_attention(q1, *one.run.view(j))
                for q1, one in zip(grouped.unbind(), self.seen, strict=True)
            ]
            return torch.cat(mixed).flatten(1, 2)
        mixed = []
        for some, one, mask in zip(q.split(self.counts), self.seen, self.masks, strict=True):
            keys, values = one.layer(j)
            causal = isinstance(mask, bool)
            mixed.append(
                F.scaled_dot_product_attention(
                    some.transpose(0, 1).unsqueeze(0), keys, values, attn_mask=None if causal else mask,
                    is_causal=causal, enable_gqa=some.shape[1] != keys.shape[1],
                )[0].transpose(0, 1)
            )  # fmt: skip
        return torch.cat(mixed)


def _mask(seen: Seen, at: np.ndarray) -> Tensor | bool | None:
    """Who sees which key: None if each sees all, True if exactly those up to its own, else (m, n) bool."""
    if (seen.at[-1] if not seen.others else seen.at.max()) <= at[0]:
        return None
    if not seen.others and len(seen.at) == len(at):
        return True
    return torch.from_numpy(seen.at <= at[:, None]).to(seen.run.cache.device)
