"""Which alternatives are worth having: nothing else is as accurate for less."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(accuracy: Sequence[float], cost: Sequence[float | None]) -> list[bool]:
    """Which points no other point dominates.

    A point is dominated where another is at least as accurate and costs no more, and is strictly
    better in one of the two. Points that are equal in both stand or fall together; a point without
    a cost (a trivial baseline, a run that was not timed) takes no part.

    Args:
        accuracy: larger is better. cost: smaller is better, None = unknown.
    """
    front = [False] * len(accuracy)
    known = [(c, -a, i) for i, (a, c) in enumerate(zip(accuracy, cost, strict=True)) if c is not None]
    best, cost_of_best = float("-inf"), float("nan")
    for c, negative, i in sorted(known):  # from cheap to dear; of equal cost the most accurate first
        front[i] = -negative > best or (-negative == best and c == cost_of_best)
        if -negative > best:
            best, cost_of_best = -negative, c
    return front
