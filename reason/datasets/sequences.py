"""The view of sequential recommendation: windows to train on, cases to be judged on, as tensors.

Items are 0..N-1 and PAD = N. Sequences are padded on the RIGHT: position equals index, and under
causal attention pads come after every real item, so their content can never reach a real state.
A batch is as wide as its longest sequence, not as ``length``, so short histories cost little.

Training windows are runs of up to ``length + 1`` rows of a user's training part, cut from its end
backwards so that the latest rows stand in a full window. With the default stride, neighbours share
one row and each transition of the training part is a target exactly once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from reason.datasets.catalogue import Catalogue
from reason.datasets.subsets import hold_out
from reason.errors import ConfigError, DataError, nearest

IGNORE = -100  # target where there is none; torch's cross_entropy skips it
POOL = 64  # batches that are sorted by length together in ``order``


class Histories(Protocol):
    """What the view reads of interactions (see ``reason.datasets.histories.Interactions``)."""

    items: np.ndarray  # (M,) item codes, by user, inside a user by time
    offsets: np.ndarray  # (U + 1,) where the rows of each user begin
    train_end: np.ndarray  # (U,) where those that are training end
    valid_rows: np.ndarray  # (V,) rows that are validation targets
    test_rows: np.ndarray  # (C,) rows that are test targets
    user_ids: list[str]
    stride: int  # rows between training windows; 0 = the length of a window
    candidates: str  # who is ranked: "all" items, or the "unseen" ones
    fit: float  # share of the validation cases that is held out for fitting
    info: dict[str, Any]

    @property
    def catalogue(self) -> Catalogue: ...


class _Runs:
    """Examples that are runs of consecutive rows: ``start`` (n,) and ``length`` (n,) of the inputs."""

    def __init__(
        self, data: Histories, num_items: int, start: np.ndarray, length: np.ndarray, user: np.ndarray
    ):
        self.num_items = num_items
        self.start, self.length, self.user = start, length, user  # (n,) int64 each
        self._rows = np.append(data.items, self.num_items).astype(np.int64)  # (M + 1,), ends with PAD

    def __len__(self) -> int:
        return len(self.start)

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """(n,) int64: a permutation whose consecutive runs of ``batch_size`` are of similar length.

        Shuffled, sorted by length inside pools of 64 batches, then batches shuffled. What does not
        fill a batch is drawn first, so that it is as random as the rest, and comes last.
        """
        shuffled = rng.permutation(len(self))
        full = len(self) // batch_size * batch_size
        rest, body = shuffled[full:], shuffled[:full]
        pool = np.arange(full) // (batch_size * POOL)
        body = body[np.lexsort((self.length[body], pool))].reshape(-1, batch_size)
        return np.concatenate([body[rng.permutation(len(body))].ravel(), rest])

    def _gather(self, index: np.ndarray, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Items (n, T) ``shift`` rows on from the inputs, and where they are real."""
        length = self.length[index]
        column = np.arange(length.max(initial=0))
        real = column < length[:, None]  # (n, T)
        row = np.where(real, self.start[index][:, None] + column + shift, len(self._rows) - 1)
        return self._rows[row], real

    def _columns(self, index: np.ndarray, *names: str) -> dict[str, Tensor]:
        return {name: torch.from_numpy(getattr(self, name)[index]) for name in names}


class SequenceWindows(_Runs):
    """Training examples."""

    def batch(self, index: np.ndarray) -> dict[str, Tensor]:
        """Collate the windows at ``index`` (n,).

        Returns items (n, T) int64 padded with N; targets (n, T) int64, the next item at each
        position, -100 on pads; length (n,) int64; user (n,) int64 codes.
        """
        index = np.asarray(index)
        items, real = self._gather(index)
        targets, _ = self._gather(index, shift=1)
        targets[~real] = IGNORE
        found = {"items": torch.from_numpy(items), "targets": torch.from_numpy(targets)}
        return found | self._columns(index, "length", "user")

    def transitions(self) -> tuple[np.ndarray, np.ndarray]:
        """(items, the items that followed them), both (n,) int64: every input and its target."""
        row = np.repeat(self.start, self.length)
        row += np.arange(len(row)) - np.repeat(np.cumsum(self.length) - self.length, self.length)
        return self._rows[row], self._rows[row + 1]


