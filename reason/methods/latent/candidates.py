"""The items that may be answered and how they are scored; without the history, or with it (``dataset.candidates``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder


@dataclass(frozen=True)
class Catalogue:
    """The N items as a trained encoder scores them, in both orders of memory."""

    vectors: Tensor  # (N, d)
    columns: Tensor  # (d, N), contiguous: a CPU scores a single request faster by columns than by rows

    @classmethod
    def of(cls, model: SequenceEncoder) -> Catalogue:
        vectors = model.item_vectors()
        return cls(vectors, vectors.T.contiguous())

    def __len__(self) -> int:
        return len(self.vectors)

    def scores(self, state: Tensor) -> Tensor:
        """(A, d) -> (A, N)."""
        return state @ self.columns


def seen(config: Any, cases: Any, index: np.ndarray) -> tuple[Tensor, Tensor] | None:
    """(rows, items) of the cases at ``index`` that are no candidates; None where all items are."""
    if config.dataset.candidates == "all":
        return None
    rows, items = cases.seen(index)
    return torch.from_numpy(rows), torch.from_numpy(items)


def excluded(pairs: tuple[Tensor, Tensor] | None, rows: int, num_items: int) -> Tensor | None:
    """The same as (rows, N) bool, True at each of them."""
    if pairs is None:
        return None
    mask = torch.zeros(rows, num_items, dtype=torch.bool)
    mask[pairs] = True
    return mask
