"""Where examples come from: cards of the datasets that ship, light enough for ``--help``.

The work is elsewhere. ``fetch`` brings files, ``tables`` reads them. Interactions: ``histories`` cleans and
splits, ``sequences`` is the view that sequential recommenders read, ``catalogue`` holds the items that they answer
with, ``requests`` is what they are asked. Text: ``documents`` cleans and splits what ``stdlib``, ``textfiles`` and
``hubtext`` find; ``arithmetic`` and ``tasks`` generate; ``packing`` is what language models read. Problems:
``problems`` is the view, which ``problemfiles``, ``gym`` and ``arithmetic`` offer. ``subsets`` takes parts of the
examples of each.
"""

from __future__ import annotations

from reason.datasets.base import DatasetCard
from reason.datasets.config import InteractionsConfig, MovieLens100KConfig, SyntheticConfig
from reason.datasets.textconfig import (
    ArithmeticConfig,
    ChainsConfig,
    GymConfig,
    HopConfig,
    HubTextConfig,
    ListOpsConfig,
    MixedStreamConfig,
    ProblemsConfig,
    StdlibConfig,
    TextConfig,
)


def _generated(
    name: str,
    summary: str,
    Config: type,
    module: str = "tasks",
    *,
    views: tuple[str, ...] = ("text",),
    citation: str = "",
) -> DatasetCard:
    target, licence = f"reason.datasets.{module}:load", "none needed: generated"
    return DatasetCard(
        name, f"generated: {summary}", views, Config, target, licence, citation, sources=("generator",)
    )


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

synthetic_interactions = _generated(
    "synthetic-interactions",
    "users whose interests drift over categories; needs nothing",
    SyntheticConfig,
    "synthetic",
    views=("sequences",),
)

stdlib_text = DatasetCard(
    name="stdlib-text",
    summary="7 MB of prose and code: the language reference and the standard library of the running Python",
    views=("text",),
    Config=StdlibConfig,
    target="reason.datasets.stdlib:load",
    licence="Python Software Foundation License",
    citation="The Python standard library and its documentation. python.org",
    sources=("the running Python",),
)

text = DatasetCard(
    name="text",
    summary="your own: files of text, or a document a row of CSV, TSV, JSONL or Parquet (dataset.path=PATH)",
    views=("text",),
    Config=TextConfig,
    target="reason.datasets.textfiles:load",
    licence="yours",
    sources=("dataset.path",),
)

hub_text = DatasetCard(
    name="hub-text",
    summary="the first rows of a text dataset on the Hugging Face hub, such as FineWeb-Edu (extra: hub)",
    views=("text",),
    Config=HubTextConfig,
    target="reason.datasets.hubtext:load",
    licence="the dataset's own: see its page on the hub",
    sources=("cache", "huggingface.co"),
)

arithmetic_problems = _generated(
    "arithmetic",
    "sums of several steps modulo a number, with slips that are mended; needs nothing",
    ArithmeticConfig,
    "arithmetic",
    views=("text", "problems"),
)

own_problems = DatasetCard(
    name="problems",
    summary="your own, or GSM8K and MATH: a problem a row of JSONL, CSV or Parquet (dataset.path=PATH)",
    views=("problems", "text"),
    Config=ProblemsConfig,
    target="reason.datasets.problemfiles:load",
    licence="yours",
    sources=("dataset.path",),
)

reasoning_gym = DatasetCard(
    name="reasoning-gym",
    summary="a task of reasoning-gym, which judges the answers (dataset=reasoning-gym:TASK; extra: gym)",
    views=("problems",),
    Config=GymConfig,
    target="reason.datasets.gym:load",
    licence="Apache-2.0, the library's",
    citation="Z. Stojanovski et al. REASONING GYM: Reasoning Environments for Reinforcement Learning with "
    "Verifiable Rewards. NeurIPS 2025. arXiv:2505.24760",
    sources=("the library reasoning-gym",),
)

p_hop = _generated("p-hop", "follow a map p times; the steps that an answer takes are known", HopConfig)

chains = _generated(
    "chains", "interleaved chains of assignments; the steps that an answer takes are known", ChainsConfig
)

listops = _generated(
    "listops",
    "nested operations on digits; the nesting that an answer depends on is known",
    ListOpsConfig,
    citation="Form after N. Nangia and S. R. Bowman. ListOps. NAACL SRW 2018. arXiv:1804.06028",
)

mixed_stream = _generated(
    "mixed-stream",
    "words predictable at sight, with hard questions strewn in; each one's steps are known",
    MixedStreamConfig,
)
