"""Judges of prefixes: values by hand, what each corruption does to them, and several as one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
from scipy.special import expit, logit

from reason.backbones.generation import stream, uniforms
from reason.datasets.arithmetic import Sum, check
from reason.datasets.problems import JudgedLine, Problem, Verdict
from reason.errors import ConfigError, DataError, RunError
from reason.methods.particle import rewards as r
from reason.methods.particle import searches, smc
from reason.methods.particle.driver import Prefix
from reason.methods.particle.lineage import Node
from reason.methods.particle.noise import Channel, Noise
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Draws
from reason.methods.particle.rules import Rules, equations, holds

SUM = Sum(7, (("+", 5), ("*", 3), ("-", 4)), 97)  # 12, 36, 32


def problem(name: str = "p0", text: str = SUM.question) -> Problem:
    return Problem(name, text, "32", check=partial(check, SUM))


def path(*chunks: str, finish: str = "", tokens=None) -> Node:
    """A node behind chunks; its tokens are the bytes of their texts."""
    node = Node(None)
    for i, text in enumerate(chunks):
        last = i == len(chunks) - 1
        node = Node(node, list(tokens or text.encode()), text, finish=finish if last else "")
    return node


def prefix(*chunks: str, finish: str = "", of: Problem | None = None) -> Prefix:
    return Prefix(of or problem(), path(*chunks, finish=finish), None)  # type: ignore[arg-type]


def many(n: int, steps: int = 1, of: Problem | None = None) -> list[Prefix]:
    """n different prefixes of so many chunks."""
    return [prefix(*(f"{i} {t}\n" for t in range(steps)), of=of) for i in range(n)]


# --- the exact judge ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "finish", "want"),
    [
        (["7+5=12\n"], "", 1),
        (["7+5=13\n"], "", 1),  # can still be redone
        (["7+5=13\n", "13*3=39\n"], "", 0),  # it is too late
        (["7+5=13\n", "redo 7+5=12\n"], "", 1),
        (["7+5=12\n", "12*3=3"], "", 1),  # cut in the middle of a number: that line is not judged yet
        (["7+5=12\n", "12*3=3", "9\n", "39-4=35\n"], "", 0),
        (["7+5=12\n"], "length", 0),  # ended without an answer
        (["7+5=12\n", "12*3=36\n", "36-4=32\n", "answer 32"], "eos", 1),
        (["answer 31"], "eos", 0),
        (["answer 32"], "eos", 1),  # by its answer
    ],
)
def test_the_exact_reward_is_whether_the_answer_can_be_reached(chunks, finish, want):
    assert r.Exact()([prefix(*chunks, finish=finish)]).tolist() == [want]


def test_a_problem_without_a_judge_has_no_exact_reward():
    with pytest.raises(DataError, match="'q' has no exact judge"):
        r.Exact()([Prefix(Problem("q", "What is 1?", "1"), path("1"), None)])  # type: ignore[arg-type]


def test_without_corruption_the_channel_gives_the_margins():
    channel = Channel(Noise(margin=0.5, margin_last=3.0, margin_steps=6))
    several = [prefix(*"abcdefgh"[:t]) for t in range(1, 9)]
    got = channel(several, np.array([True, False] * 4))
    np.testing.assert_allclose(got, [0.5, -1, 1.5, -2, 2.5, -3, 3, -3])
    exact = r.Exact(Noise(margin=2.0, margin_last=2.0))
    got = exact([prefix("7+5=12\n"), prefix("7+5=13\n", "13*3=39\n")])
    np.testing.assert_allclose(got, [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))])


# --- its noise ------------------------------------------------------------------------------------------

FLAT = Noise(margin=0.0, margin_last=0.0)


def noise(n: Noise, several, alive=True) -> np.ndarray:
    return Channel(n)(several, np.full(len(several), alive))


def test_noise_is_a_function_of_problem_prefix_and_seed():
    loud = replace(FLAT, sigma=2.0, rho=0.5, bias=1.0, flips=0.2, margin=1.0)
    first, again = noise(loud, many(50, 3)), noise(loud, many(50, 3)[::-1])[::-1]
    assert (first == again).all()  # other objects, another order, another channel
    assert len(set(first.tolist())) == 50
    assert (noise(replace(loud, seed=1), many(50, 3)) != first).all()
    assert (noise(loud, many(50, 3, problem("p1"))) != first).all()


def test_independent_noise_has_its_spread_and_forgets():
    a, b = noise(replace(FLAT, sigma=2.0), many(2500, 1)), noise(replace(FLAT, sigma=2.0), many(2500, 2))
    for x in (a, b):
        assert abs(x.mean()) < 4 * 2 / 2500**0.5
        assert abs(x.std() - 2) < 4 * 2 / 5000**0.5
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / 2500**0.5
    assert (noise(replace(FLAT, sigma=0.5), many(10)) * 4 == a[:10]).all()  # the same noise, louder


def test_persistent_noise_keeps_its_spread_and_its_lineage():
    still = replace(FLAT, sigma=2.0, rho=0.9)
    steps = np.stack([noise(still, many(2500, t)) for t in (1, 2, 4)])
    assert (np.abs(steps.std(1) - 2) < 4 * 2 / 5000**0.5).all()
    assert abs(np.corrcoef(steps[0], steps[1])[0, 1] - 0.9) < 0.02
    assert abs(np.corrcoef(steps[0], steps[2])[0, 1] - 0.9**3) < 0.03
    constant = replace(still, rho=1.0)
    np.testing.assert_allclose(noise(constant, many(20, 1)), noise(constant, many(20, 5)))


def test_a_copy_shares_the_noise_of_its_ancestors_alone():
    still = Channel(replace(FLAT, sigma=1.0, rho=1.0))
    parent = path("a\n")
    children = [Prefix(problem(), Node(parent, [i], str(i)), None) for i in range(3)]  # type: ignore[arg-type]
    want = still([Prefix(problem(), parent, None)], np.array([True]))  # type: ignore[arg-type]
    np.testing.assert_allclose(still(children, np.full(3, True)), want[0])


def test_labels_are_flipped_as_often_as_said():
    flipped = noise(replace(FLAT, margin=1.0, margin_last=1.0, flips=0.2), many(2500)) < 0
    assert abs(flipped.mean() - 0.2) < 4 * (0.16 / 2500) ** 0.5
    wrong = noise(replace(FLAT, margin=1.0, margin_last=1.0, flips=0.2), many(2500), False) > 0
    assert (wrong == flipped).all()


def test_a_bias_is_that_of_the_problem():
    biased = replace(FLAT, bias=1.5)
    assert len(set(noise(biased, many(10)).tolist())) == 1
    several = [prefix("a", of=problem(f"p{i}")) for i in range(2000)]
    got = noise(biased, several)
    assert abs(got.mean()) < 4 * 1.5 / 2000**0.5 and abs(got.std() - 1.5) < 4 * 1.5 / 4000**0.5


def test_scale_and_bonus_and_blindness():
    loud = replace(FLAT, sigma=1.0, margin=1.0, margin_last=1.0)
    base = noise(loud, many(20))
    np.testing.assert_allclose(noise(replace(loud, scale=4.0), many(20)), 4 * base)
    tempting = replace(FLAT, bonus=2.5, long=3, keywords=("clearly",))
    got = noise(tempting, [prefix("abc"), prefix("abcd"), prefix("clearly"), prefix("clearly", "a")])
    assert got.tolist() == [0, 2.5, 2.5, 0]  # only the last step counts
    early = replace(FLAT, sigma=4.0, half_life=1.0)
    spread = [noise(early, many(1500, t)).std() for t in (1, 2, 3)]
    np.testing.assert_allclose(spread, [4, 2, 1], rtol=0.08)


@pytest.mark.parametrize(
    "bad", [{"sigma": -1}, {"rho": 1.1}, {"flips": 0.6}, {"scale": np.nan}, {"margin_steps": 0}]
)
def test_impossible_noise_is_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Noise(**bad)


# --- simple ones ----------------------------------------------------------------------------------------


def test_self_certainty_is_the_mean_probability_of_the_tokens():
    node = Node(Node(None), [1, 2, 3, 4], "abcd", log_p=4 * np.log(0.25))
    assert r.SelfCertainty()([Prefix(problem(), node, None)]) == pytest.approx([0.25])  # type: ignore[arg-type]


class Counting:
    """A reward that counts, and says a number of its own for every call."""

    seen = frozenset({"f"})

    def __init__(self):
        self.asked = 0

    def __call__(self, prefixes):
        self.asked += len(prefixes)
        return np.column_stack(
            [np.arange(self.asked - len(prefixes), self.asked) / 100, np.ones(len(prefixes))]
        )


def test_a_remembered_reward_is_asked_once_for_each_prefix():
    inner = Counting()
    reward = r.Remembered(inner)
    several = [*many(3), *many(2)]  # equal prefixes, other objects
    first = reward(several)
    assert inner.asked == 3 and (first[:2] == first[3:]).all() and first.shape == (5, 2)
    assert (reward(several[::-1]) == first[::-1]).all() and inner.asked == 3
    reward([prefix("0 0\n", of=problem("p0", "another question"))])
    assert inner.asked == 4
    assert reward.seen == {"f"}
    small = r.Remembered(Counting(), keep=2)
    assert len(small(many(5))) == 5 and len(small._known) == 2
    with pytest.raises(RunError, match="1 scores for 2 prefixes"):
        r.Remembered(lambda prefixes: np.ones(1))(many(2))


def test_a_reward_that_saw_a_test_problem_is_refused():
    tested = [problem("t0", "a question"), problem("t1", "another  question")]
    reward = r.Ensemble({"a": r.Remembered(Counting()), "b": r.SelfCertainty()})
    r.refuse_seen(reward, tested)
    r.refuse_seen(r.SelfCertainty(), tested)
    reward = Counting()
    reward.seen = frozenset({problem("other id", "another question").fingerprint})
    with pytest.raises(ConfigError, match=r"1 of the problems .* such as 't1'"):
        r.refuse_seen(r.Ensemble({"a": reward}), tested)


# --- rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("so 3 + 4 = 7 apples", [True]),
        ("He has 3 + 4 = 8 left.", [False]),
        (r"$5 \times 3 = $15", [True]),
        ("12*3=36=30+7", [True, False]),
        ("1,000 + 1 = 1,001", [True]),
        ("10/3 = 3.33", [True]),
        ("10/3 = 3.43", [False]),
        ("0.1 + 0.2 = 0.3", [True]),
        ("2x + 3 = 7", []),
        ("2x + 3*4 = 14", []),
        ("x - (3 + 4) = 7", []),
        ("10^2 + 3 = 103", []),
        ("half of 3 * 4 = 6", []),
        ("10% * 50 = 5", []),
        ("17/5 = 3 remainder 2", []),
        ("3+4 = 7x", []),
        ("6 * 10 = 6*10^1", []),
        ("5 million = 5000000", []),
        ("50-8=", []),
    ],
)
def test_equations_are_found_in_free_text_and_nothing_else(text, want):
    assert [holds(*pair) for pair in equations(text)] == want


def test_what_cannot_be_read_is_not_counted():
    assert holds("1/0", "3") is None and holds("9**9**9", "1") is None and holds("(1", "1") is None


def test_rules_count_what_is_broken():
    rules = Rules(strength=2.0)
    plain = Problem("q", "Add them.", "7")
    cases = [["3+4=7\n"], ["3+4=8\n"], ["3+4=8\n", "1+1=3\n"], ["3+4=8"]]
    got = rules([prefix(*chunks, of=plain) for chunks in cases])
    np.testing.assert_allclose(got, expit([0, -2, -4, 0]))  # a line that is not whole is not read
    assert rules.broken(plain, path("3+4=7\n", finish="eos")) == ["there is no answer"]
    assert not rules.broken(plain, path("answer 7", finish="eos"))
    assert Rules(line=r"(redo )?\d.*|answer .*").broken(plain, path("hm\n")) == ["'hm' is out of form"]
    assert rules.broken(problem(), path("7+5=13\n"))
    assert not rules.broken(problem(), path("7+5=13\n", "redo 7+5=12\n"))
    modular = Problem("m", "(90+9) mod 97", "2")
    assert not rules.broken(modular, path("90+9=2\n")) and rules.broken(plain, path("90+9=2\n"))
    with pytest.raises(ConfigError, match="pattern"):
        Rules(line="(")


# --- ensembles ------------------------------------------------------------------------------------------


def fixed(values):
    return lambda prefixes: np.array(values, float)[: len(prefixes)]


SAID = np.array([[0.9, 0.5, 0.2], [0.7, 0.7, 0.7]])


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        ("mean", [(np.log(9) + np.log(0.25)) / 3, np.log(7 / 3)]),
        (
            "pessimistic",
            [(np.log(9) + np.log(0.25)) / 3 - 2 * np.std([np.log(9), 0, np.log(0.25)]), np.log(7 / 3)],
        ),
        ("min", [np.log(0.25), np.log(7 / 3)]),
        ("median", [0, np.log(7 / 3)]),
    ],
)
def test_rules_of_an_ensemble_by_hand(rule, want):
    members = {name: fixed(SAID[:, k]) for k, name in enumerate("abc")}
    got = r.Ensemble(members, rule, pessimism=2.0)(many(2))
    np.testing.assert_allclose(logit(got[:, 0]), want, atol=1e-9)
    assert (got[:, 1:] == SAID).all()


def test_weights_bias_and_caution():
    members = {"a": fixed([0.9]), "b": fixed([0.2])}
    z = 0.5 * np.log(9) + 2 * np.log(0.25) + 0.3
    got = r.Ensemble(members, weights={"b": 2.0, "a": 0.5}, bias=0.3)(many(1))
    assert logit(got[0, 0]) == pytest.approx(z)
    spread = np.std([np.log(9), np.log(0.25)])
    careful = r.Ensemble(members, weights={"b": 2.0, "a": 0.5}, bias=0.3, caution=4.0)(many(1))
    assert logit(careful[0, 0]) == pytest.approx(z / np.sqrt(1 + spread**2 / 4))
    assert r.disagreement(careful[:, 1:]) == pytest.approx([spread])


def test_sure_members_stay_finite():
    got = r.Ensemble({"a": fixed([1.0, 0.0]), "b": fixed([0.5, 0.0])})(many(2))
    assert np.isfinite(got).all() and 0.99 < got[0, 0] < 1 and 0 < got[1, 0] < 1e-6


def test_impossible_ensembles_are_refused():
    for bad in ({}, {"a": fixed([1])}):
        with pytest.raises(ConfigError):
            r.Ensemble(bad, weights={"b": 1.0})
    with pytest.raises(ConfigError, match="Did you mean 'median'"):
        r.Ensemble({"a": fixed([1])}, "medean")


def test_a_member_that_is_no_number_is_named():
    with pytest.raises(RunError, match=r"Member 'b'.*gave nan for problem 'p0', step 1"):
        r.Ensemble({"a": fixed([0.5]), "b": fixed([np.nan])})(many(1))


def test_stacking_finds_the_weights_that_made_the_outcomes():
    n = 40_000
    u = uniforms(np.full(5 * n, stream("stacking"), np.uint64), np.arange(5 * n)).reshape(5, n)
    z = 3 * (u[:3] - 0.5)
    outcome = u[3] < expit(2 * z[0] + 0.5 * z[1] - 0.7)  # the third member is noise
    weights, bias = r.stack(expit(z).T, outcome, ridge=0.0)
    np.testing.assert_allclose([*weights, bias], [2, 0.5, 0, -0.7], atol=0.1)
    weights, _ = r.stack(expit(np.stack([z[0], -z[0]])).T, outcome)
    assert weights[0] > 1 and weights[1] == 0  # one that says the contrary is left out


# --- the channel at work --------------------------------------------------------------------------------


def steps_right(text: str) -> Verdict:
    """Eight steps; a wrong one is never mended."""
    lines = text.split()
    alive = "x" not in lines
    return Verdict(
        tuple(JudgedLine(line, "", alive) for line in lines), None, alive and len(lines) == 8, False
    )


def answered(algorithm, of: Problem, reward, alike: bool):
    """A policy whose steps are right with probability .72; ``alike``: all right steps are the same text."""
    request = algorithm.send(None)
    try:
        while True:
            u = uniforms(request.streams, request.ticks)
            children = [
                Node(n, [int(x < 0.72) if alike else int(x * 2**40)], "ok\n" if x < 0.72 else "x\n", finish="eos" * (n.step == 7))
                for n, x in zip(request.nodes, u, strict=True)
            ]  # fmt: skip
            asked = [c for c in children if request.scored is True or c.finished]
            for child, value in zip(
                asked, reward([Prefix(of, c, None) for c in asked]) if asked else (), strict=True
            ):  # type: ignore[arg-type]
                child.reward = float(value)
            request = algorithm.send(children)
    except StopIteration as end:
        return end.value


@cache
def accuracy(sigma: float, alike: bool, trials: int = 120) -> dict[str, float]:
    """How often the particle of the highest last reward is right: best-of-8, and a filter of 8."""
    right: dict[str, list[bool]] = {"best": [], "filter": []}
    config = smc.Filter(8, Potential("logit"), "multinomial", 1.0)
    for i in range(trials):
        of = Problem(f"q{i}", "", check=steps_right)
        reward = r.Exact(Noise(sigma=sigma))
        for name, algorithm in (
            ("best", searches.samples(Node(None), 8, Draws(0, of.id))),
            ("filter", smc.sweep(Node(None), config, Draws(0, of.id))),
        ):
            found = answered(algorithm, of, reward, alike)
            nodes = found if isinstance(found, list) else found.nodes
            right[name].append("x" not in max(nodes, key=lambda node: node.reward).solution)
    return {name: float(np.mean(found)) for name, found in right.items()}


def test_published_rates_of_noisy_filters_are_reproduced():
    """Simulated in the specification with noise of its own: .45 and .98 at sigma 1, .26 and .54 at sigma 4 (N = 8)."""
    quiet, loud = accuracy(1.0, alike=False), accuracy(4.0, alike=False)
    assert abs(quiet["best"] - 0.45) < 0.13 and quiet["filter"] > 0.93
    assert abs(loud["best"] - 0.26) < 0.12 and abs(loud["filter"] - 0.54) < 0.14


def test_particles_that_say_the_same_share_their_noise():
    """So noise does not average out over them: where right steps are one text, an unlucky score ends them all."""
    assert accuracy(4.0, alike=True)["filter"] < accuracy(4.0, alike=False)["filter"] - 0.1
