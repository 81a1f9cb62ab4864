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
FIT = "fraction of validation examples held out to fit thresholds etc.; the others choose epochs and depths"


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
        "leave_one_out", "leave_one_out = each user's last two items validate and test; time = split by date"
    )
    valid_quantile: float = key(0.8, "time split: fraction of interactions before the validation period")
    test_quantile: float = key(0.9, "time split: fraction of interactions before the test period")
    valid_from: float = key(0.0, "time split: start of validation in the file's unit; 0 = by valid_quantile")
    test_from: float = key(0.0, "time split: start of the test in the file's unit; 0 = by test_quantile")
    min_user: int = key(0, "fewest interactions of a user (k-core, together with min_item); 0 = off")
    min_item: int = key(0, "fewest interactions of an item (k-core, together with min_user); 0 = off")
    min_rating: float = key(0.0, "interactions rated lower are dropped before anything else; 0 = keep all")
    min_history: int = key(1, "fewest interactions before the target of a validation or test example")
    cold: Cold = key("auto", "targets never seen in training; auto = keep for leave_one_out, drop for time")
    candidates: Candidates = key("all", "items ranked in evaluation: all, or unseen by the user (S3-Rec)")
    stride: int = key(0, "interactions between window starts; 0 = window length (each transition once)")
    tie_seed: int = key(0, "seed of the order among interactions of a user at the same time")
    fit: float = key(0.25, FIT)

    def __post_init__(self):
        within_fit(self)
        for name, known in (("split", Split), ("cold", Cold), ("candidates", Candidates)):
            one_of(self, name, get_args(known))
        for name in ("min_user", "min_item", "min_history", "stride", "tie_seed"):
            within(self, name, int(name == "min_history"))
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
        "", "folder with ml-100k.inter and .item, or u.data and u.item; empty = cache or download", path=True
    )


@dataclass
class InteractionsConfig(InteractionKeys):
    """One's own interactions, a row each: CSV, TSV, JSONL or Parquet, also compressed (.gz, .zst)."""

    name: str = key("interactions", NAME)
    path: str = key("", "file, or folder that holds sequences.csv(.gz), ratings.csv, *.inter ...", path=True)
    user: str = key("", "column of users; empty = found by its usual names (user_id, userId, user ...)")
    item: str = key("", "column of items; empty = found by its usual names (item_id, movieId, asin ...)")
    time: str = key("", "column of times or dates; empty = usual names (timestamp, time ...), - = none")
    position: str = key("", "column of positions in a history, used without times; empty = found, - = none")
    rating: str = key("", "column of ratings (numbers); empty = usual names (rating, stars ...), - = none")
    items: str = key(
        "",
        "file that describes items; empty = items.csv (or .item ...) beside the data, - = none",
        path=True,
    )
    text: str = key("", "columns of item text, by commas, title first; empty = title, year, genres ...")


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
