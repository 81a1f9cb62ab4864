"""The catalogue that a run keeps: saved and loaded whole, refused where it is damaged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from reason.datasets.catalogue import FILE, Catalogue, kept_catalogue
from reason.datasets.config import SyntheticConfig
from reason.datasets.synthetic import load
from reason.errors import DataError


@pytest.fixture
def films() -> Catalogue:
    return Catalogue(
        ["f1", "f2", "f3", "00123"],
        ["Heat (1995).", "f2", "Ran (1985). Genres: War.", "é😀."],
        {
            "title": ["Heat", "", "Ran", "é😀"],
            "genres": ["Crime|War | Crime", "", "War", ""],
            "id": list("abcd"),
        },
        np.array([3, 0, 3, 7]),
    )


def same(a: Catalogue, b: Catalogue) -> bool:
    lists = a.item_ids == b.item_ids and a.item_text == b.item_text and a.item_fields == b.item_fields
    return lists and a.train_counts.tolist() == b.train_counts.tolist()


def test_what_is_saved_is_loaded(films, tmp_path):
    films.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE], "one file, and nothing left beside it"
    found = Catalogue.load(tmp_path)
    assert same(found, films) and found.train_counts.dtype == np.int64 and found.digest == films.digest
    bare = replace(films, item_fields={})
    bare.save(tmp_path)
    assert same(Catalogue.load(tmp_path), bare), "a file that is written over is read again"


def test_the_catalogue_of_a_dataset():
    data = load(SyntheticConfig(users=40, items=30, mean_length=9, categories=3))
    found = data.sequences(5).catalogue
    assert len(found) == len(data.item_ids) and found.item_ids == data.item_ids
    assert (
        found.titles == data.item_fields["title"]
        and found.train_counts.sum() == data.info["train_interactions"]
    )
    assert found.code[data.item_ids[7]] == 7


def test_titles_fall_back_to_the_text(films):
    assert films.titles == ["Heat", "f2", "Ran", "é😀"]
    assert replace(films, item_fields={}).titles == films.item_text


def test_categories(films):
    assert films.categories == [["Crime", "War"], [], ["War"], []]
    assert replace(films, item_fields={"category": ["Sci-Fi films", "", "", ""]}).categories == [["Sci-Fi films"], [], [], []]  # fmt: skip
    assert replace(films, item_fields={"keywords": ["a|b"] * 4}).categories is None
    assert replace(films, item_fields={"genres": [""] * 4}).categories is None


def test_answers_and_popularity(films):
    assert films.most_popular(3) == [3, 0, 2], "ties go to the lower code"
    assert films.listed([3, 0], [1.5, -2]) == [
        {"id": "00123", "title": "é😀", "score": 1.5},
        {"id": "f1", "title": "Heat", "score": -2.0},
    ]


def test_a_run_that_keeps_none_has_that_of_the_data(films, tmp_path):
    other = replace(films, train_counts=np.array([1, 1, 1, 1]))
    assert kept_catalogue(tmp_path, lambda: other) is other
    films.save(tmp_path)
    assert same(kept_catalogue(tmp_path, lambda: pytest.fail("the data was touched")), films)


def test_a_damaged_file_is_refused_in_words(films, tmp_path):
    with pytest.raises(DataError, match=f"holds no {FILE}"):
        Catalogue.load(tmp_path)
    films.save(tmp_path)
    file = tmp_path / FILE
    whole = file.read_bytes()
    for damaged in (b"", b"not arrow at all", whole[: len(whole) // 2], whole[:-20]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read as a catalogue") as caught:
            Catalogue.load(tmp_path)
        assert str(file) in caught.value.message and "Delete" in caught.value.hint


def test_content_that_was_changed_is_refused(films, tmp_path):
    films.save(tmp_path)
    table = feather.read_table(tmp_path / FILE, memory_map=False)
    place = table.column_names.index("train_count")
    for column, says in (([3, 0, 3, 8], "damaged"), ([3, 0, 3, None], "cannot be read")):
        changed = table.set_column(place, "train_count", pa.array(column, pa.int64()))
        feather.write_feather(changed, str(tmp_path / FILE))
        with pytest.raises(DataError, match=says):
            Catalogue.load(tmp_path)
    feather.write_feather(table.replace_schema_metadata(None), str(tmp_path / FILE))
    with pytest.raises(DataError, match="cannot be read"):
        Catalogue.load(tmp_path)
    feather.write_feather(table.drop_columns(["text"]), str(tmp_path / FILE))
    with pytest.raises(DataError, match="cannot be read"):
        Catalogue.load(tmp_path)
