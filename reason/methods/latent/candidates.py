"""Which items may be answered: all of them, or those that are not in the history (``dataset.candidates``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


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
