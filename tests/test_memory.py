"""Files that are small on disk and large in memory are refused in words before they fill it."""

from __future__ import annotations

import gzip
import os
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from reason import memory
from reason.datasets.config import InteractionsConfig
from reason.datasets.tables import TableFile, read_interactions, read_items
from reason.datasets.textconfig import TextConfig
from reason.datasets.textfiles import load
from reason.errors import ConfigError, DataError

COMMAND = "from reason.cli.app import main; main()"


def repeated(name: str, head: bytes, body: bytes, times: int) -> Path:
    """A compressed file whose ``body`` is packed once and repeated."""
    pack = (
        gzip.compress if name.endswith(".gz") else lambda data: pa.Codec("zstd").compress(data, asbytes=True)
    )
    Path(name).write_bytes((pack(head) if head else b"") + pack(body) * times)
    return Path(name)


def rows_bomb(name: str, groups: int) -> Path:
    table = pa.table({n: pa.array([1] * 2_000_000) for n in ("user_id", "item_id")})
    with parquet.ParquetWriter(name, table.schema) as file:
        for _ in range(groups):
            file.write_table(table)
    return Path(name)


def text_bomb(name: str, column: pa.Array) -> Path:
    parquet.write_table(
        pa.table({"text": column, "item_id": list(range(len(column)))}), name, store_schema=False
    )
    return Path(name)


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setenv(memory.LIMIT, "0.05")


class TestBombs:
    @pytest.mark.parametrize("suffix", [".csv.gz", ".csv.zst"])
    def test_compressed_interactions(self, little, suffix):
        file = repeated("b" + suffix, b"user_id,item_id\n", b"1,2\n" * 100_000, 20)
        assert file.stat().st_size < 200_000
        with pytest.raises(DataError, match=r"b\.csv.* takes more than 50\.0 MB of memory") as caught:
            read_interactions(file, InteractionsConfig())
        assert "REASON_MEMORY_GB" in caught.value.hint

    def test_a_line_without_end(self, little):
        file = repeated("b.csv.gz", b"", b"a" * 4_000_000, 20)
        with pytest.raises(DataError, match="takes more than"):
            TableFile(file)

    def test_compressed_documents(self, little):
        for name, body in (("b.jsonl.gz", b'{"text":"a"}\n' * 100_000), ("b.txt.gz", b"a" * 4_000_000)):
            file = repeated(name, b"", body, 20)
            with pytest.raises(DataError, match="takes more than"):
                load(TextConfig(path=str(file)))

    def test_a_footer_of_many_rows(self, little):
        file = rows_bomb("b.parquet", 4)
        with pytest.raises(DataError, match="its footer states 8,000,000 rows") as caught:
            read_interactions(file, InteractionsConfig())
        assert "would take" in caught.value.message

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_dictionary_of_one_long_text(self, little, nested):
        words = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 1_000_000]))
        column = words if not nested else pa.ListArray.from_arrays(list(range(2001)), words)
        file = text_bomb("b.parquet", column)
        with pytest.raises(DataError, match="takes more than"):
            read_items(file)
        with pytest.raises(DataError, match="takes more than"):
            list(TableFile(file).walk(["text"]))

    def test_what_fits_is_read(self, little):
        file = repeated("b.csv.gz", b"user_id,item_id\n", b"1,2\n3,4\n" * 10_000, 2)
        assert len(read_interactions(file, InteractionsConfig()).user) == 40_000

    def test_a_deep_or_an_endless_number(self):
        for line in ("[" * 100_000, '{"user": ' + "1" * 5000 + "}"):
            Path("b.jsonl").write_text(line + "\n")
            with pytest.raises(DataError, match="line 1 is not"):
                TableFile(Path("b.jsonl"))


@pytest.mark.parametrize("kind", ["csv.gz", "parquet"])
def test_under_four_gigabytes_the_command_ends_in_words(kind):
    """With no setting at all: measured against what the process may take."""
    if kind == "parquet":
        file = rows_bomb("b.parquet", 100)
    else:
        file = repeated("b.csv.gz", b"user_id,item_id\n", b"1,2\n" * 1_000_000, 1500)

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (4 * 10**9, 4 * 10**9))

    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "data", "verify", str(file)],
        capture_output=True, text=True, preexec_fn=limit, env=os.environ, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, (done.returncode, done.stderr[-500:])
    assert "half of what is free here is" in done.stderr and "Traceback" not in done.stderr


def test_the_setting(monkeypatch):
    monkeypatch.setenv(memory.LIMIT, "8")
    assert memory.Budget("x").limit == 8 * 10**9
    for wrong in ("much", "0", "nan", "-1", "inf"):
        monkeypatch.setenv(memory.LIMIT, wrong)
        with pytest.raises(ConfigError, match=memory.LIMIT):
            memory.Budget("x")
    monkeypatch.delenv(memory.LIMIT)
    assert 0 < memory.Budget("x").limit < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_sizes_in_words():
    said = [memory.in_words(n) for n in (0, 999, 1000, 93_000, 1.4e9, 5e12, 5e15)]
    assert said == ["0 bytes", "999 bytes", "1.0 kB", "93.0 kB", "1.4 GB", "5.0 TB", "5,000 TB"]


def test_a_large_file_of_experiments(monkeypatch):
    from reason.engine import layers

    Path("mine.yaml").write_text("a: 1\n" * 1_000_000)
    with pytest.raises(ConfigError, match="5,000,000 bytes"):
        layers.read_yaml(Path("mine.yaml"))
