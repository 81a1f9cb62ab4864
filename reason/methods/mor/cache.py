"""The key-value cache of decoding: for each token of a sequence, keys and values of the recursions that it took.

Bae et al., arXiv 2507.10524, section 2.3. Their code has no decoding; this is the cache that theirs would need.
A *key span* holds the rows of one sequence at one recursion, for all layers of the block. It has a row for each token
that took the recursion and none for the others, is contiguous, and grows by whole pages, so that memory follows
the tokens and attention reads rows where they lie. (Pages scattered over a pool have to be copied together for every
token and layer. On a CPU that took up to twice as long from some 256 keys on; with fewer it was faster.)

``Past.visible`` returns the rows that a token sees at a step; ``visible_keys`` lists the five modes, which are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reason.errors import RunError, unknown
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.visible_keys import KV_MODES


class OutOfPages(RunError):
    """The cache has too few free pages. Nothing was changed; free a sequence and try again."""


class MoRCache:
    """The pasts of any number of sequences, and the pages that they share.

    Args:
        model: the network whose keys are cached; gives sizes, device and dtype.
        kv_mode: which keys a token sees (``visible_keys.KV_MODES``); None: the mode the model is evaluated with.
        page_size: tokens in a page, which holds their keys and values at one layer.
        limit: pages at most, over all sequences; None: no limit.

    Raises:
        ConfigError: an unknown mode.
    """

    def __init__(
        self, model: MixtureOfRecursions, kv_mode: str | None = None, *, page_size: int = 16, limit: int | None = None
    ):  # fmt: skip
        self.kv_mode = model.config.kv_mode if kv_mode is None else kv_mode
        if self.kv_mode not in KV_MODES:
            raise unknown("key-value mode", self.kv_mode, KV_MODES)
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; a page holds at least 1 token.")
        shape, sharing = model.decoder.shape, model.decoder.sharing
        self.recursions, self.block, self.ends = model.recursions, sharing.block, sharing.ends
        self.kv_heads, self.head_dim = shape.kv_heads, shape.head_dim
        weight = model.decoder.embed.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.page_size, self.limit, self.used = page_size, limit, 0

    def open(self) -> Past:
        """A sequence without tokens."""
        return Past(self)

    @property
    def free_pages(self) -> float:
        """Pages that can still be allocated."""
        return float("inf") if self.limit is None else self.limit - self.used

    def allocate(self, pages: int) -> None:
        """Allocate pages, or free them where the number is negative.

        Raises:
            OutOfPages: fewer are free; none is allocated.
        """
        if pages > self.free_pages:
            raise OutOfPages(
                f"The cache is full: {self.used} of {self.limit} pages are in use, and {pages} more are needed.",
                "Decode fewer sequences at a time, or raise the limit.",
            )
        self.used += pages

    # --- sizes --------------------------------------------------------------------------------------------

    @property
    def row_bytes(self) -> int:
        """Of one token's key and value at one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def bytes(self) -> int:
        """Allocated, by all sequences together."""
        return self.used * self.page_size * self.row_bytes

    def bytes_needed(self, depth: Sequence[int] | np.ndarray) -> int:
        """Bytes that tokens of these depths need, not rounded up to pages: 2 + b (mean depth) rows a token, or 2 + b with
        ``sharing``. ``propagate`` adds a row for each token that exited early."""
        depth = np.asarray(depth)
        loop = len(depth) if self.kv_mode == "sharing" else int(depth.sum())
        if self.kv_mode == "propagate":
            loop += int((depth < self.recursions).sum())
        return (self.ends * len(depth) + self.block * loop) * self.row_bytes

    def pages_needed(self, depth: Sequence[int] | np.ndarray) -> int:
        """Pages that one sequence needs whose tokens have these depths."""
        depth = np.asarray(depth)
        steps = 1 if self.kv_mode == "sharing" else self.recursions
        rows = [int((depth > step).sum()) for step in range(steps)]
        if self.kv_mode == "propagate":
            rows.append(int((depth < self.recursions).sum()))
        return self.ends * self._ceil(len(depth)) + self.block * sum(map(self._ceil, rows))

    def _ceil(self, rows: int) -> int:
        return -(-rows // self.page_size)


class Past:
    """The cached keys and values of one sequence. Made by ``MoRCache.open``.

    length: tokens that were appended.
    """

    def __init__(self, cache: MoRCache):
        self.cache, self.length = cache, 0
        self.ends = KeySpan(cache, cache.ends)  # of the first and of the last layer
        count = {"sharing": 1, "propagate": cache.recursions + 1}.get(cache.kv_mode, cache.recursions)
        self.spans = [
            KeySpan(cache, cache.block) for _ in range(count)
        ]  # with propagate, the last is of tokens that exited
        self._depth = np.zeros(0, np.int16)

    @property
    def depth(self) -> np.ndarray:
        """(length,) recursions that each token took so far."""
        return self._depth[: self.length]

    @property
    def pages(self) -> int:
        """Pages allocated to this sequence."""
        return sum(span.pages for span in (self.ends, *self.spans))

    def count(self, step: int) -> int:
        """Cached rows of ``step`` (from 0): tokens that took it; with sharing, none after the first."""
        return self.spans[step].count if step < len(self.spans) else 0

    # --- growing: lengths first, then a layer at a time -----------------------------------------------------

    def append(self, tokens: int) -> None:
        """Make room for more tokens. They have depth 0 until they ``enter`` a step.

        Raises:
            OutOfPages: nothing was changed.
        """
        n = self.length + tokens
        self.ends.extend(range(self.length, n))
        if n > len(self._depth):
            grown = np.zeros(max(n, 2 * len(self._depth), 64), np.int16)
            grown[: self.length] = self.depth
            self._depth = grown
        self._depth[self.length : n] = 0
        self.length = n

    def enter(self, step: int, positions: Sequence[int] | np.ndarray) -> None:
        """The tokens at ``positions`` (ascending) take ``step``. Their rows are written by the block's layers.

        Raises:
            OutOfPages: nothing was changed.
        """
        if self.writes(step):
            self.spans[step].extend(positions)
        self._depth[positions] = step + 1

    def exit(self, positions: Sequence[int] | np.ndarray) -> KeySpan | None:
        """The tokens at ``positions`` exit before the last recursion. With propagate, returns the span to write the keys
        to that are computed from their exit states; else None.

        Raises:
            OutOfPages: nothing was changed.
        """
        if self.cache.kv_mode != "propagate":
            return None
        self.spans[-1].extend(positions)
        return self.spans[-1]

    def writes(self, step: int) -> bool:
        return step == 0 or self.cache.kv_mode != "sharing"

    # --- reading ------------------------------------------------------------------------------------------

    def visible(self, step: int) -> KeyView:
        """The keys that are visible at ``step`` to the tokens that have just entered it."""
        kv_mode, span = self.cache.kv_mode, self.spans[0 if self.cache.kv_mode == "sharing" else step]
        if kv_mode in ("recursion", "sharing") or step == 0:
            return KeyView(span)
        if kv_mode == "deepest":
            return KeyView(
                span, [(self.spans[r], self._rows(self.spans[r], r + 1, r + 1)) for r in range(step)]
            )
        other = self.spans[0 if kv_mode == "hybrid" else -1]
        return KeyView(span, [(other, self._rows(other, 0, step))])

    def _rows(self, span: KeySpan, least: int, most: int) -> np.ndarray:
        """Rows of a span whose tokens now have a depth from ``least`` to ``most``."""
        depth = self._depth[span.positions]
        return np.flatnonzero((depth >= least) & (depth <= most))

    def view(self, step: int, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values visible at a step and layer of the block: (h_kv, n, d_h) twice."""
        keys, values = self.visible(step).layer(layer)
        return keys[0], values[0]

    # --- truncating and forking ---------------------------------------------------------------------------------------

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on, as if they had never been appended."""
        for span in (self.ends, *self.spans):
            span.truncate(length)
        self.length = min(self.length, length)

    def fork(self) -> Past:
        """An independent copy.

        Raises:
            OutOfPages: there is no copy.
        """
        other = Past(self.cache)
        self.cache.allocate(self.pages)
        for mine, theirs in zip((self.ends, *self.spans), (other.ends, *other.spans), strict=True):
            mine.copy_to(theirs)
        other.length, other._depth = self.length, self._depth.copy()
        return other

    def free(self) -> None:
        """Free all pages."""
        self.truncate(0)


class KeySpan:
    """Keys and values of some tokens of one sequence, at some layers, in the order in which they were added.

    positions: (count,) int64, their positions in the text.
    rows: of each layer, (2, 1, h_kv, capacity, d_h): keys and values, each a batch of one, as attention wants it.
    """

    def __init__(self, cache: MoRCache, layers: int):
        self.cache, self.layers, self.count, self.pages = cache, layers, 0, 0
        self._positions = np.zeros(0, np.int64)
        self._set_storage(self._empty(0))

    @property
    def positions(self) -> np.ndarray:
        return self._positions[: self.count]

    def extend(self, positions: Sequence[int] | range | np.ndarray) -> None:
        """Add rows for tokens at these positions; their content is undefined until ``write``."""
        count = self.count + len(positions)
        if count > len(self._positions):
            self._move(np.arange(self.count), count)
        self._positions[self.count : count] = positions
        self.count = count

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Fill the last m rows of a layer with key and value (m, h_kv, d_h)."""
        last = slice(self.count - len(key), self.count)
        for row, x in zip(self.rows[layer], (key, value), strict=True):
            row[0, :, last] = x.transpose(0, 1)

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """(1, h_kv, count, d_h) twice, where they lie."""
        keys, values = self.rows[layer].narrow(3, 0, self.count).unbind()
        return keys, values

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on."""
        keep = np.flatnonzero(self.positions < length)
        count = len(keep)
        if count == self.count:
            return
        in_front = count == 0 or keep[-1] == count - 1
        if in_front and len(self._positions) - count < self.cache.page_size:
            self.count = count
        else:
            self._move(keep, count)

    def copy_to(self, other: KeySpan) -> None:
        """Into an empty span, whose pages are already allocated."""
        other._positions, other.count, other.pages = self._positions.copy(), self.count, self.pages
        other._set_storage(self.storage.clone())

    def _move(self, keep: np.ndarray, capacity_for: int) -> None:
        """Move the rows ``keep`` into storage of as many whole pages as ``capacity_for`` rows need."""
        cache, count = self.cache, len(keep)
        capacity = -(-capacity_for // cache.page_size) * cache.page_size
        pages = capacity // cache.page_size * self.layers
        cache.allocate(pages - self.pages)
        positions, storage = np.zeros(capacity, np.int64), self._empty(capacity)
        positions[:count] = self._positions[keep]
        rows = slice(count) if count == self.count else torch.from_numpy(keep).to(cache.device)
        storage[..., :count, :] = self.storage[..., rows, :]
        self._positions, self.count, self.pages = positions, count, pages
        self._set_storage(storage)

    def _empty(self, capacity: int) -> Tensor:
        cache = self.cache
        size = (self.layers, 2, 1, cache.kv_heads, capacity, cache.head_dim)
        return torch.empty(size, dtype=cache.dtype, device=cache.device)

    def _set_storage(self, storage: Tensor) -> None:
        self.storage, self.rows = storage, list(storage.unbind())


class KeyView:
    """The keys that some tokens see: a whole span, and some rows of others, those of tokens that exited before.

    positions: (n,) int64, of the keys; ascending within each span.
    """

    def __init__(self, span: KeySpan, others: Sequence[tuple[KeySpan, np.ndarray]] = ()):
        self.span = span
        others = [(other, rows) for other, rows in others if len(rows)]
        self.positions = span.positions
        if others:
            more = (other.positions[rows] for other, rows in others)
            self.positions = np.concatenate([span.positions, *more])
        device = span.cache.device
        self.others = [(other, torch.from_numpy(rows).to(device)) for other, rows in others]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (1, h_kv, n, d_h) twice; not copied if it is one span."""
        keys, values = self.span.view(layer)
        if not self.others:
            return keys, values
        more = [[x.index_select(2, rows) for x in other.view(layer)] for other, rows in self.others]
        return torch.cat([keys, *(k for k, _ in more)], 2), torch.cat([values, *(v for _, v in more)], 2)
