"""Own documents: every format leads to the same corpus; every fault is told, with its place and a mend."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from reason.datasets.textconfig import TextConfig
from reason.datasets.textfiles import load
from reason.errors import ConfigError, DataError

TEXTS = [f'Document {i}, with "quotes",\nmore lines and an é.\n' for i in range(60)]
ROWS = [(f"d{i}", text) for i, text in enumerate(TEXTS)]


def write(folder, name, rows, columns=("id", "text")):
    """A table of ``rows`` in the format that ``name`` says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".parquet" in name:
        parquet.write_table(pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), path)
        return path
    if "json" in name:
        text = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    else:
        page = io.StringIO()
        writer = csv.writer(page, delimiter="\t" if ".tsv" in name else ",", lineterminator="\n")
        writer.writerows([columns, *rows])
        text = page.getvalue()
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def loaded(path, **keys):
    return load(TextConfig(path=str(path), **{"valid": 0.2, "test": 0.2, **keys}))


def fault(path, match, **keys):
    with pytest.raises(DataError, match=match) as caught:
        loaded(path, **keys)
    assert caught.value.hint, "every error says what to do"
    return caught.value


def everything(data) -> dict[str, str]:
    return {i: t for part in data.corpus.parts.values() for i, t in zip(part.id, part.text, strict=True)}


# --- tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["d.csv", "d.tsv", "d.csv.gz", "d.jsonl", "d.jsonl.gz", "d.ndjson", "d.parquet"]
)
def test_same_rows_same_digest_in_every_format(tmp_path, name):
    want = loaded(write(tmp_path, "want.jsonl", ROWS))
    found = loaded(write(tmp_path, name, ROWS[::-1]))
    assert found.digest == want.digest and found.info == want.info
    assert everything(found) == dict(ROWS)


def test_rows_without_ids_go_by_their_content(tmp_path):
    bare = [(text,) for text in TEXTS]
    want = loaded(write(tmp_path, "a.jsonl", bare, ["content"]))
    assert loaded(write(tmp_path, "b.csv", bare[::-1], ["body"])).digest == want.digest
    assert loaded(write(tmp_path, "c.jsonl", ROWS), id="-").digest == want.digest
    assert all(len(name) == 16 for name in everything(want))
    sourced = [("web" if i % 2 else "book", text) for i, text in enumerate(TEXTS)]
    found = loaded(write(tmp_path, "d.parquet", sourced, ["source", "text"]))
    assert {name.split("/")[0] for name in everything(found)} == {"web", "book"}


def test_ids_that_do_not_tell_documents_apart(tmp_path):
    rows = [("0", text) for text in TEXTS]
    path = write(tmp_path, "a.jsonl", rows)
    data = loaded(path)
    assert len(everything(data)) == len(TEXTS) and any("by their content" in note for note in data.notes)
    assert (
        "document 2: the id '0' occurs a second time" in fault(path, "occurs a second time", id="id").message
    )
    gaps = write(tmp_path, "b.jsonl", [(f"d{i}" if i else None, t) for i, t in enumerate(TEXTS)])
    assert "document 1: it has no id" in fault(gaps, "no id", id="id").message
    for split in ("train", "valid", "test"):  # ids that begin anew in each file
        write(tmp_path, f"both/{split}.jsonl", [(str(i), f"{split} {t}") for i, t in enumerate(TEXTS)])
    data = loaded(tmp_path / "both")
    assert data.info["valid_documents"] == 60 and any("by their content" in note for note in data.notes)


def test_named_columns_and_the_nearest(tmp_path):
    path = write(tmp_path, "a.csv", ROWS, ["url", "essay"])
    assert everything(loaded(path, field="essay", id="url")) == dict(ROWS)
    error = fault(path, "no column that looks like text")
    assert "dataset.field=COLUMN" in error.hint and "url, essay" in error.hint
    assert "dataset.field=essay" in fault(path, "no column 'esay'", field="esay").hint
    assert "dataset.id=url" in fault(path, "no column 'urls'", field="essay", id="urls").hint
    assert "'texts'" in fault(write(tmp_path, "b.csv", ROWS, ["url", "texts"]), "looks like text").hint


def test_a_document_may_be_longer_than_a_csv_field_usually_is(tmp_path):
    rows = [*ROWS, ("long", "word " * 60_000)]
    assert everything(loaded(write(tmp_path, "a.csv", rows)))["long"] == rows[-1][1]


def test_rows_without_text_are_dropped_and_said(tmp_path):
    path = write(tmp_path, "a.jsonl", [*ROWS, ("none", None), ("blank", "  "), ("again", TEXTS[0])])
    data = loaded(path)
    assert set(everything(data)) == {*dict(ROWS), "again"} - {"d0"}
    assert data.notes == [
        "Documents without text were dropped: 2.",
        "Exact repeats of other documents were dropped: 1.",
    ]


def test_half_of_a_surrogate_pair_is_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(f'{{"text": "{i} cut off \\ud83d"}}\n{{"text": "{i} \\ud83d\\ude00"}}\n' for i in range(40))
    )
    texts = set(everything(loaded(path)).values())
    assert "3 cut off �" in texts and "3 😀" in texts


