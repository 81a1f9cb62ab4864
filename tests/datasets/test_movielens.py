"""MovieLens 100K in its two spellings, with rows of our own in place of the data (which is not ours to keep)."""

from __future__ import annotations

import pytest

from reason.datasets import movielens
from reason.datasets.config import MovieLens100KConfig
from reason.errors import DataError

RATINGS = [(1, 10, 5, 100), (1, 2, 3, 200), (1, 3, 4, 300), (2, 3, 2, 150), (2, 10, 4, 160), (2, 2, 1, 170)]
FILMS = [  # id, title and year as RecBole has them, name as GroupLens has it, genres
    (2, "Élan, L'", "1991", "Élan, L' (1991)", ["Drama", "Film-Noir"]),
    (3, "Part III (1995)", "V", "Part III (1995) (V)", ["Animation", "Children's"]),
    (10, "unkonwn", "unkonwn", "unknown", ["unknown"]),
]


@pytest.fixture
def recbole(tmp_path):
    folder = tmp_path / "recbole"
    folder.mkdir()
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "ml-100k.inter").write_text(head + "".join("\t".join(map(str, r)) + "\n" for r in RATINGS))
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    lines += [f"{i}\t{title}\t{year}\t{' '.join(genres)}" for i, title, year, _, genres in FILMS]
    (folder / "ml-100k.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def grouplens(tmp_path):
    folder = tmp_path / "grouplens"
    folder.mkdir()
    (folder / "u.data").write_text("".join("\t".join(map(str, r)) + "\n" for r in reversed(RATINGS)))
    text = ""
    for i, _, _, name, genres in FILMS:
        flags = [str(int(g in genres)) for g in movielens.FLAGS.split()]
        text += "|".join([str(i), name, "01-Jan-1995", "", "http://x", *flags]) + "\n"
    (folder / "u.item").write_text(text, encoding="latin-1")
    return folder


def test_both_spellings_have_one_digest(recbole, grouplens, monkeypatch):
    monkeypatch.setattr(movielens, "COUNTS", (2, 3, 6))
    one = movielens.load(MovieLens100KConfig(path=str(recbole)))
    two = movielens.load(MovieLens100KConfig(path=str(grouplens)))
    assert one.digest == two.digest
    assert one.item_ids == ["2", "3", "10"]  # whole numbers run in their natural order
    assert one.item_text == [
        "Élan, L' (1991). Genres: Drama, Film-Noir.",
        "Part III (1995). Genres: Animation, Children's.",
        "unkonwn. Genres: unknown.",
    ]
    assert one.item_fields["genres"][0] == "Drama|Film-Noir"


def test_other_files_are_refused(recbole, tmp_path):
    with pytest.raises(DataError, match="holds 2 users, 3 films and 6 ratings") as caught:
        movielens.load(MovieLens100KConfig(path=str(recbole)))
    assert "943, 1,682 and 100,000" in caught.value.message
    with pytest.raises(DataError, match="not a folder of MovieLens"):
        movielens.load(MovieLens100KConfig(path=str(tmp_path)))


def test_broken_files_are_refused(recbole, grouplens):
    (recbole / "ml-100k.item").unlink()
    with pytest.raises(DataError, match=r"ml-100k\.item cannot be read"):
        movielens.read(recbole)
    (grouplens / "u.item").write_text("1|half a line")
    with pytest.raises(DataError, match="cannot be read") as caught:
        movielens.read(grouplens)
    assert "ml-100k.zip" in caught.value.hint
