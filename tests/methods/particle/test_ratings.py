"""People as raters: what a rating says, which are asked for, and that a record replays."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
from scipy.special import expit, logit

from reason.datasets.problems import Problem
from reason.errors import ConfigError, DataError
from reason.files import append_json_lines
from reason.methods.particle.driver import Prefix
from reason.methods.particle.lineage import Node
from reason.methods.particle.ratings import Accuracy, Queue, Rated, Replay, Simulated, key_of, read_ratings

PROBLEM = Problem("p", "What is 1 + 1?", "2")
GOOD = Accuracy(0.9, 0.8)


def prefixes(n: int) -> list[Prefix]:
    return [Prefix(PROBLEM, Node(Node(None), [i], f"step {i}"), None) for i in range(n)]  # type: ignore[arg-type]


def by_token(values):
    return lambda several: np.array([values[p.node.tokens[0]] for p in several])


def test_a_rating_is_an_observation():
    assert GOOD.evidence(True) == pytest.approx(np.log(0.9 / 0.2))
    assert GOOD.evidence(False) == pytest.approx(np.log(0.1 / 0.8))
    several = prefixes(3)
    said = {key_of(several[0]): True, key_of(several[1]): False}
    rated = Rated(by_token([0.3, 0.6, 0.5]), lambda p, worth: said, GOOD, questions=3)
    got = rated(several)
    # Bayes: P(right | called right) = .3 * .9 / (.3 * .9 + .7 * .2)
    assert got[0] == pytest.approx(0.27 / (0.27 + 0.14))
    assert got[1] == pytest.approx(0.6 * 0.1 / (0.6 * 0.1 + 0.4 * 0.8))
    assert got[2] == 0.5


def test_information_by_hand():
    perfect = Accuracy(1 - 1e-12, 1 - 1e-12)
    assert perfect.information(np.array([0.5, 0.0]))[0] == pytest.approx(np.log(2))
    got = GOOD.information(np.array([0.0, 0.1, 0.5, 1.0]))
    assert got[0] == pytest.approx(0) and got[3] == pytest.approx(0) and 0 < got[1] < got[2]
    q = 0.5 * 0.9 + 0.5 * 0.2
    h = lambda p: -(p * np.log(p) + (1 - p) * np.log(1 - p))  # noqa: E731
    assert got[2] == pytest.approx(h(q) - h(0.9) / 2 - h(0.8) / 2)


def test_what_tells_most_is_asked_once():
    asked = []

    def rater(several, worth):
        asked.append([p.node.tokens[0] for p in several])
        assert list(worth) == sorted(worth, reverse=True)
        return {}

    rated = Rated(by_token([0.99, 0.45, 0.9, 0.01]), rater, GOOD, questions=2)
    rated(prefixes(4))
    rated(prefixes(4))
    assert asked == [[1, 2]]  # what was given a reward keeps it
    members = np.array([[0.5, 0.5, 0.5], [0.5, 0.9, 0.1]])
    Rated(lambda several: members, rater, GOOD)(prefixes(2))
    assert asked[-1] == [1]  # the same reward, but the members do not agree


def test_members_stay_what_they_were():
    members = np.array([[0.5, 0.4, 0.6]])
    got = Rated(lambda several: members, lambda p, w: {key_of(p[0]): True}, GOOD)(prefixes(1))
    assert got[0, 1:].tolist() == [0.4, 0.6] and got[0, 0] == pytest.approx(0.9 / 1.1)


def test_a_queue_asks_goes_on_and_takes_what_is_answered_later(tmp_path):
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    several = prefixes(2)
    reward = by_token([0.5, 0.4])

    def fresh(**options):
        return Rated(reward, Queue(questions, answers, **options), GOOD, questions=2)

    start = time.monotonic()
    assert fresh(seconds=0.05)(several).tolist() == [0.5, 0.4]  # nobody answered
    assert time.monotonic() - start < 2
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    assert [row["key"] for row in rows] == [key_of(p) for p in several]
    assert (
        rows[0]["problem"] == PROBLEM.text and rows[0]["solution"] == "step 0" and rows[0]["information"] > 0
    )
    append_json_lines(answers, [{"key": rows[1]["key"], "good": True}])
    assert fresh()(several)[1] == pytest.approx(expit(logit(0.4) + GOOD.evidence(True)))
    assert len(questions.read_text().splitlines()) == 2  # listed once
    append_json_lines(answers, [{"key": rows[1]["key"], "good": False}])  # changed their mind
    assert fresh()(several)[1] == pytest.approx(expit(logit(0.4) + GOOD.evidence(False)))


def test_an_answer_that_comes_in_time_is_waited_for(tmp_path):
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    (one,) = prefixes(1)
    later = threading.Timer(0.2, append_json_lines, (answers, [{"key": key_of(one), "good": True}]))
    later.start()
    start = time.monotonic()
    got = Rated(by_token([0.5]), Queue(questions, answers, 20, every=0.02), GOOD)([one])
    later.join()
    assert got[0] == pytest.approx(0.9 / 1.1) and time.monotonic() - start < 10


def test_a_record_replays_what_happened(tmp_path):
    record = tmp_path / "ratings.jsonl"
    values = np.linspace(0.1, 0.9, 30)
    truth = by_token(np.arange(30) % 2)
    simulated = Simulated(truth, GOOD, seed=3)

    def absent_at_times(several, worth):
        return {k: v for k, v in simulated(several, worth).items() if int(k[-1], 16) % 3}

    def rewards(rater, **options):
        rated = Rated(by_token(values), rater, GOOD, questions=2, **options)
        return [rated(prefixes(30)[i : i + 6]).tolist() for i in range(0, 30, 6)]

    first = rewards(absent_at_times, record=record)
    assert rewards(Replay(record)) == first
    assert rewards(simulated) != first
    said = read_ratings(record)
    assert len(said) == 10 and None in said.values() and not set(said.values()) <= {None}


def test_a_simulated_rater_is_wrong_as_often_as_said():
    several = prefixes(4000)
    said = Simulated(by_token(np.arange(4000) % 2), GOOD)(several, [])
    right = np.array([said[key_of(p)] for p in several])
    assert abs(right[1::2].mean() - 0.9) < 0.03 and abs(right[::2].mean() - 0.2) < 0.035
    assert said == Simulated(by_token(np.arange(4000) % 2), GOOD)(several, [])
    assert said != Simulated(by_token(np.arange(4000) % 2), GOOD, seed=1)(several, [])


@pytest.mark.parametrize("bad", [(1.0, 0.9), (0.9, 0.0), (0.4, 0.5), (float("nan"), 0.9)])
def test_raters_who_say_nothing_are_refused(bad):
    with pytest.raises(ConfigError):
        Accuracy(*bad)


@pytest.mark.parametrize(
    "line", ['{"key": 3, "good": true}', '{"key": "a"}', '{"key": "a", "good": "yes"}', "[1]", "{"]
)
def test_a_line_that_is_no_rating_is_named(tmp_path, line):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"key": "b", "good": true}\n' + line + '\n{"key": "c", "good": true}\n')
    with pytest.raises(DataError, match=r"answers.jsonl, (line|rating) 2"):
        read_ratings(file)
    file.write_text('{"key": "b", "good": true}\n{"key": ')  # somebody is writing
    assert read_ratings(file) == {"b": True}
