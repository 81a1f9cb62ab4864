"""The keys of the datasets that offer the views ``text`` and ``problems``. Free of torch, numpy and pyarrow:
``show`` and ``--dry-run`` read it.

Every key can be set as ``dataset.KEY=VALUE``. Corpora and problems are found, and split by documents
(``SplitKeys``); the others are generated, and say how many documents each split has (``GeneratedKeys``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from reason.datasets.config import FIT, NAME, one_of, within, within_fit
from reason.errors import ConfigError
from reason.keys import key

Split = Literal["auto", "hash", "files"]
VALID = "fraction of the documents used for validation, drawn by a hash of their ids"
TEST = "fraction of the documents used for testing, drawn by a hash of their ids"
SPLIT = "files = by train, valid, test in file names; hash = by fraction; auto = files where possible"
COLUMN = "column of the text; empty = found by its usual names (text, content, document, body)"

# --- corpora ------------------------------------------------------------------------------------------


@dataclass
class SplitKeys:
    """Splitting, shared by all that is found."""

    name: str = key("", NAME)
    valid: float = key(0.05, VALID)
    test: float = key(0.05, TEST)
    documents: int = key(0, "maximum number of training documents, drawn by a hash of their ids; 0 = all")
    fit: float = key(0.25, FIT)

    def __post_init__(self):
        within_fit(self)
        for name in ("valid", "test"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(
                    f"dataset.{name}={getattr(self, name)} is no share of the documents.",
                    "Set it above 0 and below 1, such as 0.05.",
                )
        if self.valid + self.test >= 1:
            raise ConfigError(
                f"dataset.valid={self.valid} and dataset.test={self.test} leave nothing to train on.",
                "Their sum must be below 1, such as 0.05 and 0.05.",
            )
        within(self, "documents", 0)


@dataclass
class CorpusKeys(SplitKeys):
    """Splitting and cutting, shared by all corpora."""

    cut: int = key(0, "maximum document length in characters; longer ones are split; 0 = no limit")

    def __post_init__(self):
        super().__post_init__()
        if self.cut:
            within(self, "cut", 100)


@dataclass
class StdlibConfig(CorpusKeys):
    """The language reference and the standard library of the Python that runs."""

    name: str = key("stdlib-text", NAME)
    valid: float = key(0.1, VALID)
    test: float = key(0.1, TEST)


@dataclass
class TextConfig(CorpusKeys):
    """One's own documents: a file each, or a row each of CSV, TSV, JSONL or Parquet, also compressed."""

    name: str = key("text", NAME)
    path: str = key("", "file, or folder that is searched recursively", path=True)
    pattern: str = key("", "glob of files in a folder, such as **/*.md; empty = tables, else text files")
    field: str = key("", COLUMN)
    id: str = key("", "column of document ids; empty = usual names (id, doc_id ...), - = hash of the text")
    split: Split = key("auto", SPLIT)

    def __post_init__(self):
        super().__post_init__()
        one_of(self, "split", get_args(Split))


@dataclass
class HubTextConfig(CorpusKeys):
    """The first rows of a text dataset on the Hugging Face hub, streamed once and kept."""

    name: str = key("hub-text", NAME)
    id: str = key("HuggingFaceFW/fineweb-edu", "id of the dataset on the Hugging Face hub")
    config: str = key("", "its configuration, such as sample-10BT; empty = its default")
    split: str = key("train", "its split to read; the documents are split anew, by fraction")
    revision: str = key("", "branch, tag or commit; empty = the newest at the time of download")
    rows: int = key(20_000, "number of documents to read, from the first on")
    field: str = key("", COLUMN)

    def __post_init__(self):
        super().__post_init__()
        within(self, "rows", 3, 100_000_000)
        if not self.id:
            raise ConfigError("dataset.id is empty.", "Name a dataset of the hub: dataset.id=OWNER/NAME")


@dataclass
class ProblemsConfig(SplitKeys):
    """One's own problems, a row each of CSV, TSV, JSONL or Parquet; GSM8K's and MATH's files as they are."""

    name: str = key("problems", NAME)
    valid: float = key(0.1, VALID)
    test: float = key(0.2, TEST)
    path: str = key("", "file or folder; split by names of files or by fraction", path=True)
    valid_path: str = key("", "file or folder of the validation problems; empty = taken from path", path=True)
    test_path: str = key("", "file or folder of the test problems; empty = taken from path", path=True)
    pattern: str = key("", "glob of files in a folder, such as **/*.jsonl; empty = all tables")
    split: Split = key("auto", SPLIT)
    problem: str = key("", "column of the problem; empty = usual names (problem, question ...)")
    answer: str = key("", "column of the answer; empty = usual names (answer, final_answer ...), - = none")
    solution: str = key(
        "", "column of the worked solution; empty = usual names (solution, rationale ...), - = none"
    )
    level: str = key("", "column of the difficulty; empty = usual names (level, difficulty), - = none")
    id: str = key("", "column of ids; empty = usual names (id, unique_id ...), - = hash of the problem")

    def __post_init__(self):
        super().__post_init__()
        one_of(self, "split", get_args(Split))


# --- generated ----------------------------------------------------------------------------------------

TRAIN_DOCUMENTS = "number of training documents"
HOPS = "longest chain of map lookups that a question asks for; the level of its answer"


