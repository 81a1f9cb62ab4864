"""The keys of the interaction datasets. Free of torch, numpy and pyarrow: ``show`` and ``--dry-run`` read it.

Every key can be set as ``dataset.KEY=VALUE``. The keys of ``InteractionKeys`` decide what counts as
data and how it is split, and mean the same for every source of interactions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from reason.errors import ConfigError, nearest

Split = Literal["leave_one_out", "time"]
Cold = Literal["auto", "keep", "drop"]
Candidates = Literal["all", "unseen"]


def path_field() -> Any:
    """A key that says where something lies: it stays out of hashes, the digest speaks for the content."""
    return field(default="", metadata={"path": True})


@dataclass
class InteractionKeys:
    """Cleaning and splitting, shared by all interaction datasets."""

    name: str = ""
    split: Split = "leave_one_out"  # leave_one_out: last = test, last but one = validation; time: by date
    valid_quantile: float = (
        0.8  # time split: share of interactions before validation (ReaRec: of Yelp's span)
    )
    test_quantile: float = 0.9  # time split: share of interactions before the test (ReaRec: of Yelp's span)
    valid_from: float = 0.0  # time split: start of validation, in the file's unit of time; 0 = by quantile
    test_from: float = 0.0  # time split: start of the test, in the file's unit of time; 0 = by quantile
    min_user: int = 0  # interactions; iterative k-core over users and items together, 0 = off
    min_item: int = 0  # interactions; iterative k-core over users and items together, 0 = off
    min_rating: float = 0.0  # rating; lower ones are dropped before anything else, 0 = keep all
    min_history: int = 1  # interactions before the target that a validation or test case needs at least
    cold: Cold = "auto"  # items that training never saw; auto = keep for leave_one_out, drop for time
    candidates: Candidates = "all"  # ranked when judging: all items, or those unseen in the history (S3-Rec)
    stride: int = 0  # interactions between training windows; 0 = window length, each transition once
    tie_seed: int = 0  # seed of the order among a user's interactions with equal time

    def __post_init__(self):
        for key, known in (("split", Split), ("cold", Cold), ("candidates", Candidates)):
            one_of(self, key, get_args(known))
        for key, least in {
            "min_user": 0,
            "min_item": 0,
            "min_history": 1,
            "stride": 0,
            "tie_seed": 0,
        }.items():
            within(self, key, least)
        if not 0 < self.valid_quantile < self.test_quantile < 1:
            raise ConfigError(
                f"dataset.valid_quantile={self.valid_quantile} and test_quantile={self.test_quantile}.",
                "They must be 0 < valid_quantile < test_quantile < 1, such as 0.8 and 0.9.",
            )


def within(keys: Any, key: str, least: int, most: int = 2**53) -> None:
    """Refuse a key outside of its bounds."""
    value = getattr(keys, key)
    if not least <= value <= most:
        bounds = f"{least} to {most:,}" if most < 2**53 else f"{least} or more"
        raise ConfigError(f"dataset.{key}={value} is out of range.", f"Set it to {bounds}.")


def one_of(keys: Any, key: str, choices: tuple[str, ...]) -> None:
    """Refuse a key that is none of ``choices``, naming the nearest."""
    value = getattr(keys, key)
    if value not in choices:
        close = nearest(value, choices)
        hint = f"Did you mean {close!r}? " if close else ""
        raise ConfigError(
            f"dataset.{key}={value} is not one of the choices.", f"{hint}Choices: {', '.join(choices)}."
        )


@dataclass
class MovieLens100KConfig(InteractionKeys):
    """MovieLens 100K: 943 users, 1,682 films, 100,000 ratings with times."""

    name: str = "movielens-100k"
    path: str = (
        path_field()
    )  # folder with ml-100k.inter and .item, or u.data and u.item; "" = cache, else fetch


@dataclass
class InteractionsConfig(InteractionKeys):
    """One's own interactions, a row each: CSV, TSV, JSONL or Parquet, also compressed (.gz, .zst)."""

    name: str = "interactions"
    path: str = path_field()  # file, or folder that holds sequences.csv(.gz), ratings.csv, *.inter ...
    user: str = ""  # column; "" = found by its usual names (user_id, userId, user ...)
    item: str = ""  # column; "" = found by its usual names (item_id, movieId, asin ...)
    time: str = ""  # column, numbers or dates; "" = found (timestamp, time ...), "-" = there is none
    position: str = ""  # column, rank inside a user; "" = found, "-" = there is none; used where no time is
    rating: str = ""  # column, numbers; "" = found (rating, stars ...), "-" = there is none
    items: str = path_field()  # table of items; "" = items.csv (or .item ...) beside the file, "-" = none
    text: str = ""  # columns of that table, title first, by comma; "" = title,year,genres,keywords ...


@dataclass
class SyntheticConfig(InteractionKeys):
    """Generated interactions: users whose interests drift over categories. Nothing is fetched."""

    name: str = "synthetic-interactions"
    users: int = 500  # users
    items: int = 300  # items, spread evenly over the categories
    mean_length: int = 20  # interactions per user on average, at least 3 each
    categories: int = 12  # categories, 2 to 24
    seed: int = 0  # seed of the generator

    def __post_init__(self):
        super().__post_init__()
        within(self, "users", 2, 10_000_000)
        within(self, "mean_length", 3, 10_000)
        within(self, "categories", 2, 24)
        within(self, "items", 2 * self.categories, 10_000_000)
