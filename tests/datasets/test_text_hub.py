"""Rows of the hub: what is kept of them, and what is said where they could not be fetched."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from reason.datasets.fetch import RECEIPT
from reason.datasets.hubtext import ROWS, documents, kept, load
from reason.datasets.textconfig import HubTextConfig
from reason.errors import ConfigError, DataError, MissingExtra

spec = importlib.util.find_spec("datasets")
installed = spec is not None and spec.origin is not None  # the folder of these tests has that name too
TEXTS = [f"text {i}" for i in range(100)]


def keep(config: HubTextConfig, count: int = 100) -> None:
    """A folder of the cache as fetching leaves it."""
    folder = kept(config)
    folder.mkdir(parents=True)
    columns = {"id": [f"u{i}" for i in range(count)], "text": TEXTS[:count]}
    parquet.write_table(pa.table(columns), folder / ROWS)
    (folder / RECEIPT).write_text(json.dumps({"commit": "c0ffee"}))


def test_what_is_in_the_cache_needs_neither_network_nor_library():
    config = HubTextConfig(id="owner/name", rows=100, valid=0.2, test=0.2)
    keep(config)
    data = load(config, offline=True)
    assert sorted(t for part in data.text().parts.values() for t in part.text) == sorted(TEXTS)
    assert data.info["commit"] == "c0ffee" and data.notes == ["owner/name at commit c0ffee."]
    assert kept(HubTextConfig(id="owner/name", rows=100, documents=5)) == kept(config)  # the same rows
    other = [
        {"id": "owner/other"},
        {"rows": 99},
        {"split": "test"},
        {"config": "x"},
        {"revision": "v1"},
        {"field": "t"},
    ]
    folders = {kept(HubTextConfig(**{"id": "owner/name", "rows": 100, **keys})) for keys in other}
    assert len(folders | {kept(config)}) == 7
    (kept(config) / ROWS).write_bytes(b"nonsense")
    with pytest.raises(DataError, match="is damaged"):
        load(config)


def test_fewer_rows_than_asked_for_are_said():
    config = HubTextConfig(id="owner/name", rows=500, valid=0.2, test=0.2)
    keep(config)
    assert "holds 100 rows, fewer than dataset.rows=500" in load(config).notes[1]


def test_offline_and_without_the_library(tmp_path):
    with pytest.raises(DataError, match="--offline forbids") as caught:
        load(HubTextConfig(), offline=True)
    assert "with a network" in caught.value.hint
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="exists on this machine") as caught:
        load(HubTextConfig(id="mine"))
    assert "dataset=text dataset.path=mine" in caught.value.hint


@pytest.mark.skipif(installed, reason="the library datasets is installed")
def test_the_missing_library_is_an_extra():
    with pytest.raises(MissingExtra, match="library datasets") as caught:
        load(HubTextConfig())
    assert caught.value.exit_code == 4 and "reason-lab[hub]" in caught.value.hint
    done = subprocess.run(
        [sys.executable, "-c", "from reason.cli.app import main; main()", "data", "verify", "hub-text"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4 and "reason-lab[hub]" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not installed, reason="needs the extra hub")
def test_a_hub_that_does_not_answer():
    code = (
        "from reason.datasets.hubtext import load; from reason.datasets.textconfig import HubTextConfig\n"
        "try: load(HubTextConfig())\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environ = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.stdout.startswith("DataError HuggingFaceFW/fineweb-edu could not be fetched"), done.stderr


def test_rows_to_documents():
    rows = [{"doc_id": f"u{i}", "content": text, "score": 0.5} for i, text in enumerate(TEXTS)]
    found = documents(iter(rows), "", "o/n")
    assert found.id == [row["doc_id"] for row in rows] and found.text == TEXTS
    assert documents(rows, "doc_id", "o/n").text == found.id
    again = documents([*rows, {**rows[0], "content": None}], "", "o/n")  # an id twice
    assert len(set(again.id)) == 101 and again.id[0] != "u0" and again.text[-1] == ""


def test_rows_that_are_no_text():
    with pytest.raises(DataError, match="o/n holds no rows"):
        documents([], "", "o/n")
    with pytest.raises(DataError, match="no column that looks like text") as caught:
        documents([{"contents": "x"}], "", "o/n")
    assert "'contents'" in caught.value.hint
    with pytest.raises(DataError, match="no column 'texts'") as caught:
        documents([{"text": "x"}], "texts", "o/n")
    assert "dataset.field=text" in caught.value.hint
    with pytest.raises(DataError, match=r"row 2: text is .*, not text"):
        documents([{"text": "x"}, {"text": ["y"]}], "", "o/n")


@pytest.mark.skipif(not installed, reason="needs the extra hub")
def test_a_stream_of_the_library():
    datasets = importlib.import_module("datasets")
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS))
    assert documents(stream.take(7), "", "memory").text == TEXTS[:7]


def test_keys_out_of_bounds():
    with pytest.raises(ConfigError, match=r"dataset\.rows=2"):
        HubTextConfig(rows=2)
    with pytest.raises(ConfigError, match=r"dataset\.id is empty"):
        HubTextConfig(id="")
