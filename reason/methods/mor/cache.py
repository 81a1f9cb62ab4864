"""What the tokens of a sequence leave behind for later ones: keys and values of the steps that each of them took.

Bae et al., arXiv 2507.10524, section 2.3. Their code has no decoding; this is the cache that theirs would need.
A *run* holds the rows of one sequence at one recursion, for all layers of the block. It has a row for each token
that took the recursion and none for the others, lies in one piece, and grows by whole pages, so that memory follows
the tokens and attention reads rows where they lie. (Pages scattered over a pool have to be copied together for every
token and layer. On a CPU that took up to twice as long from some 256 keys on; with fewer it was faster.)

Which rows a token sees at a step is ``Past.seen``; see ``memory`` for the five kinds, which are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reason.errors import RunError, unknown
from reason.methods.mor.memory import KINDS

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions


class OutOfPages(RunError):
    """The cache has no page left. What was asked for did not happen; free a sequence and ask again."""


class MoRCache:
    """The pasts of any number of sequences, and the pages that they share.

    Args:
        model: whose layers the keys are of; says sizes, device and number type.
        kind: what a token sees (``memory.KINDS``); None: what the model is judged with.
        page_size: tokens in a page, which holds their keys and values at one layer.
        limit: pages at most, over all sequences; None: no limit.

    Raises:
        ConfigError: an unknown kind.
    """

    def __init__(
        self, model: MixtureOfRecursions, kind: str | None = None, *, page_size: int = 16, limit: int | None = None
    ):  # fmt: skip
        self.kind = model.config.memory if kind is None else kind
        if self.kind not in KINDS:
            raise unknown("kind of memory", self.kind, KINDS)
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
    def left(self) -> float:
        """Pages that can still be had."""
        return float("inf") if self.limit is None else self.limit - self.used

    def take(self, pages: int) -> None:
        """Take pages, or give them back where the number is negative.

        Raises:
            OutOfPages: fewer are left; none is taken.
        """
        if pages > self.left:
            raise OutOfPages(
                f"The cache is full: {self.used} of {self.limit} pages are taken, and {pages} more are needed.",
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

    def needed(self, depth: Sequence[int] | np.ndarray) -> int:
        """Bytes that tokens of these depths need, were there no pages: 2 + b (mean depth) rows a token, or 2 + b if
        the first step's keys serve all. ``propagate`` adds a row for each token that left early."""
        depth = np.asarray(depth)
        loop = len(depth) if self.kind == "sharing" else int(depth.sum())
        if self.kind == "propagate":
            loop += int((depth < self.recursions).sum())
        return (self.ends * len(depth) + self.block * loop) * self.row_bytes

    def pages(self, depth: Sequence[int] | np.ndarray) -> int:
        """Pages that one sequence takes whose tokens have these depths."""
        depth = np.asarray(depth)
        steps = 1 if self.kind == "sharing" else self.recursions
        rows = [int((depth > step).sum()) for step in range(steps)]
        if self.kind == "propagate":
            rows.append(int((depth < self.recursions).sum()))
        return self.ends * self._ceil(len(depth)) + self.block * sum(map(self._ceil, rows))

    def _ceil(self, rows: int) -> int:
        return -(-rows // self.page_size)


class Past:
    """What one sequence left behind. Made by ``MoRCache.open``.

    length: tokens that entered.
    """

    def __init__(self, cache: MoRCache):
        self.cache, self.length = cache, 0
        self.ends = Run(cache, cache.ends)  # of the first and of the last layer
        kept = {"sharing": 1, "propagate": cache.recursions + 1}.get(cache.kind, cache.recursions)
        self.runs = [
            Run(cache, cache.block) for _ in range(kept)
        ]  # with propagate, at last one of those that left
        self._depth = np.zeros(0, np.int16)

    @property
    def depth(self) -> np.ndarray:
        """(length,) recursions that each token took, so far."""
        return self._depth[: self.length]

    @property
    def pages(self) -> int:
        """Taken of the cache."""
        return sum(run.pages for run in (self.ends, *self.runs))

    def count(self, step: int) -> int:
        """Rows kept of ``step`` (from 0): tokens that took it; with sharing, none after the first."""
        return self.runs[step].count if step < len(self.runs) else 0

    # --- growing: lengths first, then a layer at a time -----------------------------------------------------

    def begin(self, tokens: int) -> None:
        """Make room for more tokens. They have depth 0 until they ``enter`` a step.

        Raises:
            OutOfPages: and nothing happened.
        """
        n = self.length + tokens
        self.ends.extend(range(self.length, n))
        if n > len(self._depth):
            grown = np.zeros(max(n, 2 * len(self._depth), 64), np.int16)
            grown[: self.length] = self.depth
            self._depth = grown
        self._depth[self.length : n] = 0
        self.length = n

    def enter(self, step: int, at: Sequence[int] | np.ndarray) -> None:
        """The tokens at positions ``at`` (ascending) take ``step``. Their rows are written by the block's layers.

        Raises:
            OutOfPages: and nothing happened.
        """
        if self.writes(step):
            self.runs[step].extend(at)
        self._depth[at] = step + 1

    def leave(self, at: Sequence[int] | np.ndarray) -> Run | None:
        """The tokens at ``at`` leave before the last recursion. With propagate, the run that takes the keys made from
        the states they leave with.

        Raises:
            OutOfPages: and nothing happened.
        """
        if self.cache.kind != "propagate":
            return None
        self.runs[-1].extend(at)
        return self.runs[-1]

    def writes(self, step: int) -> bool:
        return step == 0 or self.cache.kind != "sharing"

    # --- looking ------------------------------------------------------------------------------------------

    def seen(self, step: int) -> Seen:
        """What is seen at ``step`` by those that have just entered it."""
        kind, run = self.cache.kind, self.runs[0 if self.cache.kind == "sharing" else step]
        if kind in ("recursion", "sharing") or step == 0:
            return Seen(run)
        if kind == "deepest":
            return Seen(run, [(self.runs[r], self._rows(self.runs[r], r + 1, r + 1)) for r in range(step)])
        other = self.runs[0 if kind == "hybrid" else -1]
        return Seen(run, [(other, self._rows(other, 0, step))])

    def _rows(self, run: Run, least: int, most: int) -> np.ndarray:
        """Rows of a run whose tokens have such depths by now."""
        depth = self._depth[run.at]
        return np.flatnonzero((depth >= least) & (depth <= most))

    def view(self, step: int, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values seen at a step and layer of the block: twice (h_kv, n, d_h)."""
        keys, values = self.seen(step).layer(layer)
        return keys[0], values[0]

    # --- going back ---------------------------------------------------------------------------------------

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on, as if they had never come."""
        for run in (self.ends, *self.runs):
            run.truncate(length)
        self.length = min(self.length, length)

    def fork(self) -> Past:
        """A copy that goes its own way.

        Raises:
            OutOfPages: and there is no copy.
        """
        other = Past(self.cache)
        self.cache.take(self.pages)
        for mine, theirs in zip((self.ends, *self.runs), (other.ends, *other.runs), strict=True):
            mine.copy_to(theirs)
        other.length, other._depth = self.length, self._depth.copy()
        return other

    def free(self) -> None:
        """Give all pages back."""
        self.truncate(0)


class Run:
    """Keys and values of some tokens of one sequence, at some layers, in the order in which they came.

    at: (count,) int64, their positions in the text.
    rows: of each layer, (2, 1, h_kv, capacity, d_h): keys and values, each a batch of one, as attention wants it.
    """

    def __init__(self, cache: MoRCache, layers: int):
        self.cache, self.layers, self.count, self.pages = cache, layers, 0, 0
        self._at = np.zeros(0, np.int64)
        self._hold(self._blank(0))

    @property
    def at(self) -> np.ndarray:
        return self._at[: self.count]

    def extend(self, at: Sequence[int] | range | np.ndarray) -> None:
        """Rows for tokens at these positions; they hold nothing before they are written."""
        count = self.count + len(at)
        if count > len(self._at):
            self._move(np.arange(self.count), count)
        self._at[self.count : count] = at
        self.count = count

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """The last rows, as many as there are in key and value (m, h_kv, d_h)."""
        last = slice(self.count - len(key), self.count)
        for row, x in zip(self.rows[layer], (key, value), strict=True):
            row[0, :, last] = x.transpose(0, 1)

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """(1, h_kv, count, d_h) twice, where they lie."""
        keys, values = self.rows[layer].narrow(3, 0, self.count).unbind()
        return keys, values

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on."""
        keep = np.flatnonzero(self.at < length)
        count = len(keep)
        if count == self.count:
            return
        in_front = count == 0 or keep[-1] == count - 1
        if in_front and len(self._at) - count < self.cache.page_size:
            self.count = count
        else:
            self._move(keep, count)

    def copy_to(self, other: Run) -> None:
        """Into a run that is empty, whose pages are taken already."""
        other._at, other.count, other.pages = self._at.copy(), self.count, self.pages
        other._hold(self.storage.clone())

    def _move(self, keep: np.ndarray, count: int) -> None:
        """The rows ``keep`` into storage of as many whole pages as ``count`` rows need."""
        cache, kept = self.cache, len(keep)
        capacity = -(-count // cache.page_size) * cache.page_size
        pages = capacity // cache.page_size * self.layers
        cache.take(pages - self.pages)
        at, storage = np.zeros(capacity, np.int64), self._blank(capacity)
        at[:kept] = self._at[keep]
        rows = slice(kept) if kept == self.count else torch.from_numpy(keep).to(cache.device)
        storage[..., :kept, :] = self.storage[..., rows, :]
        self._at, self.count, self.pages = at, kept, pages
        self._hold(storage)

    def _blank(self, capacity: int) -> Tensor:
        cache = self.cache
        size = (self.layers, 2, 1, cache.kv_heads, capacity, cache.head_dim)
        return torch.empty(size, dtype=cache.dtype, device=cache.device)

    def _hold(self, storage: Tensor) -> None:
        self.storage, self.rows = storage, list(storage.unbind())


class Seen:
    """A whole run, and some rows of others: those of tokens that left before.

    at: (n,) int64, the positions of the keys; ascending within each run.
    """

    def __init__(self, run: Run, others: Sequence[tuple[Run, np.ndarray]] = ()):
        self.run = run
        others = [(other, rows) for other, rows in others if len(rows)]
        self.at = np.concatenate([run.at, *(other.at[rows] for other, rows in others)]) if others else run.at
        device = run.cache.device
        self.others = [(other, torch.from_numpy(rows).to(device)) for other, rows in others]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (1, h_kv, n, d_h) twice; where they lie if it is one run."""
        keys, values = self.run.view(layer)
        if not self.others:
            return keys, values
        more = [[x.index_select(2, rows) for x in other.view(layer)] for other, rows in self.others]
        return torch.cat([keys, *(k for k, _ in more)], 2), torch.cat([values, *(v for _, v in more)], 2)
