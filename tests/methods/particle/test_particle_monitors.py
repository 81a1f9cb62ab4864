"""Each monitor on a population that trips it and one that does not; who descends from whom, on trees drawn by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import toys

from reason.datasets.arithmetic import Sum, check
from reason.datasets.problems import Problem
from reason.methods.particle import genealogy, smc
from reason.methods.particle.lineage import Node, Population, Round
from reason.methods.particle.monitors import MONITORS, loops, readings
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Draws
from reason.methods.particle.resampling import effective_size, normalized

ROOT = Node(None)


def node(parent: Node | None = ROOT, text: str = "x\n", reward: float = 0.5, finish: str = "") -> Node:
    return Node(parent, tuple(text.encode()), text, reward=reward, finish=finish)


def round_(nodes, weights=None, ancestors=None) -> Round:
    logs = np.log(np.array(weights if weights is not None else [1.0] * len(nodes)))
    kept = None if ancestors is None else np.array(ancestors)
    return Round(tuple(nodes), logs, effective_size(normalized(logs)), 1.0, kept)


def healthy(n: int = 16) -> Population:
    """Sound in every respect: several steps, spread weights, answers, and rewards that do not follow length."""
    rng = np.random.default_rng(3)
    first = [node(text=f"{i}+1=2\n", reward=rng.uniform(0.3, 0.7)) for i in range(n)]
    second = [node(a, f"{i}*{'3' * (i % 3 + 1)}=6\n", rng.uniform(0.3, 0.7)) for i, a in enumerate(first)]
    last = [node(b, "answer 6\n", 0.5 + 0.01 * (i % 2), "eos") for i, b in enumerate(second)]
    kept = [i // 2 * 2 for i in range(n)]
    rounds = (round_(first), round_(second, ancestors=None), round_(last))
    rounds = (replace(rounds[0], ancestors=np.array(kept)), *rounds[1:])
    return Population(tuple(last), np.zeros(n), 0.0, rounds)


def ending(text: str, reward: float = 0.5, finish: str = "eos", n: int = 16) -> Population:
    """The healthy one, with other ends."""
    p = healthy(n)
    ends = tuple(node(old.parent, text, reward, finish) for old in p.nodes)
    return replace(p, nodes=ends, rounds=(*p.rounds[:-1], round_(ends)))


def alarms(p: Population, **more) -> list[str]:
    return [r.name for r in readings(p, **more) if r.alarm]


def test_a_healthy_population_raises_no_alarm():
    found = readings(healthy())
    assert not [r for r in found if r.alarm]
    assert all(r.value is not None for r in found if r.name != "round with one ancestor left")
    assert len({r.name for r in found}) == len(found) == 8


def test_effective_size_must_be_low_twice_in_a_row():
    p, low = healthy(), [1.0] + [1e-9] * 15
    once = replace(p, rounds=(p.rounds[0], round_(p.rounds[1].nodes, low), p.rounds[2]))
    assert "effective size" not in alarms(once)
    twice = replace(once, rounds=(p.rounds[0], once.rounds[1], round_(p.rounds[2].nodes, low)))
    assert alarms(twice) == ["effective size"]
    assert readings(twice)[0].value == pytest.approx(1 / 16)
    apart = replace(once, rounds=(round_(p.rounds[0].nodes, low), *p.rounds[1:]))
    assert "effective size" not in alarms(apart)


def test_two_sweeps_are_not_neighbours():
    p, low = healthy(), [1.0] + [1e-9] * 15
    first = (*p.rounds[:2], round_(p.rounds[2].nodes, low))
    second = (round_(p.rounds[0].nodes, low), *p.rounds[1:])
    assert "effective size" not in alarms(replace(p, rounds=first + second))


def test_one_ancestor_before_half_of_the_length():
    p = healthy()
    lone = replace(p, rounds=(replace(p.rounds[0], ancestors=np.zeros(16, int)), *p.rounds[1:]))
    lone = replace(lone, rounds=(lone.rounds[0], round_([p.rounds[0].nodes[0]] * 16), p.rounds[2]))
    assert alarms(lone) == ["round with one ancestor left"]
    assert readings(lone)[1].value == 1.0 and readings(lone)[1].limit == 1.5
    assert not alarms(lone, length=2)  # half of it is 1
    single = Population(p.nodes[:1], np.zeros(1), 0.0, (round_(p.nodes[:1]),))
    assert readings(single)[1].value is None


def test_saturated_rewards():
    p = healthy()
    for step in genealogy.written(p):
        step.reward = 0.9999 if step.step % 2 else 1e-5
    assert alarms(p) == ["saturated rewards"]
    for step in p.rounds[0].nodes:
        step.reward = 0.5
    assert not alarms(p)


def test_rewards_that_follow_length():
    p = healthy()
    for end in p.nodes:
        end.reward = end.length / 40
    assert "reward follows length" in alarms(p)
    few = Population(p.nodes[:7], np.zeros(7), 0.0, tuple(round_(r.nodes[:7]) for r in p.rounds))
    assert readings(few)[3].value is None
    for end in p.nodes:
        end.reward = math.nan
    assert readings(p)[3].value is None and "reward follows length" not in alarms(p)


def test_loops_cuts_and_missing_answers():
    loop = ending("1-1=0 " * 5 + "\nanswer 0\n")
    assert alarms(loop) == ["in a loop"]
    assert alarms(ending("answer 6\n", finish="length")) == ["cut off"]
    assert alarms(ending("so it is 6\n")) == ["without an answer"]
    unfinished = ending("6*7=", finish="")
    assert alarms(unfinished) == ["cut off"]
    assert readings(unfinished)[-1].value is None


@pytest.mark.parametrize(
    ("tokens", "is_loop"),
    [
        ([], False), ([1], False), ([1] * 11, False), ([1] * 12, True), ([1, 2] * 5, False), ([1, 2] * 6, True),
        ([*range(50)], False), ([9, 9, *[1, 2, 3] * 4, 7], True), ([*range(16)] * 4, True), ([*range(17)] * 4, False),
        ([1, 2, 3, 4, 5, 6, 7] * 3, False), ([1, 2, 3, 4, 5, 6, 7] * 4, True),
    ],
)  # fmt: skip
def test_a_loop_is_four_times_the_same(tokens, is_loop):
    assert loops(tokens) is is_loop


def test_contested():
    p = healthy()
    ends = list(p.nodes)
    ends[0] = node(ends[0].parent, "answer 7\n", 0.9, "eos")
    other = replace(p, nodes=tuple(ends), rounds=(*p.rounds[:-1], round_(ends)))
    assert alarms(other) == ["contested"]


def test_the_readings_of_a_sweep_that_died():
    toy = toys.hidden_markov()
    toy.reward = lambda path: 0.0
    dead = toy.run(smc.sweep(ROOT, smc.Filter(4, Potential("prob", clip=0.0)), Draws(0, "p")))
    assert dead.status == "dead"
    assert {r.name for r in readings(dead) if r.alarm} >= {"saturated rewards", "cut off"}


# --- who descends from whom ---------------------------------------------------------------------------


def test_sweeps_are_told_apart():
    toy = toys.stopping()
    config = smc.Filter(6, Potential("prob"), "multinomial", 1.0)
    for seed in range(10):
        populations = toy.run(smc.gibbs(ROOT, config, Draws(seed, "p"), 4))
        pooled = smc.pooled(populations)
        assert [tuple(s) for s in genealogy.split_sweeps(pooled.rounds)] == [p.rounds for p in populations]


def test_common_ancestors():
    a, b = node(), node()
    a1, a2 = node(a), node(a)
    deep = node(a1)
    assert genealogy.coalescence([a1, a2]) == 1
    assert genealogy.coalescence([a1, deep]) == 2
    assert genealogy.coalescence([a1, b]) == 0
    assert genealogy.coalescence([a1, a1]) == 2
    assert genealogy.coalescence([]) == 0


SUM = Sum(7, (("+", 5), ("*", 3)), 97)  # 7+5=12, 12*3=36
PROBLEM = Problem("p", SUM.question, "36", check=lambda text: check(SUM, text))


def test_where_the_right_answer_died():
    alive = genealogy.alive_by_check(PROBLEM)
    good, slip = node(text="7+5=12\n"), node(text="7+5=13\n")
    lost = [round_([good, slip], ancestors=[1, 1])]
    mended, wrong = node(slip, "redo 7+5=12\n"), node(slip, "13*3=39\n")
    assert genealogy.extinction(lost, alive) is None  # a slip can be mended
    died = genealogy.extinction([*lost, round_([mended, wrong], ancestors=[1, 1])], alive)
    assert died == genealogy.Extinction(2, "dropped", (mended,))
    died = genealogy.extinction([*lost, round_([wrong, wrong])], alive)
    assert died == genealogy.Extinction(2, "written", (slip,))
    right = node(node(good, "12*3=36\n"), "answer 36\n", finish="eos")
    assert (
        genealogy.extinction(
            [round_([good, slip]), round_([right.parent, wrong]), round_([right, wrong])], alive
        )
        is None
    )


def test_where_it_died_without_a_judge_of_steps():
    first, other = node(), node(text="y\n")
    right, wrong = node(first, "answer 36\n", finish="eos"), node(other, "answer 7\n", finish="eos")
    rounds = [round_([first, other]), round_([right, wrong], ancestors=[1, 1])]
    alive = genealogy.alive_by_outcome([first, other, right, wrong], lambda n: "36" in n.text)
    assert genealogy.extinction(rounds, alive) == genealogy.Extinction(2, "dropped", (right,))
    assert alive(first) and not alive(other)


def test_every_monitor_has_its_reading_in_order():
    for population in (healthy(), ending("none\n")):
        assert tuple(reading.name for reading in readings(population)) == MONITORS
