"""Tasks of reasoning-gym: what is asked for is had, judged by the task; without the library, and with faults, told."""

from __future__ import annotations

import sys

import pytest

from reason.answers import stated
from reason.datasets.gym import load
from reason.datasets.textconfig import GymConfig
from reason.engine.config import resolve
from reason.errors import ConfigError, DataError, MissingExtra
from reason.metrics.grading import grade
from reason.registry import parted

SMALL = {"train_documents": 6, "valid_documents": 8, "test_documents": 5}


def test_without_the_library(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtra, match="reasoning-gym") as caught:
        load(GymConfig())
    assert caught.value.exit_code == 4 and "reason-lab[gym]" in caught.value.hint


def test_a_task_is_part_of_the_name_of_the_dataset():
    assert parted("datasets", "reasoning-gym:chain_sum") == ("reasoning-gym", "chain_sum")
    assert parted("datasets", "C:/data") == ("C:/data", "") and parted("datasets", "text") == ("text", "")
    with pytest.raises(ConfigError, match=r"'reasoning-gym' provides problems"):
        resolve("mor", ["dataset=reasoning-gym:sudoku"])


@pytest.fixture
def gym():
    return pytest.importorskip("reasoning_gym", reason="needs the extra: gym")


def test_problems_of_a_task_and_its_judge(gym):
    data = load(GymConfig(**SMALL, options="min_terms=2, max_terms=2"))
    assert data.name == "reasoning-gym:chain_sum" and data.info["task"] == "chain_sum"
    splits = data.problems()
    assert [len(splits.train), len(splits.valid) + len(splits.fit), len(splits.test)] == [6, 8, 5]
    for p in splits.test:
        assert p.score and p.answer and p.score(p.answer) and not p.score("") and not p.score("x" + p.answer)
        left, right = p.text.split(":")[1].split("=")[0].split("+") if "+" in p.text else (p.answer, "0")
        assert int(p.answer) == int(left) + int(right)
    assert data.digest == load(GymConfig(**SMALL, options="min_terms=2;max_terms=2")).digest
    assert data.digest != load(GymConfig(**SMALL, options="min_terms=2,max_terms=2", seed=1)).digest
    more = load(GymConfig(**{**SMALL, "train_documents": 9}, options="min_terms=2 max_terms=2"))
    assert [p.text for p in more.parts["test"]] == [p.text for p in data.parts["test"]]


def test_a_task_without_one_right_answer_is_judged_all_the_same(gym):
    (p, *_) = load(GymConfig(task="graph_color", **SMALL)).parts["test"]
    assert p.answer is None and p.judged and p.score and not p.score("nonsense")


def test_solutions_where_the_task_has_them(gym):
    data = load(GymConfig(task="gsm_symbolic", **SMALL))
    assert all(grade(stated(p.solution), p.answer) for p in data.parts["train"])


@pytest.mark.parametrize(
    "keys, match, hint",
    [
        ({"task": "chain_sun"}, "Unknown task of reasoning-gym 'chain_sun'", "'chain_sum'"),
        ({"options": "min_term=2"}, "Unknown option of chain_sum 'min_term'", "'min_terms'"),
        ({"options": "seed=2"}, "Unknown option of chain_sum 'seed'", "Available"),
        ({"options": "min_terms=-2"}, "min_terms must be positive", "dataset.options=min_terms=-2"),
        ({"options": "min_terms=few"}, "refuses its options", "dataset.options"),
        ({"options": "min_terms"}, "no list of key=value", "min_terms=2"),
        ({"options": "min_terms=[2"}, "cannot be read", "YAML"),
        ({"task": "composite"}, "refuses its options", "another task"),
    ],
)
def test_faults(gym, keys, match, hint):
    with pytest.raises(ConfigError, match=match) as caught:
        load(GymConfig(**SMALL, **keys))
    assert hint in caught.value.hint


def test_a_task_that_has_not_so_many(gym):
    with pytest.raises(DataError, match=r"only .* different problems were found") as caught:
        load(
            GymConfig(
                **{**SMALL, "test_documents": 500},
                options="min_terms=2,max_terms=2,min_digits=1,max_digits=1",
            )
        )
    assert "fewer" in caught.value.hint
