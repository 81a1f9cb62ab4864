"""Keys and values of many texts at once, for unmodified models of the library transformers.

A text is a row, and the column of a key is its position: rows of different lengths lie side by side without padding
on the left, so positions are true for each row and there are no holes to mask or to close. A row that waits is simply
not longer than it was: what is written behind its end is overwritten before it is ever seen. For the same reason the
row of a text also holds all of its beginnings, and a fork at an earlier token is a copy of the first columns.

Attention reads the first n rows of the storage as they lie. So the rows that are decoded move to the front when a quarter
of those there would be computed for nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from reason.errors import ConfigError, DataError

IDLE = 0.25  # share of computed rows that may be idle
CHECKED = 8  # tokens of a text that a model is tried out with
PAGE = 64  # columns that storage grows by, at least
TOKENS = 2**16  # tokens read in one pass at most, where they are no more than one text
LOGITS = 2**26  # logits held at once, likewise

Ids = Sequence[int]


class State(NamedTuple):
    """Where texts stand after their last tokens."""

    logits: Tensor  # (n, V) float32, of the next token
    hidden: Tensor  # (n, D), what the head reads


class CachedLM(Protocol):
    """A language model whose texts are kept in a cache, each named by the number of its row.

    context: tokens that a text can have.
    """

    @property
    def context(self) -> int: ...

    def open(self, texts: Sequence[Ids]) -> tuple[list[int], State]:
        """New rows for texts of at least one token each.

        Raises:
            DataError: a text that is empty or longer than the context.
        """
        ...

    def step(self, rows: Sequence[int], tokens: Tensor) -> State:
        """Append a token (n,) to each of n different rows."""
        ...

    def read(self, rows: Sequence[int], texts: Sequence[Ids], keep: bool) -> Iterator[State]:
        """For each of n rows the states (m, ...) after each of the m tokens that follow it.

        keep: append them, to rows that are all different; else the rows stay as they are.

        Raises:
            DataError: a text would become longer than the context.
        """
        ...

    def fork(self, rows: Sequence[int], lengths: Sequence[int] | None = None) -> list[int]:
        """Copies, in rows of their own; of the first tokens only, where ``lengths`` are given."""
        ...

    def close(self, rows: Sequence[int]) -> None:
        """Forget rows."""
        ...


class RowCache:
    """``CachedLM`` of a model of transformers.

    Args:
        model: a causal language model whose layers attend to all earlier tokens.
        context: tokens that a text can have; a model with a window over its tokens attends to all of them below that.

    Raises:
        ConfigError: a model that computes something else with a cache of rows than without any.
    """

    def __init__(self, model: Any, context: int):
        self.model, self.context = model, context
        weight = model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        self._plan = _Plan()
        self._layers = [_Layer(self._plan) for _ in range(_depth(model))]
        self._cache = Cache(layers=list(self._layers))
        self._slot: dict[int, int] = {}  # row -> where it lies
        self._row = np.full(0, -1)  # where -> row, -1 = free
        self._length = np.zeros(0, np.int64)  # by place
        self._next, self._columns = 0, 0
        parameters = inspect.signature(model.forward).parameters
        self._name = "cache" if "cache" in parameters else "past_key_values"
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.moved = 0  # rows that were copied or moved
        if context >= CHECKED and not getattr(model, "_rows_checked", False):
            self._check()
            model._rows_checked = True

    def length(self, row: int) -> int:
        """Tokens of a row."""
        return int(self._length[self._slot[row]])

    # --- the protocol -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def open(self, texts: Sequence[Ids]) -> tuple[list[int], State]:
        for text in texts:
            if not 0 < len(text) <= self.context:
                raise DataError(
                    f"A text has {len(text):,} tokens; this model reads from 1 to {self.context:,}.",
                    "Shorten the text, or use a model with a longer context.",
                )
        rows = self._allocate(len(texts), max(map(len, texts), default=0))
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # rows of a pass have similar lengths
        for group in _groups(order, [len(text) - 1 for text in texts], TOKENS):
            if len(texts[group[-1]]) > 1:
                self._append([rows[i] for i in group], [texts[i][:-1] for i in group], True, self._last)
        return rows, self.step(rows, torch.tensor([text[-1] for text in texts], device=self.device))

    @torch.inference_mode()
    def step(self, rows: Sequence[int], tokens: Tensor) -> State:
        slots = self._to_front(rows)
        n = int(slots.max()) + 1
        length = self._length[:n]
        self._reserve(len(self._row), int(length.max()) + 1)
        columns = int(length.max()) + 1
        at = torch.from_numpy(length).to(self.device)
        whole = n == len(slots) and bool((slots == np.arange(n)).all())
        place = None if whole else torch.from_numpy(slots).to(self.device)
        ids = tokens if place is None else tokens.new_zeros(n).index_copy_(0, place, tokens)
        mask = torch.zeros(n, 1, 1, columns, device=self.device, dtype=self.dtype)
        if columns - 1 > length.min():
            seen = torch.arange(columns, device=self.device) <= at[:, None]
            mask.masked_fill_(~seen[:, None, None], torch.finfo(self.dtype).min)
        self._plan.step(n, columns, at)
        positions = at.clamp_max(self.context - 1)  # of idle rows that are full
        logits, hidden = self._forward(ids[:, None], positions[:, None], mask)
        self._length[slots] += 1
        logits, hidden = logits[:, -1], hidden[:, -1]
        return State(logits.float(), hidden) if place is None else State(logits[place].float(), hidden[place])

    def read(self, rows: Sequence[int], texts: Sequence[Ids], keep: bool) -> Iterator[State]:
        vocab = self.model.get_input_embeddings().weight.shape[0]
        for group in _groups(range(len(rows)), list(map(len, texts)), min(TOKENS, LOGITS // vocab)):
            mine = [texts[i] for i in group]
            with torch.inference_mode():
                logits, hidden = self._append([rows[i] for i in group], mine, keep)
            for i, text in enumerate(mine):
                yield State(logits[i, : len(text)].float(), hidden[i, : len(text)])

    @torch.inference_mode()
    def fork(self, rows: Sequence[int], lengths: Sequence[int] | None = None) -> list[int]:
        made = self._allocate(len(rows), 0)
        if not made:
            return made
        source, target = (np.array([self._slot[r] for r in of]) for of in (rows, made))
        self._length[target] = self._length[source] if lengths is None else lengths
        columns = int(self._length[target].max())
        a, b = (torch.from_numpy(slots).to(self.device) for slots in (source, target))
        for layer in self._layers:
            layer.copy(a, b, columns)
        self.moved += len(rows)
        return made

    def close(self, rows: Sequence[int]) -> None:
        for row in rows:
            slot = self._slot.pop(row)
            self._row[slot], self._length[slot] = -1, 0

    def bytes(self) -> int:
        """Allocated for keys and values."""
        return sum(x.nbytes for layer in self._layers for x in layer.storage)

    # --- inside -----------------------------------------------------------------------------------------

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        """Logits and what the head reads, (n, m, ...)."""
        found: list[Tensor] = []
        hook = self._hook(found)
        try:
            out = self.model(
                input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True,
                **{self._name: self._cache}, **more,
            )  # fmt: skip
        finally:
            hook.remove()
        return out.logits, found[0]

    def _hook(self, found: list[Tensor]) -> Any:
        head: nn.Module = self.model.get_output_embeddings()
        return head.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))

    def _append(
        self, rows: Sequence[int], texts: Sequence[Ids], keep: bool, more: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (n, m, V) and states (n, m, D) of the tokens that follow rows; what is behind a text means nothing."""
        slots = np.array([self._slot[row] for row in rows])
        past = self._length[slots]
        counts = np.array([len(text) for text in texts])
        if int((past + counts).max()) > self.context:
            raise DataError(
                f"A text would grow to {int((past + counts).max()):,} tokens; this model reads {self.context:,}."
            )
        m, before = int(counts.max()), int(past.max())
        self._reserve(len(self._row), before + m)
        ids = torch.zeros(len(rows), m, dtype=torch.int64)
        for i, text in enumerate(texts):
            ids[i, : len(text)] = torch.as_tensor(text)
        start = torch.from_numpy(past).to(self.device)
        steps = torch.arange(m, device=self.device)
        columns = start[:, None] + steps  # (n, m)
        seen = (steps[:, None] >= steps)[None]  # (1 or n, m, keys)
        if before:
            old = torch.arange(before, device=self.device) < start[:, None]
            seen = torch.cat([old[:, None].expand(-1, m, -1), seen.expand(len(rows), -1, -1)], 2)
        mask = torch.zeros(seen.shape, device=self.device, dtype=self.dtype)
        mask.masked_fill_(~seen, torch.finfo(self.dtype).min)
        self._plan.read(torch.from_numpy(slots).to(self.device), before, columns if keep else None)
        positions = columns.clamp_max(self.context - 1)  # of what is behind a text
        found = self._forward(ids.to(self.device), positions, mask[:, None], **(more or {}))
        if keep:
            self._length[slots] += counts
        return found

    def _allocate(self, count: int, columns: int) -> list[int]:
        free = np.flatnonzero(self._row < 0)
        if len(free) < count:
            self._reserve(max(len(self._row) + count - len(free), len(self._row) * 3 // 2), columns)
            free = np.flatnonzero(self._row < 0)
        self._reserve(len(self._row), columns)
        made = list(range(self._next, self._next + count))
        self._next += count
        self._row[free[:count]] = made
        self._slot.update(zip(made, free[:count].tolist(), strict=True))
        return made

    def _reserve(self, rows: int, columns: int) -> None:
        """Storage for so many rows and columns at least."""
        if columns > self._columns:
            self._columns = max(columns + PAGE, self._columns * 3 // 2)
        more = rows - len(self._row)
        if more > 0:
            self._row = np.concatenate([self._row, np.full(more, -1)])
            self._length = np.concatenate([self._length, np.zeros(more, np.int64)])
        self._plan.size = (len(self._row), self._columns)
        for layer in self._layers:
            layer.grow()

    def _to_front(self, rows: Sequence[int]) -> np.ndarray:
        """Where rows lie, after those behind have changed places with idle ones, if that pays."""
        slot = self._slot
        slots = np.fromiter((slot[row] for row in rows), np.int64, len(rows))
        n = int(slots.max()) + 1
        if n - len(rows) <= IDLE * n:
            return slots
        behind = slots[slots >= len(rows)]
        idle = np.setdiff1d(np.arange(len(rows)), slots)
        target, source = np.concatenate([idle, behind]), np.concatenate([behind, idle])
        columns = int(self._length[source].max())
        a, b = (torch.from_numpy(x).to(self.device) for x in (source, target))
        for layer in self._layers:
            layer.copy(a, b, columns)
        self._row[target], self._length[target] = self._row[source], self._length[source]
        for at in target.tolist():
            if (row := int(self._row[at])) >= 0:
                slot[row] = at
        self.moved += len(behind)
        return np.fromiter((slot[row] for row in rows), np.int64, len(rows))

    def _check(self) -> None:
        """Refuse a model that is not itself with this cache: another kind of layer, positions or masks of its own."""
        vocab = self.model.get_input_embeddings().weight.shape[0]
        a, b = ([(7 * i + k) % vocab for i in range(n)] for k, n in ((1, CHECKED - 1), (3, 4)))
        name = type(self.model).__name__
        refused = ConfigError(
            f"{name} cannot be decoded with a cache of rows: its layers keep something other than keys and values, or "
            "number positions in their own way.",
            "Use a model whose layers attend to all earlier tokens, such as Llama, Qwen, Mistral or Gemma.",
        )
        try:
            with torch.inference_mode():
                want = [self.model(input_ids=torch.tensor([t], device=self.device)).logits[0] for t in (a, b)]
            rows, _ = self.open([a[:5], b[:3]])
            self.step(rows[:1], torch.tensor(a[5:6], device=self.device))
            (copy,) = self.fork(rows[:1])
            rows[0] = copy
            got = self.step(rows, torch.tensor([a[6], b[3]], device=self.device)).logits
            (row,) = self.fork(rows[:1], [2])
            (again,) = self.read([row], [a[2:]], False)
            self.close(list(self._slot))
        except Exception as error:  # whatever a model of somebody else's making runs into
            raise refused from error
        pairs = [(want[0][-1], got[0]), (want[1][-1], got[1]), (want[0][2:], again.logits)]
        for theirs, ours in pairs:
            theirs = theirs.float()
            near = 1e-3 if self.dtype == torch.float32 else 0.1
            if not (theirs - ours).abs().max() <= near * theirs.std().clamp_min(1e-3):
                raise refused


class _Plan:
    """What the pass at hand does with the cache; the same for all layers."""

    size: tuple[int, int] = (0, 0)  # rows and columns of storage

    def step(self, rows: int, columns: int, at: Tensor) -> None:
        """One token for each of the first rows, written at (n,)."""
        self.rows, self.columns, self.at, self.one = rows, columns, at, True
        self.each = torch.arange(rows, device=at.device)

    def read(self, slots: Tensor, before: int, columns: Tensor | None) -> None:
        """Several tokens for some rows, which have at most so many before; written at columns (n, m), or not."""
        self.slots, self.before, self.to, self.one = slots, before, columns, False


class _Layer(CacheLayerMixin):
    """Keys and values of one layer: (rows, h_kv, columns, d) each."""

    is_sliding = False

    def __init__(self, plan: _Plan):
        super().__init__()
        self.plan = plan
        self.storage: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, columns = self.plan.size
        self.storage = [
            x.new_zeros(rows, x.shape[1], columns, x.shape[3]) for x in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan, new = self.plan, (key_states, value_states)
        keys, values = self.storage
        if plan.one:
            keys[plan.each, :, plan.at] = key_states[:, :, 0]
            values[plan.each, :, plan.at] = value_states[:, :, 0]
            return keys[: plan.rows, :, : plan.columns], values[: plan.rows, :, : plan.columns]
        seen = [
            torch.cat([mine[plan.slots, :, : plan.before], x], 2) if plan.before else x
            for mine, x in zip(self.storage, new, strict=True)
        ]
        if plan.to is not None:
            for mine, x in zip(self.storage, new, strict=True):
                mine[plan.slots[:, None], :, plan.to] = x.transpose(1, 2)
        return seen[0], seen[1]

    def copy(self, source: Tensor, target: Tensor, columns: int) -> None:
        for x in self.storage:
            seen = x.narrow(2, 0, columns)
            seen.index_copy_(0, target, seen.index_select(0, source))

    def grow(self) -> None:
        """To the size of the plan."""
        rows, columns = self.plan.size
        if self.is_initialized and (self.storage[0].shape[0], self.storage[0].shape[2]) != (rows, columns):
            for i, old in enumerate(self.storage):
                self.storage[i] = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
                self.storage[i][: old.shape[0], :, : old.shape[2]] = old

    # What models ask of a cache beside keys and values: masks and positions are given to them, so nothing is counted.

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions


def _depth(model: Any) -> int:
    return model.config.get_text_config(decoder=True).num_hidden_layers


def _groups(order: Sequence[int], sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Cut into groups in which rows times the longest are at most so many, and one row at least."""
    group: list[int] = []
    longest = 0
    for i in order:
        longest = max(longest, sizes[i])
        if group and (len(group) + 1) * longest > most:
            yield group
            group, longest = [], sizes[i]
        group.append(i)
    if group:
        yield group
