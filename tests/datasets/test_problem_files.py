"""Problems from files: GSM8K's and MATH's form, own columns, splits, repeats, and every fault with a mend."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from reason.cli.data import app
from reason.datasets.problemfiles import load
from reason.datasets.textconfig import ProblemsConfig
from reason.engine.config import resolve
from reason.errors import ConfigError, DataError


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def own(n=40, start=0):
    return [
        {"problem": f"{i} + 1 = ?", "answer": i + 1, "id": f"p{i}", "level": i % 3}
        for i in range(start, start + n)
    ]


def loaded(path="", **keys):
    return load(
        ProblemsConfig(
            path=str(path) if path else "", **{k: str(v) if "path" in k else v for k, v in keys.items()}
        )
    )


def everything(data):
    return {p.id: p for part in data.parts.values() for p in part}


def fault(match, *args, **keys):
    with pytest.raises(DataError, match=match) as caught:
        loaded(*args, **keys)
    assert caught.value.hint, "every error says what to do"
    return caught.value


GSM = {
    "question": "Janet sells 9 eggs for $2. What does she earn?",
    "answer": "She makes 9 * 2 = $<<9*2=18>>18.\nThat is 1,018 in all: $<<1000+18=1018>>1,018.\n#### 1,018",
}
MATH = {
    "problem": "What is $2+3$?", "level": "Level 3", "type": "Algebra",
    "solution": r"It is \boxed{4}, no: $\boxed{\frac{10}{2}}.$",
}  # fmt: skip
MATH500 = {
    "problem": "Polar?", "solution": r"So $\boxed{(3, \frac{\pi}{2})}$", "answer": r"\left( 3, \frac{\pi}{2} \right)",
    "subject": "Precalculus", "level": 2, "unique_id": "test/precalculus/807.json",
}  # fmt: skip


def test_files_of_gsm8k(tmp_path):
    data = loaded(test_path=lines(tmp_path / "test.jsonl", [GSM]))
    (p,) = data.parts["test"]
    assert (p.text, p.answer, p.level) == (GSM["question"], "1,018", None)
    assert p.solution == "She makes 9 * 2 = $18.\nThat is 1,018 in all: $1,018.\n#### 1,018"
    assert data.notes == ["Answers are what follows #### in answer (1)."]


def test_files_of_math(tmp_path):
    data = loaded(
        lines(tmp_path / "a.jsonl", [{**MATH, "problem": f"{i}?"} for i in range(40)]),
        test_path=lines(tmp_path / "b.jsonl", [MATH500]),
    )
    p = data.parts["train"][0]
    assert (p.answer, p.level, p.solution) == (r"\frac{10}{2}", 3, MATH["solution"])
    (p,) = data.parts["test"]
    assert (p.id, p.answer, p.level) == (MATH500["unique_id"], MATH500["answer"], 2)
    assert "Answers are what solution ends in (40), the column answer (1)." in data.notes
    assert data.text().test.text == [f"Polar?\n{MATH500['solution']}"]


@pytest.mark.parametrize(
    "row, answer, solution",
    [
        ({"answer": r"\boxed{5}"}, "5", ""), ({"answer": 18.5}, "18.5", ""), ({"answer": None}, None, ""), ({"answer": " "}, None, ""),
        ({"answer": float("nan")}, None, ""), ({"solution": "I give up."}, None, "I give up."), ({}, None, ""),
        ({"answer": "x", "solution": r"\boxed{y}"}, "x", r"\boxed{y}"), ({"answer": "", "solution": "answer 4"}, "4", "answer 4"),
    ],
)  # fmt: skip
def test_where_an_answer_comes_from(tmp_path, row, answer, solution):
    full = {"problem": "?", "answer": None, "solution": None}  # the first line names the columns
    data = loaded(test_path=lines(tmp_path / "a.jsonl", [{**full, **row}]))
    (p,) = data.parts["test"]
    assert (p.answer, p.solution) == (answer, solution)
    assert data.info["without_answer"] == (answer is None)
    assert any("solved and not judged: 1 in test" in note for note in data.notes) == (answer is None)


def test_every_format_and_own_columns(tmp_path):
    rows = own()
    want = loaded(lines(tmp_path / "a.jsonl", rows))
    assert everything(want)["p7"].answer == "8" and everything(want)["p7"].level == 1
    parquet.write_table(pa.table({k: [row[k] for row in rows] for k in rows[0]}), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(reversed(rows))
    for name in ("a.parquet", "a.csv"):
        assert loaded(tmp_path / name).digest == want.digest
    renamed = [{"task": r["problem"], "gold": r["answer"], "key": r["id"], "stars": r["level"]} for r in rows]
    path = lines(tmp_path / "b.jsonl", renamed)
    assert loaded(path, problem="task", answer="gold", id="key", level="stars").digest == want.digest
    assert "dataset.problem=COLUMN" in fault("no column that looks like the problem", path).hint
    assert "dataset.answer=gold" in fault("no column 'golt'", path, problem="task", answer="golt").hint
    unjudged = loaded(tmp_path / "a.jsonl", answer="-")
    assert unjudged.info["without_answer"] == 40
    assert all(len(name) == 16 for name in everything(loaded(tmp_path / "a.jsonl", id="-")))


def test_splits_by_share_by_name_and_by_path(tmp_path):
    data = loaded(lines(tmp_path / "a.jsonl", own(200)), valid=0.2, test=0.3)
    assert 20 < data.info["valid_problems"] < 60 and 40 < data.info["test_problems"] < 80
    for split, start in (("train", 0), ("valid", 100), ("test", 200)):
        lines(tmp_path / f"named/{split}.jsonl", own(30, start))
    data = loaded(tmp_path / "named")
    assert [p.id for p in data.parts["test"]] == sorted(f"p{i}" for i in range(200, 230))
    other = loaded(tmp_path / "named", test_path=lines(tmp_path / "mine.jsonl", own(5, 500)))
    assert {p.id for p in other.parts["test"]} == {f"p{i}" for i in range(500, 505)}
    assert any("named for test were left out" in note for note in other.notes)
    given = loaded(
        tmp_path / "named/train.jsonl",
        valid_path=tmp_path / "named/valid.jsonl",
        test_path=tmp_path / "named/test.jsonl",
    )
    assert given.digest == data.digest and not any("No file is named" in note for note in given.notes)
    limited = loaded(tmp_path / "named", documents=10)
    assert limited.info["train_problems"] == 10 and limited.info["test_problems"] == 30


def test_test_problems_alone(tmp_path):
    splits = loaded(test_path=lines(tmp_path / "aime.jsonl", own(3))).problems()
    assert [len(splits.train), len(splits.valid), len(splits.fit), len(splits.test)] == [0, 0, 0, 3]


def test_a_test_problem_is_not_trained_on(tmp_path):
    """Even where its spaces differ, its id is another, or its answer."""
    train = [*own(30), {"problem": " 0  +\n1 = ?", "answer": 2, "id": "other", "level": 0}]
    data = loaded(lines(tmp_path / "a.jsonl", train), test_path=lines(tmp_path / "b.jsonl", own(1)))
    assert [p.answer for p in data.parts["test"]] == ["1"]
    assert not {"p0", "other"} & {p.id for split in ("train", "valid") for p in data.parts[split]}
    assert "Exact repeats of other problems were dropped: 2." in " ".join(
        data.notes
    ) or "by their content" in " ".join(data.notes)
    assert any("different answers: 1" in note for note in data.notes)
    prints = [{p.fingerprint for p in part} for part in data.parts.values()]
    assert not prints[0] & prints[2] and not prints[1] & prints[2]


def test_faults(tmp_path):
    with pytest.raises(ConfigError, match=r"Neither dataset\.path nor"):
        loaded()
    fault("no file or folder", tmp_path / "nowhere.jsonl")
    (tmp_path / "notes.txt").write_text("What is 1 + 1?")
    assert ".jsonl" in fault("is no table of problems", tmp_path / "notes.txt").hint
    path = lines(tmp_path / "a.jsonl", [{"problem": ["a", "b"], "answer": 1}])
    assert "dataset.problem=COLUMN" in fault(r"a\.jsonl, line 1: problem is .*not text", path).hint
    fault("line 1: answer is 'True', not text", lines(path, [{"problem": "a", "answer": True}]))
    fault("line 2 is not JSON", path.write_text('{"problem": "a"}\n{oops\n') and path)
    fault("holds no text", lines(path, [{"problem": " "}]))
    fault("holds no problem", test_path=path)
    fault("of 1 problems, none falls into the", lines(path, own(1)))
    (tmp_path / "b.csv").write_text("problem,answer\n")
    fault("has a header but no rows", tmp_path / "b.csv")


def test_a_path_is_the_dataset_of_a_method_that_reads_problems(tmp_path):
    path = lines(tmp_path / "a.jsonl", own())
    shown = json.loads(CliRunner().invoke(app, ["verify", "problems", f"path={path}", "--json"]).stdout)
    assert shown["digest"] == loaded(path).digest and shown["train_problems"] > 20
    with pytest.raises(ConfigError, match="needs 'sequences' data; the dataset 'problems' provides"):
        resolve("latent", ["dataset=problems"])
    assert resolve("mor", ["dataset=problems", f"dataset.path={path}"]).flat["dataset.path"] == str(path)
