"""Full-ranking metrics: the place of the one true item among all candidates, and what it is worth.

Nothing is sampled: every item is a rival unless it is excluded by name. This module knows neither
models nor splits; it turns scores into ranks, and ranks into the rows of an evaluation.

The tie rule. ``rank = 1 + (rivals above) + (rivals level) / 2``, the expected place of the target
when level items are shuffled. A scorer that gives every item the same score is therefore placed in
the middle of the catalogue, and no order of ids can win or lose a tie.

A NaN never wins: a rival whose score is NaN counts as above the target, and a target whose score is
NaN comes after everything. So a model that has diverged is judged worst, not best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from torch import Tensor

# The metrics of ``ranking_rows`` and their columns: means over examples, larger is better.
METRICS = {m: m.lower() for m in ("NDCG@10", "NDCG@20", "Recall@5", "Recall@10", "Recall@20", "MRR")}


def target_rank(scores: Tensor, target: Tensor, exclude: Tensor | None = None) -> Tensor:
    """The rank of each target among all candidates; 1 is best, ties count half (see the module).

    Args:
        scores: (n, N) score of every item for every example, any real dtype and device.
        target: (n,) integer column of the true item.
        exclude: (n, N) or (N,) bool, True where an item is no candidate (padding, seen items). The
            target itself stays a candidate whatever the mask says.

    Returns:
        (n,) float32 ranks in steps of one half, on the device of ``scores``; exact up to 2**23 items.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if scores.dim() != 2 or target.shape != scores.shape[:1]:
        raise ValueError(
            "target_rank needs scores (n, N) and target (n,), "
            f"not {tuple(scores.shape)} and {tuple(target.shape)}."
        )
    column = target.long().unsqueeze(1)  # (n, 1)
    own = scores.gather(1, column)  # (n, 1)
    not_above = scores <= own  # (n, N); False for NaN on either side
    below = scores < own
    candidates: int | Tensor = scores.shape[1]
    if exclude is not None:
        if exclude.shape not in (scores.shape, scores.shape[1:]):
            wanted = f"{tuple(scores.shape)} or {tuple(scores.shape[1:])}"
            raise ValueError(f"exclude must be {wanted}, not {tuple(exclude.shape)}.")
        rival = (~exclude.bool()).expand_as(scores).scatter(1, column, True)
        not_above, below = not_above & rival, below & rival
        candidates = rival.sum(1)
    # above = candidates - not_above; level = not_above - below - 1 (itself); rank = 1 + above + level / 2
    return (2 * candidates + 1 - not_above.sum(1) - below.sum(1)).float() / 2


def exclusion_mask(pairs: tuple[Tensor, Tensor] | None, rows: int, num_items: int) -> Tensor | None:
    """(rows, items) that are no candidates -> (rows, N) bool, True at each of them; None stays None."""
    if pairs is None:
        return None
    import torch

    mask = torch.zeros(rows, num_items, dtype=torch.bool)
    mask[pairs] = True
    return mask


def head_items(counts: np.ndarray) -> np.ndarray:
    """(N,) bool: the fifth of the items that occur most in training; ties go to the lower code."""
    head = np.zeros(len(counts), dtype=bool)
    head[np.argsort(-counts, kind="stable")[: -(-len(counts) // 5)]] = True
    return head


def ranking_rows(
    id: np.ndarray, history: np.ndarray, target: np.ndarray, rank: np.ndarray, counts: np.ndarray,
    top: np.ndarray | None = None, **further: np.ndarray,
) -> pa.Table:  # fmt: skip
    """One row per example of an evaluation by full ranking, whatever ranked.

    Columns: id; history; target; target_count (its occurrences in training), target_head (1 where it is
    among the fifth of the items that occur most); rank (ties count half) and what it is worth (see
    ``ranking_columns``). With ``top``: top@10 (the codes answered), popularity@10 (their mean occurrences),
    tail@10 (the share of them outside that fifth). And ``further`` columns (n,), under their own names.

    Args:
        id: (n,) of str. history: (n,) items in the whole history. target: (n,) codes of the true items.
        rank: (n,) see ``target_rank``. counts: (N,) occurrences of each item in training.
        top: (n, k) codes of the best candidates, best first; k is 10, or N where that is less.
    """
    head = head_items(counts)
    columns: dict[str, Any] = {
        "id": pa.array(id.tolist(), pa.string()),
        "history": history,
        "target_count": counts[target],
        "rank": rank,
        **ranking_columns(rank),
        "target": target,
        "target_head": head[target].astype(np.float64),
    }
    if top is not None:
        columns["top@10"] = pa.array(list(top.astype(np.int32)))
        columns["popularity@10"] = counts[top].mean(1)
        columns["tail@10"] = (~head[top]).mean(1)
    return pa.table(columns | further)


def ranking_columns(
    rank: Tensor | np.ndarray | Sequence[float], ks: Sequence[int] = (5, 10, 20)
) -> dict[str, np.ndarray]:
    """What ranks are worth: one float64 column (n,) for each of ``ndcg@k``, ``recall@k`` and ``mrr``.

    With one true item per example (Recall@k is then the hit rate, and the ideal DCG is 1)::

        recall@k = [rank <= k]        ndcg@k = [rank <= k] / log2(rank + 1)        mrr = 1 / rank

    Raises:
        ValueError: a rank below 1 or NaN, or a k below 1.
    """
    if hasattr(rank, "detach"):
        rank = rank.detach().cpu().numpy()  # type: ignore[union-attr]
    places = np.asarray(rank, dtype=np.float64)
    if places.ndim != 1 or not np.all(places >= 1):
        raise ValueError("Ranks must be one axis of numbers of at least 1.")
    if any(k < 1 for k in ks):
        raise ValueError(f"Every k must be at least 1, not {list(ks)}.")
    gain = 1 / np.log2(places + 1)
    columns: dict[str, np.ndarray] = {f"ndcg@{k}": np.where(places <= k, gain, 0.0) for k in ks}
    columns |= {f"recall@{k}": (places <= k).astype(np.float64) for k in ks}
    columns["mrr"] = 1 / places
    return columns


def diversity(top: Sequence[np.ndarray], num_items: int, k: int = 10) -> dict[str, float]:
    """How an evaluation as a whole spreads its answers over the catalogue.

    Args:
        top: n times (k,) codes of the items answered.
    Returns:
        ``coverage@k``: the share of the catalogue that anyone is shown; ``gini@k``: inequality of how
        often items are shown, 0 = all equally often, 1 = one item takes all (Fleder and Hosanagar,
        Management Science 2009).
    """
    shown = np.concatenate([np.asarray(row) for row in top])
    times = np.sort(np.bincount(shown, minlength=num_items)).astype(np.float64)  # ascending
    place = np.arange(1, num_items + 1)
    gini = float(((2 * place - num_items - 1) * times).sum() / (num_items * times.sum()))
    return {f"coverage@{k}": float((times > 0).mean()), f"gini@{k}": gini}
