"""Outcomes of language models: loss and correctness of every target token, and their sums over documents.

Any model that has logits, or states and a head, is measured the same way: ``token_outcomes`` of each batch of windows
(``datasets.packing.Cases.batch``), ``document_columns`` of those, one row per document, and ``METRICS`` of the rows. Bits
per byte compare models with different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor

from reason.metrics.ratio import Ratio

ROWS = 4096  # targets whose logits are alive at a time

ACCURACY = "next-token accuracy"
METRICS = {
    ACCURACY: Ratio("correct", "targets"),
    "bits per byte": Ratio("bits", "bytes", larger_is_better=False),
    "loss": Ratio("nll", "targets", larger_is_better=False),
}


def metrics(levels: Sequence[int] = ()) -> dict[str, Ratio]:
    """``METRICS``, and the accuracy at each level of difficulty."""
    return METRICS | {f"accuracy at level {n}": Ratio(f"correct_{n}", f"targets_{n}") for n in levels}


@dataclass
class TokenOutcomes:
    """Of the target at each position of B windows of T tokens, on the CPU; 0 where a position has no target."""

    nll: np.ndarray  # (B, T) float64, nats
    correct: np.ndarray  # (B, T) bool, the most probable token was the target

    def select(self, windows: np.ndarray) -> Self:
        """Of these windows."""
        return type(self)(*(getattr(self, f.name)[windows] for f in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Of the windows of all parts, which are equally long."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


@torch.no_grad()
def token_outcomes(states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> TokenOutcomes:
    """Loss and correctness of every target.

    Args:
        states: (B, T, D).
        targets: (B, T) token ids, negative (-100) where there is none.
        head: (n, D) states -> (n, V) logits; called with at most ``ROWS`` rows that have a target.
    """
    hidden, flat = states.flatten(0, 1), targets.flatten()
    where = (flat >= 0).nonzero().flatten()
    nll = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    correct = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    for rows in where.split(ROWS):
        logits, target = head(hidden[rows]).float(), flat[rows]
        nll[rows] = (logits.logsumexp(-1) - logits.gather(1, target[:, None])[:, 0]).double()
        correct[rows] = logits.argmax(-1) == target
    return TokenOutcomes(*(x.view(targets.shape).cpu().numpy() for x in (nll, correct)))


def sum_by_document(values: np.ndarray, case: np.ndarray, documents: int) -> np.ndarray:
    """(documents,) float64: sums of values (B, T) over the windows of each document. case: (B,) document of a window."""
    sums = np.bincount(case, weights=values.sum(1).astype(np.float64), minlength=documents)
    return sums.astype(np.float64)  # without windows, bincount returns integers


def document_columns(
    outcomes: TokenOutcomes, batch: Mapping[str, Tensor], documents: int, levels: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """Columns of one row per document, sums over its targets: nll (nats), correct, targets, bits; for each level L of
    difficulty correct_L and targets_L.

    Args:
        batch: targets and level (B, T), case (B,), as ``Cases.batch`` gives them.
        levels: those that the data has (``Cases.levels``).
    """
    case, level = batch["case"].numpy(), batch["level"].numpy()
    target = (batch["targets"] >= 0).numpy()

    def total(values: np.ndarray) -> np.ndarray:
        return sum_by_document(values, case, documents)

    nll = total(outcomes.nll)
    columns = {"nll": nll, "correct": total(outcomes.correct), "targets": total(target), "bits": bits(nll)}
    for n in levels:
        at_level = target & (level == n)
        columns |= {f"correct_{n}": total(outcomes.correct & at_level), f"targets_{n}": total(at_level)}
    return columns


def bits(nats: np.ndarray) -> np.ndarray:
    return nats / math.log(2)
