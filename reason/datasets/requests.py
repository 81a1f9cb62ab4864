"""Requests to a recommender: a history of item ids, or a user of the data; and what is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reason.datasets.catalogue import Catalogue
from reason.errors import DataError

TOP = 10  # items of an answer, unless a request says otherwise
KEYS = ("history", "user", "k", "depth")


@dataclass(frozen=True)
class RecommendationRequest:
    """A request, understood."""

    history: list[int]  # item codes, oldest first; unknown items are left out
    unknown: list[str]  # ids of the history that are not in the catalogue
    k: int  # items wanted
    depth: int | None  # the depth to spend on it; None: the run decides


def read_request(
    request: Any, catalogue: Catalogue, history_of: Callable[[str], Sequence[int]], max_depth: int
) -> RecommendationRequest:
    """Understand ``{"history": [item ids], "k": 10, "depth": n}`` or ``{"user": id, ...}``.

    Args:
        history_of: the item codes of a user of the data, oldest first; asked only where a user is named.
        max_depth: the largest depth that a request may ask for.

    Raises:
        DataError: a request that makes no sense, in words for whoever sent it.
    """
    if not isinstance(request, dict) or ("history" in request) == ("user" in request):
        raise DataError(
            'A request is {"history": [item ids]} or {"user": id}, with "k" for a number of items other than '
            f'{TOP} and "depth" for a depth of its own.'
        )
    if extra := sorted(set(request) - set(KEYS)):
        raise DataError(
            f"Unknown key {extra[0]!r} in the request.", f"Known: {', '.join(map(json.dumps, KEYS))}."
        )
    k = _whole_number("k", request.get("k", min(TOP, len(catalogue))), 1, len(catalogue))
    depth = request.get("depth")
    if depth is not None:
        depth = _whole_number("depth", depth, 0, max_depth)
    if "user" in request:
        return RecommendationRequest(list(history_of(str(request["user"]))), [], k, depth)
    history, unknown = read_history(request["history"], catalogue)
    return RecommendationRequest(history, unknown, k, depth)


def read_history(history: Any, catalogue: Catalogue) -> tuple[list[int], list[str]]:
    """(codes of the known items, ids of the unknown ones), each in the order given, oldest first.

    Raises:
        DataError: not a list of ids.
    """
    if not isinstance(history, list):
        raise DataError(f'"history" must be a list of item ids, oldest first, not {history!r}.')
    for name in history:
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise DataError(f'"history" holds {name!r}; an item id is a text or a whole number.')
    names = [str(name) for name in history]
    known = [catalogue.code[n] for n in names if n in catalogue.code]
    return known, [n for n in names if n not in catalogue.code]


def _whole_number(key: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise DataError(f'"{key}" is {value!r}; it must be a whole number from {low} to {high}.')
    return value
