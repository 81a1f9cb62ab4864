"""Generated sums: Python's own arithmetic agrees, and the judge tells right steps from slips, mended or not."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.datasets.arithmetic import Sum, check, draw, load
from reason.datasets.textconfig import ArithmeticConfig
from reason.errors import ConfigError, DataError

SMALL = {"train_documents": 60, "valid_documents": 20, "test_documents": 20}


@st.composite
def problems(draw):
    modulus = draw(st.sampled_from([3, 6, 10, 97]))
    number = st.integers(1, min(9, modulus - 1))
    operations = draw(st.lists(st.tuples(st.sampled_from("+-*"), number), min_size=1, max_size=6))
    return Sum(draw(number), tuple(operations), modulus)


def truth(question: str) -> int:
    """The answer, by Python's parser and arithmetic."""
    expression, modulus = question.split(" mod ")
    return eval(expression) % int(modulus)


def value_of(step: str, modulus: int) -> tuple[int, int]:
    """What a step should come to, and what it says."""
    left, right = step.removeprefix("redo ").split("=")
    return eval(left) % modulus, int(right)


@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_a_right_solution_is_right(problem):
    assert problem.answer == truth(problem.question)
    assert all(right == said for right, said in (value_of(s, problem.modulus) for s in problem.steps))
    verdict = check(problem, problem.solution)
    assert verdict.correct and verdict.derived and verdict.answer == problem.answer
    assert [line.kind for line in verdict.lines] == ["right"] * (problem.depth + 1)
    assert all(line.alive for line in verdict.lines)
    assert problem.question.count("(") == problem.question.count(")")


@settings(max_examples=120, deadline=None)
@given(problem=problems(), seed=st.integers(0, 999), slip=st.floats(0, 1), redo=st.floats(0, 1))
def test_slips_are_found_and_mended_ones_forgiven(problem, seed, slip, redo):
    text = problem.slipped(random.Random(seed), slip, redo)
    *steps, last = text.split("\n")
    verdict = check(problem, text)
    assert verdict.derived and verdict.correct == (last == f"answer {truth(problem.question)}")
    judged = {"right": True, "astray": True, "slip": False}  # a step that was written is never stray
    for step, line in zip(steps, verdict.lines, strict=False):
        right, said = value_of(step, problem.modulus)
        assert judged[line.kind] == (right == said)
    assert len([s for s in steps if not s.startswith("redo ")]) == problem.depth
    for before, after in itertools.pairwise(steps):
        if after.startswith("redo "):  # the same step, and the first try was wrong
            assert after[5:].split("=")[0] == before.split("=")[0] and after[5:] != before
    if redo == 1:
        assert verdict.correct


@settings(max_examples=120, deadline=None)
@given(problem=problems(), seed=st.integers(0, 999))
def test_alive_means_that_the_answer_can_still_be_reached(problem, seed):
    """Both honest ways on from each prefix are written out: straight on, and after redoing the last step."""
    *steps, _ = problem.slipped(random.Random(seed), 0.5, 0.3).split("\n")
    verdict = check(problem, "\n".join(steps))
    for count in range(1, len(steps) + 1):
        prefix = steps[:count]
        expression, right, _ = re.split("(?==)|=", prefix[-1].removeprefix("redo "), maxsplit=2)
        done = len([s for s in prefix if not s.startswith("redo ")])
        reached = False
        for value in (int(prefix[-1].split("=")[1]), eval(expression) % problem.modulus):
            for sign, number in problem.operations[done:]:
                value = eval(f"{value}{sign}{number}") % problem.modulus
            reached |= value == truth(problem.question)
        assert verdict.lines[count - 1].alive == reached, (prefix, right)
    assert verdict.answer is None and not verdict.correct and not verdict.derived


EXAMPLE = Sum(7, (("+", 5), ("*", 3), ("-", 4)), 97)


