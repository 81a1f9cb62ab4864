"""Small files of interactions in every format, and the readable form of what was loaded."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from reason.datasets.config import InteractionsConfig
from reason.datasets.histories import Interactions, load

ROWS = [  # user, item, time
    ("ann", "x", 10), ("ann", "y", 20), ("ann", "z", 30), ("ann", "x", 40),
    ("bob", "y", 15), ("bob", "z", 25), ("bob", "x", 35),
    ("cem", "z", 12), ("cem", "y", 22),
]  # fmt: skip


class Files:
    """Writes rows as files of a folder and loads them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, rows, columns=("user_id", "item_id", "timestamp"), name="ratings.csv") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".csv", ".tsv", ".csv.gz")):
            sep = "\t" if ".tsv" in name else ","
            text = "".join(sep.join(map(str, line)) + "\n" for line in [columns, *rows])
            path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(dict(zip(columns, r, strict=True))) + "\n" for r in rows))
        else:
            parquet.write_table(pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), path)
        return path

    def load(
        self, rows, columns=("user_id", "item_id", "timestamp"), name="ratings.csv", **keys
    ) -> Interactions:
        return load(InteractionsConfig(path=str(self.write(rows, columns, name)), **keys))


def sequences_of(data: Interactions) -> dict[str, list[str]]:
    """User id -> item ids in order: the readable form of a dataset."""
    return {u: [data.item_ids[i] for i in data.history(n)] for n, u in enumerate(data.user_ids)}
