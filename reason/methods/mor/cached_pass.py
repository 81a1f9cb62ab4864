"""The network over packed rows of several sequences, each with a cache: the layers of one pass, part by part.

Rows of several sequences stand one after another, and may be at different steps of the loop: its weights are the
same for all, but for corrections of low rank, which are applied to each group of rows at the same step. Products take
all rows at once; attention goes sequence by sequence, because each has keys of its own, and reads them where they lie.
(Padding keys to a common length copies them for every token and layer: on a CPU faster below some 256 keys, slower
above, up to twice as long.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reason.backbones.decoder import LayerUse, RecursiveDecoder, Rope, rope_at
from reason.methods.mor.cache import KeySpan, KeyView, Past


class Segment(NamedTuple):
    """The rows of one sequence: its tokens at ``positions``, ascending, which were appended to the past and entered
    ``step``."""

    past: Past
    positions: np.ndarray
    step: int = 0


def begin(decoder: RecursiveDecoder, segments: Sequence[Segment], tokens: Tensor, rope: Rope) -> Tensor:
    """Embedding and first layer: (n,) tokens -> (n, D)."""
    x = decoder.embed(tokens)
    if decoder.first is None:
        return x
    return CachedAttention.outside_loop(segments).apply(decoder.first, 0, x, rope)


def recurse(decoder: RecursiveDecoder, segments: Sequence[Segment], x: Tensor, rope: Rope) -> Tensor:
    """Once through the block, the rows of each segment at its step: (n, D) -> (n, D)."""
    attention = CachedAttention.in_block(segments)
    steps, writing_steps = attention.steps, attention.writing_steps
    for j in range(len(decoder.block)):
        x = attention.apply(decoder.at(j, steps), j, x, rope, decoder.at(j, writing_steps))
    return x


def write_exit_keys(
    decoder: RecursiveDecoder, segments: Sequence[Segment], spans: Sequence[KeySpan], x: Tensor, rope: Rope
) -> None:
    """Write the keys computed from the exit states x (n, D) of rows into the spans that ``Past.exit`` returned for the
    segments, which are at the step that they no longer take."""
    counts = [len(segment.positions) for segment in segments]
    steps = [(len(segment.positions), segment.step) for segment in segments]
    for j in range(len(decoder.block)):
        _write(spans, counts, j, *decoder.at(j, steps).keys_values(x, rope))


def finish(
    decoder: RecursiveDecoder, segments: Sequence[Segment], x: Tensor, rope: Rope, rows: np.ndarray | None = None
) -> Tensor:  # fmt: skip
    """Last layer and norm: (n, D) -> (m, D), of the selected ``rows``, ascending; None: all. Every row writes its keys."""
    layer = decoder.last
    if rows is None:
        if layer is not None:
            x = CachedAttention.outside_loop(segments).apply(layer, 1, x, rope)
        return decoder.norm(x)
    index = torch.from_numpy(rows).to(x.device)
    if layer is None:
        return decoder.norm(x[index])
    CachedAttention.outside_loop(segments).write(1, *layer.keys_values(x, rope))
    x = x[index]
    if len(rows):
        attention = CachedAttention.outside_loop(select_rows(segments, rows))
        x = layer.finish(x, attention.attend(1, layer.queries(x, rope_at(rope, index))))
    return decoder.norm(x)


def select_rows(segments: Sequence[Segment], index: np.ndarray) -> list[Segment]:
    """The segments of some rows, given by their numbers, ascending."""
    ends = np.cumsum([len(segment.positions) for segment in segments])
    selected, last, first = [], 0, 0
    for segment, end, cut in zip(segments, ends, np.searchsorted(index, ends), strict=True):
        if cut > last:
            rows = index[last:cut] - first
            selected.append(Segment(segment.past, segment.positions[rows], segment.step))
        last, first = cut, end
    return selected


def _write(spans: Sequence[KeySpan], counts: list[int], layer: int, key: Tensor, value: Tensor) -> None:
    """Keys and values (n, h_kv, d_h), as many rows of them as counted for each span."""
    for span, k, v in zip(spans, key.split(counts), value.split(counts), strict=True):
        span.write(layer, k, v)


class CachedAttention:
    """Attention of the rows of one pass to cached keys: which keys they see and which they write, worked out once for
    all layers that it is used at."""

    def __init__(self, segments: Sequence[Segment], views: Sequence[KeyView], writes: Sequence[bool]):
        self.segments, self.views, self.writes = segments, views, writes
        self.counts = [len(segment.positions) for segment in segments]

    @classmethod
    def outside_loop(cls, segments: Sequence[Segment]) -> CachedAttention:
        """At the first and at the last layer, which every token passes."""
        views = [KeyView(segment.past.ends) for segment in segments]
        return cls(segments, views, [True] * len(segments))

    @classmethod
    def in_block(cls, segments: Sequence[Segment]) -> CachedAttention:
        """At the layers of the block."""
        views = [segment.past.visible(segment.step) for segment in segments]
        return cls(segments, views, [segment.past.writes(segment.step) for segment in segments])

    @property
    def steps(self) -> list[tuple[int, int]]:
        """(rows, step) of each segment."""
        return [(count, segment.step) for count, segment in zip(self.counts, self.segments, strict=True)]

    @property
    def writing_steps(self) -> list[tuple[int, int]]:
        """(rows, step) of each segment that writes keys."""
        return [one for one, writes in zip(self.steps, self.writes, strict=True) if writes]

    @cached_property
    def masks(self) -> list[Tensor | bool | None]:
        return [
            _mask(view, segment.positions) for segment, view in zip(self.segments, self.views, strict=True)
        ]

    @cached_property
    def single_rows(self) -> bool:
        """Whether every segment is one row that sees all of one span."""
        segments = zip(self.counts, self.masks, self.views, strict=True)
        return all(count == 1 and mask is None and not view.others for count, mask, view in segments)

    def apply(
        self, layer: LayerUse, j: int, x: Tensor, rope: Rope, writer: LayerUse | None = None
    ) -> Tensor:  # fmt: skip
        """A layer, number j of the spans: (n, D) -> (n, D). Rows that write no keys compute none.

        writer: the layer for only the rows that write keys, where it differs.
        """
        if all(self.writes):

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                self.write(j, k, v)
                return self.attend(j, q)

            return layer(x, rope, attend)
        if any(self.writes):
            rows = np.flatnonzero(np.repeat(self.writes, self.counts))
            index = torch.from_numpy(rows).to(x.device)
            self.write(j, *(writer or layer).keys_values(x[index], rope_at(rope, index)))
        return layer.finish(x, self.attend(j, layer.queries(x, rope)))

    def write(self, j: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values (m, h_kv, d_h) of the rows that write any."""
        spans = [view.span for view, writes in zip(self.views, self.writes, strict=True) if writes]
        if len(k) == len(spans):  # a row each, by the shortest way
            pairs = torch.stack((k, v), 1).unsqueeze(2)  # (m, 2, 1, h_kv, d_h)
            for span, pair in zip(spans, pairs.unbind(), strict=True):
                span.rows[j].select(3, span.count - 1).copy_(pair)
        else:
            counts = [count for count, writes in zip(self.counts, self.writes, strict=True) if writes]
            _write(spans, counts, j, k, v)

    def attend(self, j: int, q: Tensor) -> Tensor:
        """Attention of queries (n, h, d_h) to the keys their segments see, their own included -> (n, h, d_h)."""
        if self.single_rows:
            # The heads that share a key stand as rows of one query, which spares copying keys for each.
            kv_heads = self.views[0].span.cache.kv_heads
            grouped = q.unflatten(1, (kv_heads, -1)).unsqueeze(1)  # (n, 1, h_kv, h / h_kv, d_h)
            mixed = [
                F.scaled_dot_product_attention(q1, *view.span.view(j))
                for q1, view in zip(grouped.unbind(), self.views, strict=True)
            ]
            return torch.cat(mixed).flatten(1, 2)
        mixed = []
        for queries, view, mask in zip(q.split(self.counts), self.views, self.masks, strict=True):
            keys, values = view.layer(j)
            causal = isinstance(mask, bool)
            mixed.append(
                F.scaled_dot_product_attention(
                    queries.transpose(0, 1).unsqueeze(0), keys, values, attn_mask=None if causal else mask,
                    is_causal=causal, enable_gqa=queries.shape[1] != keys.shape[1],
                )[0].transpose(0, 1)
            )  # fmt: skip
        return torch.cat(mixed)


def _mask(view: KeyView, positions: np.ndarray) -> Tensor | bool | None:
    """Which keys a row sees: None if each sees all, True if exactly those up to its own, else (m, n) bool."""
    if (view.positions[-1] if not view.others else view.positions.max()) <= positions[0]:
        return None
    if not view.others and len(view.positions) == len(positions):
        return True
    return torch.from_numpy(view.positions <= positions[:, None]).to(view.span.cache.device)
