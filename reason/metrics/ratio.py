"""Metrics as ratios of columns: how a number is read from the rows of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """How a metric is read from the rows of an evaluation.

    The mean of column ``numerator``, or sum(numerator) / sum(denominator) where a
    denominator is named (bits per byte, loss per token).
    """

    numerator: str
    denominator: str = ""
    larger_is_better: bool = True
