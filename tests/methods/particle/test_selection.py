"""From solutions to one answer: every rule by hand, on populations whose outcome is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import toys

from reason.datasets.problems import Problem
from reason.errors import ConfigError
from reason.methods.particle import searches, smc
from reason.methods.particle.lineage import Node, Population
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Draws
from reason.methods.particle.selection import RULES, Candidates, judge, nested, solved

ROOT = Node(None)


def end(answer: str, reward: float = 0.5, finish: str = "eos") -> Node:
    text = f"1+1=2\nanswer {answer}\n" if answer else "1+1=2\n"
    return Node(ROOT, tuple(text.encode()), text, reward=reward, finish=finish)


def population(*particles: tuple[Node, float], status: str = "finished") -> Population:
    """Particles and their weights."""
    nodes, weights = zip(*particles, strict=True)
    with np.errstate(divide="ignore"):
        return Population(nodes, np.log(np.array(weights, float)), 0.0, (), status)


def chosen(candidates: Candidates, rule: str, **more) -> str | None:
    return candidates.answer(0, candidates.select(rule, **more)).value


def test_every_rule_by_hand():
    """Five particles: the rules differ in what they choose."""
    clone = end("7", 0.4)
    several = [
        (end("5", 0.95), 0.10),
        (clone, 0.15), (clone, 0.15), (clone, 0.15),
        (end("9", 0.65), 0.45), (end("9", 0.60), 0.0),
    ]  # fmt: skip
    c = Candidates.of_populations([population(*several)])
    assert not c.present[0, 5]  # its weight is zero: it was refused
    assert chosen(c, "argmax_last") == "5"
    assert chosen(c, "majority") == "7"
    assert chosen(c, "reward_vote") == "7"  # 1.2 against .95 and .65
    assert chosen(c, "lineage_vote") == "5"  # one vote each; the first seen
    assert chosen(c, "argmax_orm", scores=np.array([[0.0, 0.1, 0.1, 0.1, 0.2, 9.0]])) == "9"
    assert chosen(c, "sample", uniform=np.array([0.05])) == "5"
    assert chosen(c, "sample", uniform=np.array([0.3])) == "7"
    assert chosen(c, "sample", uniform=np.array([0.6])) == "9"
    weighted = c.answer(0, c.select("weighted_vote"))
    assert weighted.value == "7" or math.isclose(weighted.margin, 0.0, abs_tol=1e-12)
    assert [round(k.mass, 12) for k in weighted.classes] == [0.45, 0.45, 0.1]
    assert weighted.contested
    majority = c.select("majority")
    assert majority.mass[0] == pytest.approx(3 / 5) and majority.margin[0] == pytest.approx(2 / 5)


def test_mass_and_margin_of_a_choice_against_the_vote():
    c = Candidates.of_populations(
        [population((end("5", 0.9), 0.2), (end("7", 0.1), 0.5), (end("8", 0.1), 0.3))]
    )
    best = c.answer(0, c.select("argmax_last"))
    assert (best.value, best.contested) == ("5", True)
    assert best.mass == pytest.approx(0.2) and best.margin == pytest.approx(0.2 - 0.5)
    vote = c.answer(0, c.select("weighted_vote"))
    assert (vote.value, round(vote.mass, 12), round(vote.margin, 12)) == ("7", 0.5, 0.2)


def test_agreement_is_not_contested():
    c = Candidates.of_populations([population((end("5", 0.9), 0.6), (end("7", 0.1), 0.4))])
    assert not c.contested()[0] and not c.answer(0, c.select("majority")).contested


def test_four_siblings_one_finished():
    """No unfinished text is ever a candidate, whatever it says and however it is rewarded."""
    open_ = [Node(ROOT, (i,), f"answer {i}\n", reward=0.99) for i in range(3)]
    c = Candidates.of([[*open_, end("4", 0.01)]])
    right = np.array([[True, True, True, False]])
    for rule in RULES:
        more = {"uniform": np.array([0.0]), "scores": np.ones((1, 4)), "correct": right}
        picked = c.select(rule, **more)
        assert picked.index[0] == 3 and c.answer(0, picked).value == "4", rule
    assert not c.correct([Problem("p", "", "1")])[0, 1]


@pytest.mark.parametrize("rule", RULES)
def test_dead_and_unfinished_populations_have_no_answer(rule):
    dead = population((end("5"), 0.0), (end("6"), 0.0), status="dead")
    halted = population((Node(ROOT, (1,), "answer 5\n", reward=0.9), 1.0), status="out of tokens")
    c = Candidates.of_populations([dead, halted])
    more = {"uniform": np.zeros(2), "scores": np.ones((2, 2)), "correct": np.ones((2, 2), bool)}
    picked = c.select(rule, **more)
    assert (picked.index == -1).all() and (picked.mass == 0).all()
    for p in range(2):
        answer = c.answer(p, picked)
        assert answer.value is None and answer.node is None and answer.classes == ()
    assert (solved(picked, np.ones((2, 2), bool)) == 0).all()


def test_nothing_at_all():
    for c in (Candidates.of([]), Candidates.of([[], []])):
        assert len(c.select("majority").index) == len(c.nodes)
        assert len(solved(c.select("majority"), c.correct([Problem("a", "")] * 2))) == len(c.nodes)


def test_what_cannot_be_read_has_no_vote_unless_nothing_can():
    mixed = population((end("", 0.99), 0.7), (end("", 0.98), 0.2), (end("3", 0.1), 0.1))
    mute = population((end("", 0.3), 0.5), (end("", 0.6), 0.5))
    c = Candidates.of_populations([mixed, mute])
    for rule in ("majority", "weighted_vote", "reward_vote", "argmax_last", "lineage_vote", "sample"):
        picked = c.select(rule, uniform=np.array([0.1, 0.1]))
        assert c.answer(0, picked).value == "3", rule
        assert picked.mass[0] == pytest.approx(1.0), rule
        assert c.answer(1, picked).value is None, rule
    picked = c.select("argmax_last")
    assert picked.index[1] == 1  # a solution is shown all the same


def test_an_answer_light_by_800_nats_still_counts_beside_one_that_cannot_be_read():
    nodes = (end("", 0.9), end("3", 0.1))
    c = Candidates.of_populations([Population(nodes, np.array([0.0, -800.0]), 0.0)])
    assert chosen(c, "weighted_vote") == "3" and c.select("weighted_vote").mass[0] == 1.0


def test_equal_answers_are_one_class():
    c = Candidates.of([[end("007"), end("8"), end("7")]])
    assert c.kinds.tolist() == [[0, 1, 0]]
    assert chosen(c, "majority") == "007"


def test_rules_without_their_rewards_are_refused():
    c = Candidates.of([[end("3", math.nan), end("4", 0.2)]])
    for rule in ("argmax_last", "reward_vote"):
        with pytest.raises(ConfigError, match="needs a reward"):
            c.select(rule)
    assert chosen(c, "majority") == "3"
    with pytest.raises(ConfigError, match="majority"):
        c.select("majorty")


# --- judging and rivals -------------------------------------------------------------------------------


def test_judging_takes_the_problems_own_judge_first():
    own = Problem("a", "", "7", score=lambda answer: answer == "seven")
    plain, mute = Problem("b", "", "7"), Problem("c", "")
    assert judge([own, own, plain, plain, plain, mute], ["seven", "7", "007", "8", None, "7"]) == [
        True, False, True, False, False, None,
    ]  # fmt: skip


def test_rivals_on_nested_prefixes_are_those_of_shorter_lists():
    """best-of-4 of 32 samples is best-of-n of the first four, for every rule and n."""
    rng = np.random.default_rng(0)
    lists = [
        [end(str(rng.integers(3)) if rng.random() > 0.2 else "", float(rng.random())) for _ in range(16)]
        for _ in range(40)
    ]
    lists[3][0] = Node(ROOT, (1,), "answer 1\n", reward=0.99)  # halted
    problems = [Problem(str(i), "", str(i % 3)) for i in range(40)]
    whole = Candidates.of(lists)
    found = nested(whole, whole.correct(problems), [1, 2, 4, 8, 16])
    for n, rivals in found.items():
        alone = Candidates.of([nodes[:n] for nodes in lists])
        right = alone.correct(problems)
        for name, rule in (
            ("self_consistency", "majority"), ("best_of_n", "argmax_last"), ("weighted_best_of_n", "reward_vote"),
        ):  # fmt: skip
            assert (rivals[name] == solved(alone.select(rule), right)).all()
        assert (rivals["oracle"] == right.any(1)).all()
        assert (rivals["sample"] == right.mean(1)).all()
    assert (found[1]["self_consistency"] == found[1]["sample"]).all()
    assert (found[16]["oracle"] >= found[16]["best_of_n"]).all()


def test_beams_and_subtrees_answer_by_their_best():
    """Lists of different lengths, of finished solutions alone."""
    toy = toys.stopping()
    found = [
        toy.run(search(ROOT, 8, 4, Draws(seed, "p")))
        for search in (searches.beam, searches.dvts)
        for seed in range(10)
    ]
    for nodes in found:
        for node in nodes:
            node.text = f"answer {len(node.path)}\n"
    c = Candidates.of(found)
    picked = c.select("argmax_last")
    for p, nodes in enumerate(found):
        answer = c.answer(p, picked)
        assert answer.node is not None and answer.node.reward == max(node.reward for node in nodes)


def test_oracle_chooses_a_right_one_where_there_is_any():
    lists = [[end("1"), end("2"), end("")], [end("4"), end("5")]]
    problems = [Problem("a", "", "2"), Problem("b", "", "7")]
    c = Candidates.of(lists)
    correct = c.correct(problems)
    assert solved(c.select("oracle", correct=correct), correct).tolist() == [1.0, 0.0]


def test_a_constant_reward_votes_like_the_majority():
    """The null control: particle filtering without information is self-consistency."""
    toy = toys.stopping()
    toy.reward = lambda path: 0.5
    for seed in range(20):
        config = smc.Filter(16, Potential("prob"), threshold=0.5)
        found = toy.run(smc.sweep(ROOT, config, Draws(seed, "p")))
        plain = toy.run(searches.samples(ROOT, 16, Draws(seed, "p")))
        for nodes in (found.nodes, plain):
            for node in nodes:
                node.text = f"answer {len(node.path)}\n"
        particles, samples = Candidates.of_populations([found]), Candidates.of([plain])
        for rule in ("weighted_vote", "majority", "reward_vote"):
            assert chosen(particles, rule) == chosen(samples, "majority")