class SequenceCases(_Runs):
    """Validation or test examples: a history and the one item that came next.

    id: (n,) str, the user's id where each user has one case, else "user@history".
    history: (n,) int64, true length of the history before it is cut to the window.
    target: (n,) int64 item codes.
    """

    def __init__(self, data: Histories, num_items: int, rows: np.ndarray, length: int):
        user = np.searchsorted(data.offsets, rows, side="right") - 1
        first = data.offsets[user]
        start = np.maximum(first, rows - length)
        super().__init__(data, num_items, start, rows - start, user)
        self.candidates = data.candidates
        self.history = rows - first
        self.target = self._rows[rows]
        self.id = np.array(data.user_ids, dtype=object)[user]
        if len(np.unique(user)) < len(user):
            self.id = np.array([f"{u}@{h}" for u, h in zip(self.id, self.history, strict=True)], object)
        self._first, self._user_ids = first, data.user_ids

    def batch(self, index: np.ndarray) -> dict[str, Tensor]:
        """Collate the cases at ``index`` (n,).

        Returns items (n, T) int64, the last ``length`` items before the target, padded with N;
        length (n,); target (n,); user (n,) int64 codes.
        """
        index = np.asarray(index)
        items, _ = self._gather(index)
        return {"items": torch.from_numpy(items), **self._columns(index, "length", "target", "user")}

    def take(self, index: np.ndarray) -> SequenceCases:
        """The cases at ``index`` (positions, or a mask (n,) of bool) alone, named as they are here."""
        part = copy.copy(self)
        for column in ("start", "length", "user", "history", "target", "id", "_first"):
            setattr(part, column, getattr(self, column)[index])
        return part

    def excluded(self, index: np.ndarray) -> tuple[Tensor, Tensor] | None:
        """(rows, items), both (k,) int64: what is no candidate for each case; None where all items are.

        ``scores[rows, items] = -inf`` masks them. By ``dataset.candidates``: nothing, or what was seen.
        """
        if self.candidates == "all":
            return None
        rows, items = self.seen(index)
        return torch.from_numpy(rows), torch.from_numpy(items)

    def seen(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rows, items), both (k,) int64: every item in the whole history of each case.

        Items repeat where the history repeats them.
        """
        index = np.asarray(index)
        count = self.history[index]
        rows = np.repeat(np.arange(len(index)), count)
        inside = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
        return rows, self._rows[np.repeat(self._first[index], count) + inside]

    def find(self, name: str) -> int:
        """Index of the case called ``name``, or of the last case of the user called ``name``.

        Raises:
            DataError: there is none (the nearest is given).
        """
        found = np.flatnonzero(self.id == name)
        if not len(found) and name in self._user_ids:
            found = np.flatnonzero(self.user == self._user_ids.index(name))
        if len(found):
            return int(found[-1])
        close = nearest(name, self.id.tolist())
        raise DataError(
            f"There is no case of user {name!r} in this split.",
            f"Did you mean {close!r}?" if close else f"Cases are named such as {self.id[0]!r}.",
        )


@dataclass
class SequenceSplits:
    """What a sequential recommender trains on and is judged by."""

    train: SequenceWindows
    valid: SequenceCases
    fit: SequenceCases
    test: SequenceCases
    catalogue: Catalogue
    length: int  # most items of an input
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def pad(self) -> int:
        """The code that pads sequences: N, the number of items."""
        return len(self.catalogue)

    def find(self, user_id: str) -> int:
        """Index into ``test`` of the (last) case of a user. Raises DataError, with the nearest id."""
        return self.test.find(user_id)


def view(data: Histories, length: int) -> SequenceSplits:
    """Cut ``data`` into windows and cases of at most ``length`` inputs.

    Raises:
        ConfigError: a length below 1, or a stride that would skip transitions.
        DataError: no user has two training interactions, or there are fewer than two validation cases.
    """
    if length < 1:
        raise ConfigError(f"A sequence length of {length} is too small.", "Set it to 1 or more, such as 50.")
    stride = data.stride or length
    if stride > length:
        raise ConfigError(
            f"dataset.stride={stride} is larger than the length {length}, so transitions would be skipped.",
            f"Set it to 0 (= {length}, each transition once) or to 1..{length}.",
        )
    catalogue = data.catalogue
    train = SequenceWindows(data, len(catalogue), *windows(data.offsets[:-1], data.train_end, length, stride))
    if not len(train):
        raise DataError(
            "No user has two training interactions, so there is no transition to learn.",
            "Use dataset.split=leave_one_out, or move the boundaries of the time split.",
        )
    whole = SequenceCases(data, len(catalogue), data.valid_rows, length)
    test = SequenceCases(data, len(catalogue), data.test_rows, length)
    if len(whole) < 2:
        raise DataError(
            f"There {'is one validation case' if len(whole) else 'is no validation case'}, and two are needed: one "
            "chooses epochs, another is for fitting.",
            "Use more data, or move the boundaries of the time split.",
        )
    valid, fit = hold_out(whole, data.fit)
    info = {
        **data.info, "length": length, "windows": len(train), "transitions": int(train.length.sum()),
        "validation": len(valid), "fitting": len(fit),
    }  # fmt: skip
    return SequenceSplits(
        train=train, valid=valid, fit=fit, test=test, catalogue=catalogue, length=length, info=info
    )


def windows(
    start: np.ndarray, end: np.ndarray, length: int, stride: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start row, input length and user of each window over rows ``start[u] : end[u]``.

    Window k of a user spans the rows up to ``end - k * stride``, ``length + 1`` of them at most;
    the last one of a user is the first that reaches its start.
    """
    rows = end - start
    count = np.where(rows < 2, 0, 1 + -(-np.maximum(rows - length - 1, 0) // stride))  # (U,)
    user = np.repeat(np.arange(len(rows)), count)
    k = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    stop = end[user] - k * stride  # (n,) one past the last row
    first = np.maximum(start[user], stop - length - 1)
    return first, stop - first - 1, user
