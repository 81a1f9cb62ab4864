"""Interactions made up by a seeded generator: for tests and for a first run that needs nothing.

The world: items belong to categories and stand on a ring inside their category; some are popular.
A user holds one category at a time. At each step the user either goes on to the ring's next item
(half of the time), or picks by popularity inside the category; now and then the interest drifts to a
neighbouring category or jumps anywhere. So the next item is predictable to a degree from the last
one or two, the category from a few more, and popularity alone does poorly.
"""

from __future__ import annotations

import numpy as np

from reason.datasets.config import SyntheticConfig
from reason.datasets.histories import Interactions, build
from reason.datasets.tables import InteractionTable, ItemTable

FOLLOW = 0.5  # chance to go on to the next item of the ring
DRIFT = 0.08  # chance that the interest moves to a neighbouring category before a step
JUMP = 0.02  # chance that it moves anywhere
START = 1_600_000_000  # seconds since 1970 at which the first user may arrive
YEAR = 365 * 24 * 3600  # seconds over which users arrive

CATEGORIES, ADJECTIVES, NOUNS = (
    words.split()
    for words in (
        "Harbor Garden Winter Desert Rocket Castle Jungle Violin Kitchen Detective Pirate Robot "
        "Mountain Circus Library Storm Dragon Market Island Railway Forest Museum Comet Canyon",
        "Quiet Golden Lost Crimson Hidden Broken Distant Silver Hollow Gentle Restless Ancient "
        "Paper Bright Frozen Wandering Secret Painted Endless Tiny",
        "Letters Shadows Promise Stories Map Song Summer Mirror Journey Window Keeper Lesson "
        "Bridge Evening Signal Harvest Riddle Lantern Neighbors Return",
    )
)


def load(config: SyntheticConfig, offline: bool = False) -> Interactions:
    """Generate, clean and split. Nothing is fetched, so ``offline`` is moot."""
    return build(generate(config), config, items(config))


def generate(config: SyntheticConfig) -> InteractionTable:
    """All interactions of the world. Time runs over steps; each step moves all users at once."""
    rng = np.random.default_rng(config.seed)
    users, count, kinds = config.users, config.items, config.categories
    lengths = 3 + rng.poisson(config.mean_length - 3, users)  # (U,)
    size = np.array([len(range(c, count, kinds)) for c in range(kinds)])  # item i is of category i % kinds
    interest = rng.integers(kinds, size=users)
    place = (size[interest] * rng.random(users) ** 2).astype(np.int64)  # index inside the category
    clock = START + rng.integers(YEAR, size=users)
    rows = []
    for step in range(lengths.max()):
        lot = rng.random(users)
        moved = (interest + rng.choice([-1, 1], users)) % kinds
        anywhere = rng.integers(kinds, size=users)
        drifted = np.where(lot < JUMP, anywhere, np.where(lot < JUMP + DRIFT, moved, interest))
        stay = (drifted == interest) & (rng.random(users) < FOLLOW)
        interest = drifted
        picked = (size[interest] * rng.random(users) ** 2).astype(np.int64)  # density falls with the index
        place = np.where(stay, (place + 1) % size[interest], picked)
        clock = clock + 60 + rng.exponential(2 * 24 * 3600, users).astype(np.int64)
        rating = rng.integers(3, 6, users)
        alive = np.flatnonzero(step < lengths)
        rows.append(np.stack([alive, (place * kinds + interest)[alive], clock[alive], rating[alive]]))
    user, item, when, stars = np.concatenate(rows, axis=1)
    seen = np.bincount(item, minlength=count) > 0
    item, rating = (np.cumsum(seen) - 1)[item], stars.astype(np.float32)
    user_ids = [f"u{u:0{len(str(users - 1))}d}" for u in range(users)]
    item_ids = [f"i{i:0{len(str(count - 1))}d}" for i in np.flatnonzero(seen)]
    return InteractionTable(user, item, user_ids, item_ids, when, "time", rating, config.name)


def items(config: SyntheticConfig) -> ItemTable:
    """Titles of an adjective, the category's word and a noun, numbered where words run out."""
    kinds, titles = config.categories, []
    pairs = len(ADJECTIVES) * len(NOUNS)
    for i in range(config.items):
        k = i // kinds
        adjective = ADJECTIVES[k % len(ADJECTIVES)]
        noun = NOUNS[(k + k // len(ADJECTIVES)) % len(NOUNS)]
        number = f" {k // pairs + 1}" if k >= pairs else ""
        titles.append(f"{adjective} {CATEGORIES[i % kinds]} {noun}{number}")
    width, years = len(str(config.items - 1)), [str(1980 + (i * 7) % 45) for i in range(config.items)]
    genres = [CATEGORIES[i % kinds] for i in range(config.items)]
    ids = [f"i{i:0{width}d}" for i in range(config.items)]
    return ItemTable(ids, {"title": titles, "year": years, "genres": genres}, "title")
