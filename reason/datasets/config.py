"""The keys of the interaction datasets. Free of torch, numpy and pyarrow: ``show`` and ``--dry-run`` read it.

Every key can be set as ``dataset.KEY=VALUE``. The keys of ``InteractionKeys`` decide what counts as
data and how it is split, and mean the same for every source of interactions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from reason.errors import ConfigError, nearest
from reason.keys import key

Split = Literal["leave_one_out", "time"]
Cold = Literal["auto", "keep", "drop"]
Candidates = Literal["all", "unseen"]


NAME = "name of the dataset"


FIT = (
    "fraction of the validation examples held out for what is fitted after training (thresholds, temperatures); "
    "the others choose epochs and depths"
)


def within_fit(keys: Any) -> None:
    """Refuse a fraction that leaves one of the two uses without examples."""
    if not 0 < keys.fit < 1:
        raise ConfigError(
            f"dataset.fit={keys.fit} is no fraction of the validation examples.",
            "Set it above 0 and below 1, such as 0.25.",
        )


@dataclass
class InteractionKeys:
    """Cleaning and splitting, shared by all interaction datasets."""

    name: str = key("", NAME)
    split: Split = key(
        "leave_one_out",
        "leave_one_out = each user's last item is the test target and the one before it the validation target; "
        "time = split by date",
    )
    valid_quantile: float = key(
        0.8, "time split: fraction of interactions before the validation period (ReaRec: of Yelp's time span)"
    )
    test_quantile: float = key(
        0.9, "time split: fraction of interactions before the test period (ReaRec: of Yelp's time span)"
    )
    valid_from: float = key(
        0.0, "time split: start of the validation period, in the file's unit of time; 0 = by valid_quantile"
    )
    test_from: float = key(
        0.0, "time split: start of the test period, in the file's unit of time; 0 = by test_quantile"
    )
    min_user: int = key(
        0, "fewest interactions of a user; users and items are filtered until all comply (k-core); 0 = off"
    )
    min_item: int = key(
        0, "fewest interactions of an item; users and items are filtered until all comply (k-core); 0 = off"
    )
    min_rating: float = key(0.0, "interactions rated lower are dropped before anything else; 0 = keep all")
    min_history: int = key(1, "fewest interactions before the target of a validation or test example")
    cold: Cold = key(
        "auto", "targets that never occur in training; auto = keep for leave_one_out, drop for time"
    )
    candidates: Candidates = key(
        "all", "items ranked in evaluation: all, or only those not in the user's history (S3-Rec)"
    )
    stride: int = key(
        0,
        "interactions between the starts of training windows; 0 = their length, so that each transition is trained on once",
    )
    tie_seed: int = key(0, "seed of the order among interactions of a user at the same time")
    fit: float = key(0.25, FIT)

    def __post_init__(self):
        within_fit(self)
        for name, known in (("split", Split), ("cold", Cold), ("candidates", Candidates)):
            one_of(self, name, get_args(known))
        for name, least in {
            "min_user": 0,
            "min_item": 0,
            "min_history": 1,
            "stride": 0,
            "tie_seed": 0,
        }.items():
            within(self, name, least)
        if not 0 < self.valid_quantile < self.test_quantile < 1:
            raise ConfigError(
                f"dataset.valid_quantile={self.valid_quantile} and test_quantile={self.test_quantile}.",
                "They must be 0 < valid_quantile < test_quantile < 1, such as 0.8 and 0.9.",
            )


def within(keys: Any, name: str, least: int, most: int = 2**53) -> None:
    """Refuse a key outside of its bounds."""
    value = getattr(keys, name)
    if not least <= value <= most:
        bounds = f"{least} to {most:,}" if most < 2**53 else f"{least} or more"
        raise ConfigError(f"dataset.{name}={value} is out of range.", f"Set it to {bounds}.")


def one_of(keys: Any, name: str, choices: tuple[str, ...]) -> None:
    """Refuse a key that is none of ``choices``, naming the nearest."""
    value = getattr(keys, name)
    if value not in choices:
        close = nearest(value, choices)
        hint = f"Did you mean {close!r}? " if close else ""
        raise ConfigError(
            f"dataset.{name}={value} is not one of the choices.", f"{hint}Choices: {', '.join(choices)}."
        )


@dataclass
class MovieLens100KConfig(InteractionKeys):
    """MovieLens 100K: 943 users, 1,682 films, 100,000 ratings with times."""

    name: str = key("movielens-100k", NAME)
    path: str = key(
        "",
        "folder with ml-100k.inter and ml-100k.item, or u.data and u.item; empty = from the cache, else downloaded",
        path=True,
    )


@dataclass
class InteractionsConfig(InteractionKeys):
    """One's own interactions, a row each: CSV, TSV, JSONL or Parquet, also compressed (.gz, .zst)."""

    name: str = key("interactions", NAME)
    path: str = key("", "file, or folder that holds sequences.csv(.gz), ratings.csv, *.inter ...", path=True)
    user: str = key("", "column of users; empty = found by its usual names (user_id, userId, user ...)")
    item: str = key("", "column of items; empty = found by its usual names (item_id, movieId, asin ...)")
    time: str = key(
        "",
        "column of times, numbers or dates; empty = found by its usual names (timestamp, time ...), - = none",
    )
    position: str = key(
        "",
        "column of positions within a user's history, used where there is no time; empty = found, - = none",
    )
    rating: str = key(
        "", "column of ratings, numbers; empty = found by its usual names (rating, stars ...), - = none"
    )
    items: str = key(
        "",
        "file that describes the items; empty = items.csv (or .item ...) next to the data, - = none",
        path=True,
    )
    text: str = key(
        "",
        "columns of that file that make an item's text, title first, separated by commas; empty = title, year, genres, keywords ...",
    )


@dataclass
class SyntheticConfig(InteractionKeys):
    """Generated interactions: users whose interests drift over categories. Nothing is fetched."""

    name: str = key("synthetic-interactions", NAME)
    users: int = key(500, "number of users")
    items: int = key(300, "number of items, spread evenly over the categories")
    mean_length: int = key(20, "average number of interactions per user; each has at least 3")
    categories: int = key(12, "number of item categories, 2 to 24")
    seed: int = key(0, "seed of the generator")

    def __post_init__(self):
        super().__post_init__()
        within(self, "users", 2, 10_000_000)
        within(self, "mean_length", 3, 10_000)
        within(self, "categories", 2, 24)
        within(self, "items", 2 * self.categories, 10_000_000)
