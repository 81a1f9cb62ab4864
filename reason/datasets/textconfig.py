"""The keys of the datasets that offer the view ``text``. Free of torch, numpy and pyarrow: ``show`` and
``--dry-run`` read it.

Every key can be set as ``dataset.KEY=VALUE``. Corpora are found, and split by documents (``CorpusKeys``);
the others are generated, and say how many documents each split has (``GeneratedKeys``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from reason.datasets.config import one_of, path_field, within
from reason.errors import ConfigError

Split = Literal["auto", "hash", "files"]

# --- corpora ------------------------------------------------------------------------------------------


@dataclass
class CorpusKeys:
    """Splitting and cutting, shared by all corpora."""

    name: str = ""
    valid: float = 0.05  # share of the documents that validate, drawn by a hash of their ids
    test: float = 0.05  # share of the documents that test, drawn by a hash of their ids
    documents: int = 0  # training documents at most, drawn by a hash of their ids; 0 = all
    cut: int = 0  # characters; longer documents are cut into several, at line ends if it can be; 0 = never

    def __post_init__(self):
        for key in ("valid", "test"):
            if not 0 < getattr(self, key) < 1:
                raise ConfigError(
                    f"dataset.{key}={getattr(self, key)} is no share of the documents.",
                    "Set it above 0 and below 1, such as 0.05.",
                )
        if self.valid + self.test >= 1:
            raise ConfigError(
                f"dataset.valid={self.valid} and dataset.test={self.test} leave nothing to train on.",
                "Their sum must be below 1, such as 0.05 and 0.05.",
            )
        within(self, "documents", 0)
        if self.cut:
            within(self, "cut", 100)


@dataclass
class StdlibConfig(CorpusKeys):
    """The language reference and the standard library of the Python that runs."""

    name: str = "stdlib-text"
    valid: float = 0.1  # share of the documents that validate, drawn by a hash of their ids
    test: float = 0.1  # share of the documents that test, drawn by a hash of their ids


@dataclass
class TextConfig(CorpusKeys):
    """One's own documents: a file each, or a row each of CSV, TSV, JSONL or Parquet, also compressed."""

    name: str = "text"
    path: str = path_field()  # file, or folder that is read at any depth
    pattern: str = ""  # of the files in a folder, such as **/*.md; "" = tables, else files of text
    field: str = ""  # column of the text; "" = found by its usual names (text, content, document, body)
    id: str = ""  # column that names a document; "" = found (id, doc_id ...), "-" = none: by its content
    split: Split = (
        "auto"  # files: by train, valid, test in their names; hash: by share; auto: files if it can
    )

    def __post_init__(self):
        super().__post_init__()
        one_of(self, "split", get_args(Split))


@dataclass
class HubTextConfig(CorpusKeys):
    """The first rows of a text dataset on the Hugging Face hub, streamed once and kept."""

    name: str = "hub-text"
    id: str = "HuggingFaceFW/fineweb-edu"  # of the dataset on the hub
    config: str = ""  # which of its configurations, such as sample-10BT; "" = its own default
    split: str = "train"  # which of its parts the rows come from; they are split anew by share
    revision: str = ""  # branch, tag or commit; "" = the newest when it is fetched
    rows: int = 20_000  # documents to take, from the first on
    field: str = ""  # column of the text; "" = found by its usual names (text, content, document, body)

    def __post_init__(self):
        super().__post_init__()
        within(self, "rows", 3, 100_000_000)
        if not self.id:
            raise ConfigError("dataset.id is empty.", "Name a dataset of the hub: dataset.id=OWNER/NAME")


# --- generated ----------------------------------------------------------------------------------------


@dataclass
class GeneratedKeys:
    """Sizes and seed, shared by all that is generated."""

    name: str = ""
    train_documents: int = 20_000  # documents to train on
    valid_documents: int = 500  # documents that validate
    test_documents: int = 1000  # documents that test
    seed: int = 0  # seed of the generator

    def __post_init__(self):
        for key in ("train_documents", "valid_documents", "test_documents"):
            within(self, key, 1, 10_000_000)


