"""The first rows of a text dataset on the Hugging Face hub, streamed once and kept in the cache.

Needs the extra ``hub`` (the library ``datasets``), until the rows are there: from then on neither it nor a
network is asked for. What was fetched stays what it is when the hub moves on: the commit is written beside
the rows, and said in the notes. No code of the dataset's is ever run.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from reason.datasets.documents import Documents, TextData, build, content_id
from reason.datasets.fetch import RECEIPT, build_once, cache_dir, say
from reason.datasets.tables import choose
from reason.datasets.textconfig import HubTextConfig
from reason.datasets.textfiles import sound
from reason.errors import DataError, MissingExtra, ReasonError
from reason.files import read_json, write_json

VERSION = 1  # of what is kept
ROWS = "documents.parquet"
FETCHED = ("id", "config", "split", "revision", "rows", "field")  # the keys that decide what is kept


def load(config: HubTextConfig, offline: bool = False) -> TextData:
    """The documents, from the cache or from the hub.

    Raises:
        DataError: they are not in the cache and cannot be had: offline, no such dataset, no answer ...
        MissingExtra: the library ``datasets`` is not installed.
    """
    if Path(config.id).exists():
        raise DataError(
            f"{config.id} exists on this machine, and the library datasets would read it instead of the hub.",
            f"Read it as files: dataset=text dataset.path={config.id}. Or start from another folder.",
        )
    folder = kept(config)
    if offline and not (folder / RECEIPT).is_file():
        raise DataError(
            f"{config.id} is not in the cache ({folder}) and --offline forbids fetching it.",
            "Run once with a network and without --offline. Or copy that folder from a machine that has it.",
        )
    build_once(folder, lambda aside: _keep(config, aside), RECEIPT)
    try:
        table, receipt = parquet.read_table(folder / ROWS), read_json(folder / RECEIPT)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is damaged: {error}", "Delete that folder and run again.") from error
    found = Documents(table["id"].to_pylist(), table["text"].to_pylist())
    notes = [f"{config.id} at commit {receipt['commit']}."]
    if len(found) < config.rows:
        notes.append(f"{config.id} holds {len(found):,} rows, fewer than dataset.rows={config.rows:,}.")
    info = {"hub": config.id, "commit": receipt["commit"]}
    return build({"train": found}, config, config.id, info, notes)


def kept(config: HubTextConfig) -> Path:
    """The folder of the cache that holds what ``config`` asks for, or will."""
    asked = [VERSION, *(getattr(config, key) for key in FETCHED)]
    name = config.id.strip("/").replace("/", "--").replace("\\", "--")[-80:]
    return cache_dir() / "hub-text" / f"{name}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}"


def _keep(config: HubTextConfig, folder: Path) -> None:
    """Fetch the documents and their receipt into ``folder``."""
    found, commit = _fetched(config)
    schema = pa.schema([(name, pa.large_string()) for name in ("id", "text")])
    parquet.write_table(pa.table({"id": found.id, "text": found.text}, schema), folder / ROWS)
    write_json(folder / RECEIPT, {**asdict(config), "commit": commit})


def _fetched(config: HubTextConfig) -> tuple[Documents, str]:
    """The documents, and the commit they are of."""
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
    except (ImportError, AttributeError) as error:  # a folder of that name is importable too
        raise MissingExtra("hub-text streams with the library datasets, which is missing.", "hub") from error
    page = f"https://huggingface.co/datasets/{config.id}"
    say(f"Fetching {config.rows:,} rows of {config.id}.\n  Licence and citation: {page}")
    try:
        commit = _commit(config)
        stream: Any = load_dataset(
            config.id, config.config or None, split=config.split, revision=commit, streaming=True
        )
        found = documents(stream.take(config.rows), config.field, config.id)
    except ReasonError:
        raise
    except Exception as error:  # of many libraries below, which share no base class
        said = " ".join(str(error).split())[:400]
        raise DataError(
            f"{config.id} could not be fetched: {type(error).__name__}: {said}",
            "Check dataset.id, config, split and revision, and the network; a gated dataset needs "
            "`hf auth login`. Files of your own: dataset=text dataset.path=PATH",
        ) from error
    say(f"  {len(found):,} rows.")
    return found, commit


def _commit(config: HubTextConfig) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(config.id, revision=config.revision or None).sha)


def documents(rows: Iterable[Mapping[str, Any]], field: str, where: str) -> Documents:
    """Documents of rows by column name; by their column of ids where it tells them apart, else by content.

    Raises:
        DataError: no rows, or no column of text.
    """
    stream = iter(rows)
    first = next(stream, None)
    if first is None:
        raise DataError(f"{where} holds no rows.", "Check dataset.config and dataset.split.")
    names = list(first)
    text_at = choose(names, where, "field", field)
    id_at = choose(names, where, "id", "", required=False)
    ids, texts = [], []
    for number, row in enumerate(itertools.chain([first], stream), 1):
        value = row.get(text_at)
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{where}, row {number}: {text_at} is {str(value)[:40]!r}, not text.",
                f"Name the column of the text: dataset.field=COLUMN. Its columns: {', '.join(names)}.",
            )
        texts.append(sound(value or ""))
        ids.append(sound(str(row.get(id_at) or "")))
    apart = bool(id_at) and "" not in ids and len(set(ids)) == len(ids)
    return Documents(ids if apart else list(map(content_id, texts)), texts)
