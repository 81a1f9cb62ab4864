"""The view ``problems``: what its members promise, and sums with their exact judge."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from reason.answers import stated
from reason.datasets.arithmetic import load
from reason.datasets.problems import Problem, Problems, finish, view
from reason.datasets.textconfig import ArithmeticConfig
from reason.errors import DataError
from reason.metrics.grading import grade

SMALL = {"train_documents": 80, "valid_documents": 40, "test_documents": 20}
ROWS = [Problem(f"p{i}", f"What is {i} plus 1?", str(i + 1), f"{i}+1={i + 1}", i % 5) for i in range(40)]


def data(rows=ROWS, **more):
    parts = {"train": Problems(rows[:20]), "valid": Problems(rows[20:30]), "test": Problems(rows[30:])}
    return finish("mine", parts, 0.25, **more)


def test_parts_of_problems_are_problems():
    some = Problems(ROWS)
    assert some[3] is ROWS[3] and list(some[1:3]) == ROWS[1:3] and isinstance(some[1:3], Problems)
    assert list(some.take(np.array([5, 2]))) == [ROWS[5], ROWS[2]] and some.id[5] == "p5"
    assert some.find("p7") == 7
    with pytest.raises(DataError, match="no problem 'p77'") as caught:
        some.find("p77")
    assert "Did you mean 'p" in caught.value.hint
    with pytest.raises(DataError, match="among these 0"):
        Problems().find("p7")


def test_fitting_is_held_out_of_validation_by_id():
    splits = data().problems()
    assert len(splits.train) == 20 and len(splits.test) == 10
    assert len(splits.valid) + len(splits.fit) == 10 and len(splits.fit) > 0
    assert not set(splits.valid.id) & set(splits.fit.id)
    assert splits.info["fitting"] == len(splits.fit) and splits.info["validation"] == len(splits.valid)
    back = {"train": Problems(), "valid": Problems(ROWS[29:19:-1]), "test": Problems()}
    assert set(view(back, 0.25, {}).fit.id) == set(splits.fit.id), "the order plays no part"
    empty = view(dict.fromkeys(back, Problems()), 0.25, {})
    assert not len(empty.valid) and not len(empty.fit)


def test_everything_that_matters_is_in_the_digest():
    one = data().digest
    assert one == data().digest and one != data(info={"version": 2}).digest
    for change in ({"id": "q"}, {"text": "?"}, {"answer": None}, {"solution": ""}, {"level": "1"}):
        assert data([replace(ROWS[0], **change), *ROWS[1:]]).digest != one
    assert data([ROWS[20], *ROWS[1:20], ROWS[0], *ROWS[21:]]).digest != one


def test_a_fingerprint_is_of_the_words():
    one = Problem("a", "What is  1\nplus 2?")
    assert one.fingerprint == Problem("b", "What is 1 plus 2? ", "3").fingerprint
    assert one.fingerprint != Problem("a", "What is 1 plus 22?").fingerprint


def test_text_is_prompt_and_solution_that_gives_its_answer():
    bare = data([*ROWS[:5], replace(ROWS[5], solution=""), replace(ROWS[6], solution="answer 7"), *ROWS[7:]])
    text = bare.text().train
    assert (
        text.text[0] == "What is 0 plus 1?\n0+1=1\n#### 1" and text.text[5] == "What is 6 plus 1?\nanswer 7"
    )
    assert "p5" not in text.id and len(text) == 19
    with pytest.raises(DataError, match="no train problem has a worked solution"):
        data([replace(p, solution="") for p in ROWS]).text()


def test_problems_without_answers_are_kept_and_said():
    some = data(
        [
            *ROWS[:35],
            *(replace(p, answer=None) for p in ROWS[35:38]),
            replace(ROWS[38], answer=None, score=bool),
            ROWS[39],
        ]
    )
    assert some.info["without_answer"] == 3 and some.info["test_problems"] == 10
    assert some.notes == ["Problems without an answer, which are solved and not judged: 3 in test."]
    assert [p.judged for p in some.parts["test"]][5:] == [False] * 3 + [True] * 2


# --- sums ---------------------------------------------------------------------------------------------


def test_sums_are_problems_with_their_judge():
    made = load(ArithmeticConfig(**SMALL, slip=0.3, redo=0.5))
    splits, corpus = made.problems(), made.text()
    assert [len(splits.train), len(splits.valid) + len(splits.fit), len(splits.test)] == [80, 40, 20]
    for p, text in zip(splits.train, corpus.train.text, strict=True):
        assert p.prompt + p.solution == text
    right = 0
    for p in [*splits.train, *splits.valid, *splits.fit, *splits.test]:
        assert p.check and p.answer and p.judged and 4 <= p.level <= 8
        verdict = p.check(p.solution)
        assert verdict.correct is grade(stated(p.solution), p.answer), "steps and answers are judged alike"
        assert verdict.alive is verdict.correct and p.check("").alive
        right += verdict.correct
    assert 80 < right < 140, "slips that are not mended stand in training, and nowhere else"
    assert all(p.check(p.solution).correct for p in [*splits.valid, *splits.fit, *splits.test])
    again = pickle.loads(pickle.dumps(splits.test[0]))
    assert again.text == splits.test[0].text and again.check(again.solution).correct


@pytest.mark.parametrize("said", ["32", "032", "-32", "32.5", "32 33", "x", "33", "9" * 30])
def test_the_judge_of_steps_and_the_grader_agree_about_answers(said):
    from functools import partial

    from reason.datasets.arithmetic import Sum, check

    judge = partial(check, Sum(7, (("+", 5), ("*", 3), ("-", 4)), 97))
    for solution in (f"answer {said}", f"7+5=12\nanswer {said}\nanswer 32"):
        verdict = judge(solution)
        assert verdict.correct is grade(stated(solution), "32") is (said in ("32", "032"))
        assert verdict.lines[-1].alive is verdict.correct