@pytest.mark.parametrize(
    "solution, kinds, alive, correct, derived",
    [
        ("7+5=13\nredo 7+5=12\n12*3=36\n36-4=32\nanswer 32", "slip right right right right", "11111", 1, 1),
        (
            "7+5=13\n13*3=39\nredo 13*3=39\n39-4=35\nanswer 35",
            "slip astray astray astray astray",
            "10000",
            0,
            1,
        ),
        ("7+5=13\nredo 12*3=36\n12*3=36", "slip stray stray", "111", 0, 0),  # redo repeats the step as it was
        ("redo 7+5=12\n7+5=12", "stray right", "11", 0, 0),  # there is nothing yet to do again
        ("7+5=12\n12-4=8\n12*3=36", "right stray right", "111", 0, 0),  # the order is the question's
        ("7+5=12\n\n  12*3=36  \n36-4=129\nanswer 32", "right right slip right", "1111", 1, 0),
        ("answer 32\n7+5=12\nanswer 31", "right stray stray", "111", 1, 0),  # guessed; what follows is void
        ("7+5=12\n12*3=36\n36-4=32\nanswer 33", "right right right slip", "1110", 0, 0),
        ("7 + 5 = 12\n7+5=012\n7+5=12.\nwell\n7+5=" + "9" * 5000, "unreadable " * 5, "11111", 0, 0),
        ("7+5=12\n12*3=36\n36-4=32\n32-4=28", "right right right stray", "1111", 0, 0),
        ("", "", "", 0, 0),
    ],
)
def test_verdicts_by_hand(solution, kinds, alive, correct, derived):
    assert EXAMPLE.question == "((7+5)*3-4) mod 97" and EXAMPLE.depth == 3 and EXAMPLE.answer == 32
    verdict = check(EXAMPLE, solution)
    assert [line.kind for line in verdict.lines] == kinds.split()
    assert "".join(str(int(line.alive)) for line in verdict.lines) == alive
    assert (verdict.correct, verdict.derived) == (bool(correct), bool(derived))


# --- the dataset --------------------------------------------------------------------------------------


def test_the_view_holds_question_and_solution_and_slips_only_in_training():
    data = load(ArithmeticConfig(**SMALL, slip=0.5, redo=0.5))
    corpus = data.text()
    wrong = 0
    for split, part in corpus.parts.items():
        assert len(part) == SMALL[f"{split}_documents"] == len(data.sums[split])
        for text, problem in zip(part.text, data.sums[split], strict=True):
            question, _, solution = text.partition("\n")
            assert question == problem.question and 4 <= problem.depth <= 8
            verdict = check(problem, solution)
            assert verdict.derived and (split == "train" or solution == problem.solution)
            wrong += not verdict.correct
    assert wrong > 20  # half of the slips are not mended
    mended = load(ArithmeticConfig(**SMALL, slip=0.5))
    for text, problem in zip(mended.corpus.train.text, mended.sums["train"], strict=True):
        assert check(problem, text.partition("\n")[2]).correct
    assert "redo" in "".join(mended.corpus.train.text)
    questions = [p.question for several in data.sums.values() for p in several]
    assert len(set(questions)) == len(questions)


def test_the_seed_decides_and_judged_problems_do_not_depend_on_training():
    one = load(ArithmeticConfig(**SMALL))
    assert one.digest == load(ArithmeticConfig(**SMALL)).digest
    assert one.digest != load(ArithmeticConfig(**SMALL, seed=1)).digest
    more = load(ArithmeticConfig(**{**SMALL, "train_documents": 90}, slip=0.3))
    assert more.corpus.test == one.corpus.test and more.corpus.valid == one.corpus.valid


def test_all_sizes_occur():
    config = ArithmeticConfig(least=1, most=3, largest=4, modulus=5)
    drawn = [draw(config, random.Random(i)) for i in range(300)]
    assert {p.depth for p in drawn} == {1, 2, 3}
    assert {sign for p in drawn for sign, _ in p.operations} == set("+-*")
    assert {p.start for p in drawn} == {number for p in drawn for _, number in p.operations} == {1, 2, 3, 4}


def test_too_few_different_problems():
    with pytest.raises(DataError, match="few more than 12 different examples") as caught:
        load(ArithmeticConfig(least=1, most=1, largest=2, modulus=3))
    assert "fewer documents" in caught.value.hint


@pytest.mark.parametrize(
    "keys",
    [
        {"modulus": 2}, {"most": 0}, {"least": 9}, {"largest": 97}, {"largest": 1}, {"slip": 1.5}, {"redo": -0.1},
        {"train_documents": 0}, {"test_documents": -1},
    ],
)  # fmt: skip
def test_keys_out_of_bounds(keys):
    (key,) = keys
    with pytest.raises(ConfigError, match=f"dataset.{key}=") as caught:
        ArithmeticConfig(**keys)
    assert caught.value.hint


def test_stubborn_calculations_are_wrong_more_often_than_right_and_always_alike():
    config = ArithmeticConfig(modulus=11, largest=5, slip=0.0, stubborn=0.2, redo=0.0, train_documents=3000)
    often: dict[str, Counter[str]] = {}
    for text in load(config).corpus.train.text:
        for line in text.split("\n")[1:-1]:
            step, _, result = line.partition("=")
            often.setdefault(step, Counter())[result] += 1
    often = {step: found for step, found in often.items() if found.total() >= 30}
    hard = {step: found for step, found in often.items() if len(found) > 1}
    assert 0.1 < len(hard) / len(often) < 0.3
    for step, found in hard.items():
        assert len(found) == 2, step
        left, sign, right = re.fullmatch(r"(\d+)([-+*])(\d+)", step).groups()
        want = str(
            {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign] % 11
        )
        assert 0.2 < found[want] / found.total() < 0.6