@dataclass
class ArithmeticConfig(GeneratedKeys):
    """Sums of several steps, modulo a number, solved a line a step; slips are written into training only."""

    name: str = "arithmetic"
    modulus: int = 97  # all results are taken modulo this
    least: int = 4  # operations of the shortest problems
    most: int = 8  # operations of the longest problems
    largest: int = 9  # largest number in a question; it must be below the modulus
    slip: float = 0.1  # chance that a step in training has a wrong result
    redo: float = 1.0  # chance that the line after a slip does the step again, so that the rest is right

    def __post_init__(self):
        super().__post_init__()
        within(self, "modulus", 3, 10_000)
        within(self, "most", 1, 64)
        within(self, "least", 1, self.most)
        within(self, "largest", 2, self.modulus - 1)
        for key in ("slip", "redo"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(
                    f"dataset.{key}={getattr(self, key)} is no probability.", "Set it from 0 to 1."
                )


@dataclass
class HopConfig(GeneratedKeys):
    """A map over symbols, then questions that follow it p times."""

    name: str = "p-hop"
    symbols: int = 16  # symbols that the map runs over
    hops: int = 4  # most steps along the map that a question asks for; the level of its answer
    queries: int = 4  # questions in a document

    def __post_init__(self):
        super().__post_init__()
        within(self, "hops", 1, 64)
        within(self, "symbols", max(3, 2 * self.hops), 512)  # else it is shorter the other way round
        _room(self, "queries", self.queries)


@dataclass
class ChainsConfig(GeneratedKeys):
    """Interleaved chains of assignments, modulo a number, then a question for the end of each."""

    name: str = "chains"
    depth: int = 5  # most assignments in a chain; a chain's length is the level of its answer
    chains: int = 4  # chains in a document, each asked for once
    modulus: int = 10  # numbers are 0 to modulus - 1

    def __post_init__(self):
        super().__post_init__()
        within(self, "depth", 1, 64)
        within(self, "chains", 1, 64)
        within(self, "modulus", 2, 1000)


@dataclass
class ListOpsConfig(GeneratedKeys):
    """Nested MAX, MIN, MED and SUM of digits (after Nangia and Bowman, arXiv 1804.06028)."""

    name: str = "listops"
    depth: int = 4  # most nested operations that an answer depends on; the level of the answer
    arguments: int = 4  # most arguments of an operation
    expressions: int = 4  # expressions in a document
    modulus: int = 10  # digits are 0 to modulus - 1; SUM is taken modulo this

    def __post_init__(self):
        super().__post_init__()
        within(self, "depth", 1, 12)
        within(self, "arguments", 2, 8)
        within(self, "expressions", 1, 64)
        within(self, "modulus", 3, 100)


@dataclass
class MixedStreamConfig(GeneratedKeys):
    """A stream that is predictable at sight, with questions of p-hop strewn in."""

    name: str = "mixed-stream"
    train_documents: int = 10_000  # documents to train on
    symbols: int = 24  # symbols that the map at the head runs over
    hops: int = 4  # most steps along the map that a question asks for; the level of its answer
    length: int = 200  # tokens of the stream after the map
    share: float = 0.2  # share of these tokens that questions and answers take
    filler: int = 16  # words of the predictable part; each follows from the two before it

    def __post_init__(self):
        super().__post_init__()
        within(self, "hops", 1, 64)
        within(self, "symbols", max(3, 2 * self.hops), 512)  # else it is shorter the other way round
        within(self, "length", 10, 100_000)
        within(self, "filler", 2, 64)
        if not 0 < self.share <= 0.5:
            raise ConfigError(
                f"dataset.share={self.share} is out of range.", "Set it above 0 and up to 0.5, such as 0.2."
            )
        _room(self, "length and share", self.queries)

    @property
    def queries(self) -> int:
        """Questions in a document: five tokens each, at least one."""
        return max(1, round(self.share * self.length / 5))


def _room(keys: HopConfig | MixedStreamConfig, what: str, queries: int) -> None:
    """Refuse more questions than the map has room for: none may be answered from an earlier answer."""
    most = 1 + (keys.symbols - 1) // (keys.hops - 1) if keys.hops > 1 else 10_000
    if not 1 <= queries <= most:
        raise ConfigError(
            f"dataset.{what}: {queries} questions of up to {keys.hops} hops do not fit a map of "
            f"{keys.symbols} symbols, where none may be answered from an earlier answer.",
            f"Ask 1 to {most}, or set dataset.symbols to {(queries - 1) * (keys.hops - 1) + 1} or more, "
            "or dataset.hops lower.",
        )
