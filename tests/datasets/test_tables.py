"""Reading files: every format leads to the same data; every fault is told with its place."""

from __future__ import annotations

import datetime
import gzip

import pyarrow as pa
import pytest
from interaction_files import ROWS, sequences_of
from pyarrow import parquet

from reason.datasets.config import InteractionsConfig
from reason.datasets.histories import load
from reason.errors import ConfigError, DataError


@pytest.mark.parametrize("name", ["ratings.csv", "ratings.tsv", "ratings.csv.gz", "r.jsonl", "r.parquet"])
def test_same_content_same_digest_in_every_format(files, name):
    want = files.load(ROWS, name="want.csv")
    found = files.load(ROWS, name=name)
    assert found.digest == want.digest
    assert found.info == want.info
    assert sequences_of(found)["ann"] == list("xyzx")


def test_numbers_text_and_dates_mean_the_same(files):
    rows = [(i, 10 * n, t) for n, (u, i, t) in enumerate(ROWS) for i in [["ann", "bob", "cem"].index(u)]]
    want = files.load(rows, name="want.csv")
    assert files.load(rows, name="whole.parquet").digest == want.digest  # ids are integers there
    assert files.load([(u, i, float(t)) for u, i, t in rows], name="float.parquet").digest == want.digest
    assert files.load([(str(u), str(i), str(t)) for u, i, t in rows], name="text.jsonl").digest == want.digest
    zero = datetime.datetime(1970, 1, 1)
    dates = [(u, i, zero + datetime.timedelta(seconds=t)) for u, i, t in rows]
    assert files.load(dates, name="date.parquet").digest == want.digest
    assert files.load([(u, i, t.isoformat(" ")) for u, i, t in dates], name="date.csv").digest == want.digest


def test_recbole_header_and_folder(files):
    files.write(ROWS, ("user_id:token", "item_id:token", "timestamp:float"), "toy.tsv")
    (files.folder / "toy.tsv").rename(files.folder / "toy.inter")
    data = load(InteractionsConfig(path=str(files.folder)))
    assert data.digest == files.load(ROWS, name="elsewhere/ratings.csv").digest


def test_usual_names_position_and_file_order(files):
    byname = [(i, u, t) for u, i, t in ROWS]
    assert (
        files.load(byname, ("movieId", "userId", "Timestamp")).digest == files.load(ROWS, name="a.csv").digest
    )
    ranked = sorted(ROWS)
    order = sequences_of(
        files.load([(u, i) for u, i, _ in sorted(ROWS, key=lambda r: r[2])], ("user", "item"))
    )
    assert order["ann"] == list("xyzx")
    position = files.load([(u, n, i) for n, (u, i, _) in enumerate(sorted(ROWS, key=lambda r: r[2]))],
                          ("user_id", "position", "item_id"))  # fmt: skip
    assert sequences_of(position) == order and position.times is None
    assert position.info["clock"] == "position" and len(ranked) == 9


def test_named_columns_win_and_dash_means_none(files):
    columns = ("who", "what", "when")
    data = files.load(ROWS, columns, user="who", item="what", time="when")
    assert data.info["clock"] == "time"
    assert files.load(ROWS, time="-").info["clock"] == "file"


def test_quoted_fields_blank_lines_bom_and_semicolons(files):
    path = files.write(ROWS)
    text = path.read_text()
    want = load(InteractionsConfig(path=str(path))).digest
    for other in (
        "\ufeff" + text,
        text.replace("\n", "\r\n"),
        text.replace(",", ";"),
        text.replace("ann", '"ann"').replace("bob,y", "\nbob,y"),
    ):
        path.write_text(other, encoding="utf-8", newline="")
        assert load(InteractionsConfig(path=str(path))).digest == want


def fault(files, text, match, name="bad.csv", **keys):
    path = files.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=match) as caught:
        load(InteractionsConfig(path=str(path), **keys))
    assert caught.value.hint, "every error says what to do"
    return caught.value


def test_missing_columns(files):
    head = "userid,itm,timestamp\nu,i,3\n"
    error = fault(files, head, "looks like the item")
    assert "'itm'" in error.hint and "userid, itm, timestamp" in error.hint
    error = fault(files, head, "no column 'itn'", item="itn")
    assert "dataset.item=itm" in error.hint
    fault(files, head, "cannot play two roles", item="userid")
    fault(files, "user_id,item_id,item_id\n1,2,3\n", "several columns named item_id")


def test_text_for_a_number_names_line_and_value(files):
    lines = ["user_id,item_id,timestamp", "a,x,1", "", "a,y,soon", "a,z,3"]
    assert "line 4: timestamp is 'soon'" in str(fault(files, "\n".join(lines), "not a number"))
    many = ["user_id,item_id,timestamp", *(f"u{n % 9},i{n % 7},{n}" for n in range(200_000)), "a,y,1.5.2"]
    assert "line 200002" in str(fault(files, "\n".join(many), "'1.5.2', not a number"))
    rated = "user_id,item_id,timestamp,rating\na,x,1,5\na,y,2,good\n"
    fault(files, rated, "line 3: rating is 'good'")
    fault(files, "user_id,item_id,timestamp\na,x,1\na,y,nan\n", "line 3: timestamp is")


