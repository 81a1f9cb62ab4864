"""MovieLens 100K (Harper and Konstan 2015), from RecBole's atomic files or GroupLens's own archive.

Both spellings of the data lead to the same rows, texts and digest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reason.datasets import fetch, tables
from reason.datasets.config import InteractionsConfig, MovieLens100KConfig
from reason.datasets.histories import Interactions, build
from reason.datasets.tables import InteractionTable, ItemTable
from reason.errors import DataError

COUNTS = (943, 1682, 100_000)  # users, films, ratings
FLAGS = (  # genres in the order of the flags in u.item
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
    "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western"
)


def load(config: MovieLens100KConfig, offline: bool = False) -> Interactions:
    """MovieLens 100K; brought on first use unless ``offline``.

    Raises:
        DataError: it cannot be had, or the files are not those of MovieLens 100K.
    """
    folder = Path(config.path).expanduser() if config.path else fetch.carrier(config.name, offline=offline)
    rows, films = read(folder)
    found = (len(rows.user_ids), len(rows.item_ids), len(rows.user))
    if found != COUNTS:
        raise DataError(
            "{} holds {:,} users, {:,} films and {:,} ratings;".format(folder, *found)
            + " MovieLens 100K has {:,}, {:,} and {:,}.".format(*COUNTS),
            f"Delete that folder and fetch again: reason data fetch {config.name}"
            if not config.path
            else "For other ratings use dataset=PATH.",
        )
    return build(rows, config, films)


def read(folder: Path) -> tuple[InteractionTable, ItemTable]:
    """The ratings and films in ``folder``, which holds ml-100k.inter and .item, or u.data and u.item."""
    if (folder / "ml-100k.inter").is_file():
        films = tables.read_items(folder / "ml-100k.item")
        columns = {
            "title": films.columns["movie_title"],
            "year": films.columns["release_year"],
            "genres": ["|".join(g.split()) for g in films.columns["class"]],
        }
        ratings = tables.read_interactions(folder / "ml-100k.inter", InteractionsConfig())
        return ratings, ItemTable(films.ids, columns, "title")
    if (folder / "u.data").is_file():
        try:
            return _ratings(folder / "u.data"), _films(folder / "u.item")
        except (ValueError, OSError) as error:
            raise DataError(
                f"{folder} cannot be read: {error}", "Unpack u.data and u.item of ml-100k.zip again."
            ) from error
    raise DataError(
        f"{folder} is not a folder of MovieLens 100K.",
        "It should hold ml-100k.inter and ml-100k.item, or u.data and u.item.",
    )


def _ratings(path: Path) -> InteractionTable:
    """GroupLens's u.data: user, item, rating, time by tabs, no header."""
    user, item, rating, time = np.loadtxt(path, dtype=np.int64, delimiter="\t", unpack=True)
    coded = []
    for ids in (user, item):
        unique, codes = np.unique(ids, return_inverse=True)
        coded.append(tables.canonical(codes, [str(i) for i in unique]))
    (users, user_ids), (items, item_ids) = coded
    return InteractionTable(
        users, items, user_ids, item_ids, time, "time", rating.astype(np.float32), str(path)
    )


def _films(path: Path) -> ItemTable:
    """GroupLens's u.item: id|title (year)|date|video date|address|19 flags, in Latin-1.

    Title and year are what stands before and in the last parentheses, as RecBole cut them; its
    spelling of the one film without a title is taken over, so that both sources have one digest.
    """
    ids, titles, years, genres = [], [], [], []
    for line in path.read_text(encoding="latin-1").splitlines():
        key, name, _, _, _, *flags = line.split("|")
        title, _, year = name.rpartition(" (")
        ids.append(key)
        titles.append(title.strip() if title else "unkonwn")
        years.append(year.rstrip(" )") if title else "unkonwn")
        genres.append("|".join(g for g, flag in zip(FLAGS.split(), flags, strict=True) if flag == "1"))
    return ItemTable(ids, {"title": titles, "year": years, "genres": genres}, "title")
