"""Where examples come from: cards of the datasets that ship, light enough for ``--help``.

The work is elsewhere: ``fetch`` brings files, ``tables`` reads them, ``histories`` cleans and
splits, ``sequences`` is the view that sequential recommenders read.
"""

from __future__ import annotations

from reason.datasets.base import DatasetCard
from reason.datasets.config import InteractionsConfig, MovieLens100KConfig, SyntheticConfig

movielens_100k = DatasetCard(
    name="movielens-100k",
    summary="943 users, 1,682 films with title, year and genres, 100,000 ratings with times",
    views=("sequences",),
    Config=MovieLens100KConfig,
    target="reason.datasets.movielens:load",
    licence="GroupLens research licence: cite; no commercial use or redistribution without permission",
    citation="F. M. Harper and J. A. Konstan. The MovieLens Datasets: History and Context. "
    "ACM TiiS 5(4), 2015. doi:10.1145/2827872",
    sources=("cache", "dataset.path", "wheel recbole==1.2.1 on PyPI", "files.grouplens.org"),
)

interactions = DatasetCard(
    name="interactions",
    summary="your own: one interaction a row, CSV, TSV, JSONL or Parquet (dataset.path=FILE)",
    views=("sequences",),
    Config=InteractionsConfig,
    target="reason.datasets.histories:load",
    licence="yours",
    sources=("dataset.path",),
)

synthetic_interactions = DatasetCard(
    name="synthetic-interactions",
    summary="generated: users whose interests drift over categories; needs nothing",
    views=("sequences",),
    Config=SyntheticConfig,
    target="reason.datasets.synthetic:load",
    licence="none needed: generated",
    sources=("generator",),
)