def test_numbers_that_turn_fractional_late(files):
    """The first block looks like whole numbers; a later fraction must not break the reading."""
    rows = [(f"u{n % 50}", f"i{n % 7}", n) for n in range(1000)]
    data = files.load([*rows, ("u1", "i1", 1000.5)])
    assert data.times is not None and data.times.max() == 1000.5


def test_empty_values(files):
    assert "line 3: item_id is empty" in str(
        fault(files, "user_id,item_id,timestamp\na,x,1\na,,2\n", "empty")
    )
    fault(files, "user_id,item_id,timestamp\na,x,1\na,y,\n", "line 3: timestamp is empty")
    fault(files, '{"user":"a","item":"x"}\n{"user":"a"}\n', "line 2: item is empty", "bad.jsonl")


def test_ragged_empty_and_broken_files(files):
    fault(files, "user_id,item_id,timestamp\na,x,1\na,y\n", "line 3: 2 fields for 3 columns")
    fault(files, "", "is empty")
    fault(files, "user_id,item_id,timestamp\n", "no rows")
    fault(files, b"user_id,item_id,timestamp\n\xff\xfe,x,1\n", "UTF-8")
    fault(files, b"not a gzip file", "cannot be read", "bad.csv.gz")
    fault(files, gzip.compress(b"user_id,item_id\n" + b"a,b\n" * 9000)[:60], "cannot be read", "cut.csv.gz")
    fault(files, b"nonsense", "cannot be read", "bad.parquet")
    fault(files, "user_id,item_id\na,b\n", "xlsx is not a known format", "bad.xlsx")


def test_broken_json(files):
    good = '{"user":"a","item":"x"}\n'
    fault(files, good + "{oops\n", "line 2 is not JSON", "bad.jsonl")
    fault(files, "[1]\n", "line 1 is not a JSON object", "bad.jsonl")
    fault(files, good + '{"user":"a","item":7}\n', "line 2: item is 7, but 'x' in line 1", "bad.jsonl")


def test_bad_ids(files):
    columns = {"user_id": [1.5, 2.0], "item_id": ["a", "b"]}
    files.folder.mkdir()
    parquet.write_table(pa.table(columns), files.folder / "r.parquet")
    with pytest.raises(DataError, match="fractions"):
        load(InteractionsConfig(path=str(files.folder / "r.parquet")))
    parquet.write_table(pa.table({**columns, "user_id": [[1], [2]]}), files.folder / "r.parquet")
    with pytest.raises(DataError, match="list"):
        load(InteractionsConfig(path=str(files.folder / "r.parquet")))


def test_two_items_at_one_position(files):
    text = "user_id,position,item_id\na,0,x\nb,0,x\na,0,y\n"
    assert "line 4" in str(fault(files, text, "two interactions at position 0"))


def test_absent_files(files):
    path = files.write(ROWS, name="sequences.csv")
    with pytest.raises(ConfigError, match=r"dataset\.path"):
        load(InteractionsConfig())
    with pytest.raises(DataError) as caught:
        load(InteractionsConfig(path=str(path.with_name("sequence.csv"))))
    assert "Did you mean" in caught.value.hint and "sequences.csv" in caught.value.hint
    path.rename(path.with_name("stuff.csv"))
    with pytest.raises(DataError, match="holds no interactions"):
        load(InteractionsConfig(path=str(files.folder)))


# --- items --------------------------------------------------------------------------------------------

ITEMS = [("x", "Toy Story", 1995, "Animation|Comedy"), ("y", "", "", ""), ("w", "Unused", 2000, "Drama")]
COLUMNS = ("item_id", "title", "year", "genres")


def test_item_text_is_found_beside_the_file(files):
    files.write(ITEMS, COLUMNS, "items.csv")
    data = files.load(ROWS)
    assert data.item_text == ["Toy Story (1995). Genres: Animation, Comedy.", "y", "z"]
    assert data.item_fields["genres"] == ["Animation|Comedy", "", ""]
    assert any("2 of 3 items have no text" in note for note in data.notes)
    assert files.load(ROWS, items="-").item_text == ["x", "y", "z"]
    assert files.load(ROWS, text="genres,title").item_text[0] == "Animation, Comedy. Title: Toy Story."


def test_item_tables_in_other_formats(files):
    lists = [("x", "Toy Story", "1995", ["Animation", "Comedy"]), ("y", "Why", "2001", ["Drama"])]
    files.write(lists, COLUMNS, "films.jsonl")
    data = files.load(ROWS, items=str(files.folder / "films.jsonl"))
    assert data.item_text[:2] == [
        "Toy Story (1995). Genres: Animation, Comedy.",
        "Why (2001). Genres: Drama.",
    ]


def test_faults_of_item_tables(files):
    files.write([*ITEMS, ITEMS[0]], COLUMNS, "items.csv")
    with pytest.raises(DataError, match=r"line 5: the item 'x' is described twice"):
        files.load(ROWS)
    files.write(ITEMS, COLUMNS, "items.csv")
    with pytest.raises(DataError, match="no column 'titel'") as caught:
        files.load(ROWS, text="titel")
    assert "'title'" in caught.value.hint
    with pytest.raises(DataError, match="no item table"):
        files.load(ROWS, items="-", text="title")
    with pytest.raises(DataError, match="no file"):
        files.load(ROWS, items=str(files.folder / "item.csv"))