@dataclass
class GeneratedKeys:
    """Sizes and seed, shared by all that is generated."""

    name: str = key("", NAME)
    train_documents: int = key(20_000, TRAIN_DOCUMENTS)
    valid_documents: int = key(500, "number of validation documents")
    test_documents: int = key(1000, "number of test documents")
    seed: int = key(0, "seed of the generator")
    fit: float = key(0.25, FIT)

    def __post_init__(self):
        within_fit(self)
        for name in ("train_documents", "valid_documents", "test_documents"):
            within(self, name, 1, 10_000_000)


@dataclass
class ArithmeticConfig(GeneratedKeys):
    """Sums of several steps, modulo a number, solved a line a step; slips are written into training only."""

    name: str = key("arithmetic", NAME)
    modulus: int = key(97, "all results are taken modulo this number")
    least: int = key(4, "operations in the shortest problems")
    most: int = key(8, "operations in the longest problems")
    largest: int = key(9, "largest number in a question; must be below the modulus")
    slip: float = key(0.1, "probability that a step of a training solution has a wrong result")
    stubborn: float = key(
        0.0,
        "share of calculations that training solutions get wrong more often (60 %) than right, always in the same way",
    )
    redo: float = key(1.0, "probability that the next line corrects a wrong step, so the rest is right")

    def __post_init__(self):
        super().__post_init__()
        within(self, "modulus", 3, 10_000)
        within(self, "most", 1, 64)
        within(self, "least", 1, self.most)
        within(self, "largest", 2, self.modulus - 1)
        for name in ("slip", "stubborn", "redo"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"dataset.{name}={getattr(self, name)} is not a probability.", "Set it from 0 to 1."
                )


@dataclass
class GymConfig(GeneratedKeys):
    """Problems of a task of reasoning-gym, which judges the answers too."""

    name: str = key("reasoning-gym", NAME)
    train_documents: int = key(500, TRAIN_DOCUMENTS)
    valid_documents: int = key(200, "number of validation documents")
    test_documents: int = key(200, "number of test documents")
    task: str = key("chain_sum", "task of reasoning-gym; also written as dataset=reasoning-gym:TASK")
    options: str = key("", "options of the task, such as min_terms=2,max_terms=4; empty = its own defaults")


@dataclass
class HopConfig(GeneratedKeys):
    """A map over symbols, then questions that follow it p times."""

    name: str = key("p-hop", NAME)
    symbols: int = key(16, "number of symbols in the map")
    hops: int = key(4, HOPS)
    queries: int = key(4, "questions per document")

    def __post_init__(self):
        super().__post_init__()
        _room(self, "queries")


@dataclass
class ChainsConfig(GeneratedKeys):
    """Interleaved chains of assignments, modulo a number, then a question for the end of each."""

    name: str = key("chains", NAME)
    depth: int = key(5, "most assignments in a chain; the length of a chain is the level of its answer")
    chains: int = key(4, "chains per document, with one question about each")
    modulus: int = key(10, "numbers range from 0 to modulus - 1")

    def __post_init__(self):
        super().__post_init__()
        within(self, "depth", 1, 64)
        within(self, "chains", 1, 64)
        within(self, "modulus", 2, 1000)


@dataclass
class ListOpsConfig(GeneratedKeys):
    """Nested MAX, MIN, MED and SUM of digits (after Nangia and Bowman, arXiv 1804.06028)."""

    name: str = key("listops", NAME)
    depth: int = key(4, "deepest nesting; the nesting of an expression is the level of its answer")
    arguments: int = key(4, "most arguments of an operation")
    expressions: int = key(4, "expressions per document")
    modulus: int = key(10, "digits range from 0 to modulus - 1, and SUM is taken modulo this number")

    def __post_init__(self):
        super().__post_init__()
        within(self, "depth", 1, 12)
        within(self, "arguments", 2, 8)
        within(self, "expressions", 1, 64)
        within(self, "modulus", 3, 100)


@dataclass
class MixedStreamConfig(GeneratedKeys):
    """A stream that is predictable at sight, with questions of p-hop strewn in."""

    name: str = key("mixed-stream", NAME)
    train_documents: int = key(10_000, TRAIN_DOCUMENTS)
    symbols: int = key(24, "number of symbols in the map at the beginning of a document")
    hops: int = key(4, HOPS)
    length: int = key(200, "tokens in the stream after the map")
    share: float = key(0.2, "fraction of these tokens that belong to questions and answers")
    filler: int = key(16, "number of words in the predictable part; each follows from the two before it")

    def __post_init__(self):
        super().__post_init__()
        within(self, "length", 10, 100_000)
        within(self, "filler", 2, 64)
        if not 0 < self.share <= 0.5:
            raise ConfigError(
                f"dataset.share={self.share} is out of range.", "Set it above 0 and up to 0.5, such as 0.2."
            )
        _room(self, "length and share")

    @property
    def queries(self) -> int:
        """Questions in a document: five tokens each, at least one."""
        return max(1, round(self.share * self.length / 5))


def _room(keys: HopConfig | MixedStreamConfig, what: str) -> None:
    """Refuse more questions than the map has room for: none may be answered from an earlier answer."""
    within(keys, "hops", 1, 64)
    within(keys, "symbols", max(3, 2 * keys.hops), 512)  # else it is shorter the other way round
    queries = keys.queries
    most = 1 + (keys.symbols - 1) // (keys.hops - 1) if keys.hops > 1 else 10_000
    if not 1 <= queries <= most:
        raise ConfigError(
            f"dataset.{what}: {queries} questions of up to {keys.hops} hops do not fit a map of "
            f"{keys.symbols} symbols, where none may be answered from an earlier answer.",
            f"Ask 1 to {most}, or set dataset.symbols to {(queries - 1) * (keys.hops - 1) + 1} or more, "
            "or dataset.hops lower.",
        )