def test_broken_tables(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{oops\n')
    fault(path, r"a\.jsonl, line 2 is not JSON")
    path.write_text('{"text": "a"}\n{"text": 7}\n')
    assert "dataset.field" in fault(path, "line 2: text is '7', not text").hint
    path.write_text("")
    assert "one document per line" in fault(path, "is empty").hint
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    fault(path, "cannot be read.*utf-8")
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,a\n2,b,c\n")
    fault(path, "line 3: 3 fields for 2 columns")
    path.write_text("id,text\n")
    fault(path, "has a header but no rows")
    for name, content in {
        "a.parquet": b"nonsense",
        "a.csv.gz": b"nonsense",
        "cut.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 9000)[:60],
    }.items():
        (tmp_path / name).write_bytes(content)
        fault(tmp_path / name, "cannot be read")
    (tmp_path / "a.json").write_text("[]")
    assert ".jsonl" in fault(tmp_path / "a.json", "single JSON document").hint


# --- files --------------------------------------------------------------------------------------------


def folder_of(tmp_path, names, start=0):
    folder = tmp_path / "folder"
    for i, name in enumerate(names, start):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"Text {i}\n" * 30)
    return folder


def test_a_file_is_a_document(tmp_path):
    folder = folder_of(tmp_path, [f"{'abc'[i % 3]}/page{i:02d}.md" for i in range(60)])
    (folder / ".git").mkdir()
    (folder / ".git" / "x.md").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    data = loaded(folder)
    assert len(everything(data)) == 60 and everything(data)["a/page00.md"] == "Text 0\n" * 30
    assert len(everything(loaded(folder, pattern="a/*.md"))) == 20
    (folder / "a" / "page00.md").write_bytes(
        b"\xef\xbb\xbf" + b"Text 0\r\n" * 30
    )  # BOM and Windows line ends
    assert loaded(folder).digest == data.digest
    (folder / "a" / "page00.md").unlink()
    (folder / "a" / "page00.md.gz").write_bytes(gzip.compress(b"Text 0\n" * 30))
    assert everything(loaded(folder))["a/page00.md.gz"] == "Text 0\n" * 30


def test_one_file_is_one_document(tmp_path):
    path = folder_of(tmp_path, ["play.txt"]) / "play.txt"
    assert "dataset.cut=100" in fault(path, "only one document").hint
    data = loaded(path, cut=100)
    assert "".join(everything(data).values()) == "Text 0\n" * 30


def test_a_readme_beside_a_table_is_no_document(tmp_path):
    folder = folder_of(tmp_path, ["README.md"])
    write(folder, "data.jsonl", ROWS)
    data = loaded(folder)
    assert everything(data) == dict(ROWS) and "README.md" in data.notes[0]


def test_text_that_is_not_utf8_and_empty_files(tmp_path):
    folder = folder_of(tmp_path, [f"{i}.txt" for i in range(60)])
    (folder / "nothing.txt").write_text("")
    assert "without text were dropped: 1" in loaded(folder).notes[0]
    (folder / "latin.txt").write_bytes("Füße".encode("latin-1"))
    error = fault(folder, r"latin\.txt is not UTF-8 text.*byte 1\b")
    assert "iconv" in error.hint and "dataset.pattern" in error.hint
    (folder / "latin.txt").unlink()
    (folder / "broken.txt.gz").write_bytes(b"nonsense")
    fault(folder, "cannot be read")


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(ConfigError, match=r"dataset\.path is not set"):
        load(TextConfig())
    folder = folder_of(tmp_path, ["corpus.txt"])
    assert "corpus.txt" in fault(folder / "corpsu.txt", "no file or folder").hint
    assert "dataset.path" in fault(tmp_path / "no" / "where", "no file or folder").hint
    assert "corpus.txt" in fault(folder, "matches '.*md'", pattern="*.md").hint
    fault(folder, "not a pattern of file names", pattern="/etc/*")
    (tmp_path / "void").mkdir()
    assert "no file" in fault(tmp_path / "void", "holds no text").hint
    (folder / "corpus.txt").rename(folder / "corpus.bin")
    assert "corpus.bin" in fault(folder, "holds no text").hint


# --- splits that names say ----------------------------------------------------------------------------


def test_tables_named_for_their_split(tmp_path):
    write(tmp_path, "english_train.jsonl.gz", ROWS[:40])
    write(tmp_path, "english_validation.jsonl", ROWS[40:50])
    write(tmp_path, "extra.jsonl", [("x", "other")])
    data = loaded(tmp_path)
    assert set(data.corpus.valid.id) == {f"d{i}" for i in range(40, 50)}
    assert 0 < len(data.corpus.test) < 20 and set(data.corpus.test.id) <= {f"d{i}" for i in range(40)}
    assert "extra.jsonl" in data.notes[0] and "No file is named for test" in data.notes[1]
    write(tmp_path, "test-00000-of-00001.parquet", ROWS[50:])
    assert set(loaded(tmp_path).corpus.test.id) == {f"d{i}" for i in range(50, 60)}
    whole = loaded(tmp_path, split="hash")
    assert everything(whole) == {**dict(ROWS), "x": "other"} and not whole.notes
    assert loaded(tmp_path, split="files").digest == loaded(tmp_path).digest


def test_folders_and_text_files_named_for_their_split(tmp_path):
    folder = folder_of(tmp_path, ["train/a.txt", "train/b.py", "dev/c.txt", "test/d.txt"])
    parts = loaded(folder).corpus.parts
    assert {s: p.id for s, p in parts.items()} == {
        "train": ["train/a.txt", "train/b.py"],
        "valid": ["dev/c.txt"],
        "test": ["test/d.txt"],
    }
    flat = folder_of(tmp_path / "flat", ["wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"])
    assert loaded(flat, cut=100).info["train_documents"] == 3


def test_programs_are_not_named_for_a_split(tmp_path):
    folder = folder_of(tmp_path, ["train.py", "test.py", *(f"model{i}.py" for i in range(60))])
    assert len(everything(loaded(folder))) == 62
    fault(folder, "no files are named for training", split="files")
    with pytest.raises(ConfigError, match=r"dataset\.split=file is not one") as caught:
        TextConfig(split="file")  # type: ignore[arg-type]
    assert "'files'" in caught.value.hint
