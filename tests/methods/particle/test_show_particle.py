"""Figures of a solved problem: they say what happened, on runs of which it is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from arithmetic_toy import Policy, problem

from reason.datasets.problems import Problem
from reason.methods.figures import Figure, Lines, Table, Tree, as_dict
from reason.methods.particle import smc
from reason.methods.particle.audit import Recipe, replay, write
from reason.methods.particle.lineage import Node, Population, Round
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Draws
from reason.methods.particle.selection import Candidates
from reason.methods.particle.show import figures
from reason.methods.particle.traces import trace

ROOT = Node(None)
ASKED, SUM = problem()


def solved(particles: int = 12, seed: int = 0, sigma: float = 1.0, **more):
    recipe = Recipe(
        "filter", smc.Filter(particles, Potential("ratio"), threshold=0.7), Draws(seed, "p"), **more
    )
    return recipe, Policy(SUM, sigma=sigma).run(recipe.run(Node(None)))


def shown(found: list[Figure]) -> dict[str, Figure]:
    return {figure.title: figure for figure in found}


def tree_of(found: list[Figure]) -> Tree:
    tree = shown(found)["Lineage"]
    assert isinstance(tree, Tree)
    return tree


@pytest.mark.parametrize("seed", range(8))
def test_the_tree_holds_all_survivors_and_adds_up(seed):
    population = solved(seed=seed)[1].chains[0][0]
    tree = tree_of(figures(ASKED, [population]))
    n = len(tree.parents)
    assert n == len(tree.labels) == len(tree.values) == len(tree.counts) == len(tree.marks)
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert tree.counts[0] == 12 and tree.labels[0] == SUM.question
    living = [node for node in range(1, n) if tree.counts[node]]
    leaves = [node for node in living if not any(tree.parents[c] == node and tree.counts[c] for c in living)]
    assert sum(tree.counts[node] for node in leaves) == 12
    for node in [0, *living]:
        below = sum(tree.counts[c] for c in living if tree.parents[c] == node)
        assert below in (0, tree.counts[node])

    def text(node: int) -> str:
        return text(tree.parents[node]) + tree.labels[node] + "\n" if node else ""  # without the question

    assert sorted(text(node) for node in leaves) == sorted(node.solution for node in set(population.nodes))
    weights = [float(tree.marks[node].split("weight ")[1].split(",")[0]) for node in leaves]
    assert sum(weights) == pytest.approx(1.0, abs=0.006 * len(leaves))
    for node in leaves:
        answer = tree.labels[node].removeprefix("answer ")
        assert tree.marks[node].startswith(f"{answer} {'right' if answer == str(SUM.answer) else 'wrong'}")


def node(parent: Node, text: str, reward: float = 0.5, finish: str = "") -> Node:
    return Node(parent, tuple(text.encode()), text, reward=reward, finish=finish)


def test_where_the_right_answer_died_is_marked():
    """Two particles: the right prefix is dropped in the first round."""
    right, slip = node(ROOT, "7+5=12\n", 0.2), node(ROOT, "7+5=13\n", 0.9)
    worse = [node(slip, f"13*3={r}\n", 0.8) for r in (39, 40)]
    end = [node(w, "answer 1\n", 0.7, "eos") for w in worse]
    flat = np.zeros(2)
    rounds = (
        Round((right, slip), np.log([0.2, 0.9]), 1.5, 1.0, np.array([1, 1])),
        Round(tuple(worse), flat, 2.0), Round(tuple(end), flat, 2.0),
    )  # fmt: skip
    found = figures(ASKED, [Population(tuple(end), flat, 0.0, rounds)])
    tree = tree_of(found)
    at = dict(zip(tree.labels, tree.marks, strict=True))
    assert at["7+5=12"] == "dropped, though right"  # the slip could still be mended
    assert at["7+5=13"] == "the right answer died here, 2 copies"
    assert "died in round 2: every chunk that followed was wrong" in tree.note
    assert "All that are left share 1 step." in tree.note
    lines = shown(found)["Effective size and ancestors"]
    assert isinstance(lines, Lines)
    assert lines.series == {
        "ESS": [1.5, 2.0, 2.0],
        "continued": [1.0, 2.0, 2.0],
        "ancestors": [1.0, 1.0, 1.0],
    }


def test_rewards_of_right_prefixes_lie_above_those_of_wrong_ones():
    clear = shown(figures(ASKED, solved(64, sigma=0.0)[1].chains[0]))["Reward against correctness"]
    assert isinstance(clear, Lines)
    for right, wrong in zip(clear.series["right so far"], clear.series["wrong"], strict=True):
        assert right is None or right == pytest.approx(1 / (1 + math.exp(-2)))
        assert wrong is None or wrong == pytest.approx(1 / (1 + math.exp(2)))
    assert "in 100% of pairs" in clear.note


def test_problems_without_a_judge_of_steps_and_without_an_answer():
    population = solved(seed=3)[1].chains[0]
    outcome = shown(figures(replace(ASKED, check=None), population))
    assert set(outcome["Reward against correctness"].series) == {"led to the right answer", "did not"}  # type: ignore[union-attr]
    assert not any("though" in mark or "from here" in mark for mark in outcome["Lineage"].marks)  # type: ignore[union-attr]
    mute = shown(figures(Problem("p", SUM.question), population))
    assert "Reward against correctness" not in mute
    assert not any(word in mark for mark in mute["Lineage"].marks for word in ("right", "wrong"))  # type: ignore[union-attr]
    assert all(row[-1] == "" for row in mute["Answers"].rows)  # type: ignore[union-attr]


def test_the_chosen_answer_stands_in_the_table():
    population = solved(seed=1, sigma=3.0)[1].chains[0]
    for rule in ("weighted_vote", "argmax_last", "sample", "oracle", "majority", "argmax_orm"):
        table = shown(figures(ASKED, population, rule))["Answers"]
        assert isinstance(table, Table)
        assert sum(row[0].endswith("(chosen)") for row in table.rows) == 1
        assert sum(row[2] for row in table.rows) == pytest.approx(1.0)
        assert f"Chosen by {rule}" in table.note


def test_many_sweeps_islands_and_halted_runs():
    config = smc.Filter(6, Potential("prob"), "multinomial", 1.0)
    gibbs = Recipe("gibbs", config, Draws(0, "p"), sweeps=3)
    populations = Policy(SUM).run(gibbs.run(Node(None))).chains[0]
    found = shown(figures(ASKED, populations))
    assert "Sweeps begin at rounds 1, " in found["Effective size and ancestors"].note
    assert sum(row[1] for row in found["Answers"].rows) == 18  # type: ignore[union-attr]
    islands = Recipe("islands", config, Draws(0, "p"), chains=2)
    chains = Policy(SUM).run(islands.run(Node(None))).chains
    assert figures(
        ASKED, [c[0] for c in chains], pool=smc.pooled([c[0] for c in chains], [c[0].log_z for c in chains])
    )
    whole = populations[0]
    early = replace(whole, nodes=whole.rounds[1].nodes, rounds=whole.rounds[:2], status="out of tokens")
    found = shown(figures(ASKED, [early]))
    assert "It ended: out of tokens." in found["Lineage"].note
    assert any(mark.startswith("unfinished") for mark in found["Lineage"].marks)  # type: ignore[union-attr]
    assert "No answer" in found["Answers"].note
    dead = replace(whole, log_weights=np.full(6, -np.inf), status="dead")
    assert "No answer" in shown(figures(ASKED, [dead]))["Answers"].note


def test_a_large_tree_is_cut_to_what_lived():
    tree = tree_of(figures(ASKED, solved(128)[1].chains[0]))
    assert any(label.startswith("all ") for label in tree.labels)
    assert sum(count == 0 for count in tree.counts) < 128 < sum(count > 0 for count in tree.counts) + 64


def test_figures_are_json_and_a_replayed_log_shows_the_same(tmp_path):
    recipe, trail = solved()
    drawn = figures(ASKED, trail.chains[0])
    for figure in drawn:
        assert (
            type(figure)(**{k: v for k, v in json.loads(json.dumps(as_dict(figure))).items() if k != "kind"})
            == figure
        )
    write(tmp_path / "a", ASKED, recipe, trail)
    again = replay(tmp_path / "a")[0].trail
    assert again is not None and figures(ASKED, again.chains[0]) == drawn


@pytest.mark.parametrize("seed", range(3))
def test_a_trace_is_the_lineage_as_plain_data(seed):
    population = solved(seed=seed)[1].chains[0][0]
    candidates = Candidates.of_populations([population])
    told = json.loads(
        json.dumps(trace(ASKED, population, candidates.answer(0, candidates.select("majority"))))
    )
    spans = told["spans"]
    assert all(span["parent"] < i for i, span in enumerate(spans))
    for span in spans:
        before = spans[span["parent"]]["end"] if span["parent"] >= 0 else 0
        assert span["start"] == before and span["end"] - before == len(span["text"])
    ends = [span for span in spans if "weight" in span["attributes"]]
    assert sum(span["attributes"]["weight"] for span in ends) == pytest.approx(1.0)
    assert sum(span["attributes"]["descendants"] for span in ends) == 12
    roots = [span for span in spans if span["parent"] < 0]
    assert sum(span["attributes"]["descendants"] for span in roots) == 12
    assert told["tokens"] == max(span["end"] for span in spans)
    assert told["inputs"] == {"problem": SUM.question} and told["outputs"]["answer"] == str(SUM.answer)
