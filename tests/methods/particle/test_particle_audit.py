"""Audit logs: a replay computes every number again, and whatever was changed is found and named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_driver as lm
import toys

from reason.datasets.problems import Problem
from reason.errors import ConfigError, DataError
from reason.methods.particle import smc
from reason.methods.particle.audit import Recipe, Trail, replay, write
from reason.methods.particle.driver import Task
from reason.methods.particle.lineage import Node
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Draws, Halted
from reason.methods.particle.selection import Candidates

model = lm.model  # the fixture: a tiny language model behind the real cache
PROBLEM = Problem("p1", "what is it?", "7")
DRAWS = Draws(3, "p1")
MULTINOMIAL = smc.Filter(6, Potential("prob"), "multinomial", 1.0)
RECIPES = {
    "filter": Recipe("filter", smc.Filter(8, Potential("logit"), threshold=0.7), DRAWS),
    "importance": Recipe("filter", smc.Filter(8, Potential("prob"), threshold=0.0), DRAWS),
    "stratified": Recipe("filter", smc.Filter(8, Potential("prob"), "stratified", 1.0), DRAWS),
    "annealed": Recipe(
        "filter", smc.Filter(8, Potential("logit", 0.2), threshold=1.0, anneal="ess", length=5), DRAWS
    ),
    "islands": Recipe("islands", smc.Filter(5, Potential("ratio"), threshold=0.9), DRAWS, chains=3),
    "gibbs": Recipe("gibbs", replace(MULTINOMIAL, scheme="systematic"), DRAWS, sweeps=4),
    "ancestors": Recipe("gibbs", MULTINOMIAL, DRAWS, sweeps=4, ancestor_sampling=True),
    "tempering": Recipe("tempering", MULTINOMIAL, DRAWS, sweeps=5, temperatures=(4.0, 2.0, 1.0)),
    "tempered ancestors": Recipe(
        "tempering", MULTINOMIAL, DRAWS, sweeps=4, temperatures=(2.0, 1.0), ancestor_sampling=True
    ),
}


def run(recipe: Recipe, toy: toys.Toy | None = None) -> Trail:
    return (toy or toys.hidden_markov()).run(recipe.run(Node(None)))


@pytest.fixture
def log(tmp_path) -> Path:
    recipe = RECIPES["filter"]
    write(tmp_path / "audit.jsonl", PROBLEM, recipe, run(recipe), {"run": "r1"})
    return tmp_path / "audit.jsonl"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def save(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


def findings(path: Path) -> list[tuple[int, str]]:
    (found,) = replay(path)
    return [(f.line, f.what) for f in found.findings]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("toy", [toys.hidden_markov, toys.stopping])
def test_a_replay_is_exact(name, toy, tmp_path):
    recipe = RECIPES[name]
    trail = run(recipe, toy())
    write(tmp_path / "a", PROBLEM, recipe, trail, {"run": "r1"})
    (found,) = replay(tmp_path / "a")
    assert found.exact, found.findings
    assert found.recipe == recipe and found.about == {"run": "r1"} and found.problem["id"] == "p1"
    assert found.trail is not None and found.trail.swaps == trail.swaps
    for mine, theirs in zip(found.trail.chains, trail.chains, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a.log_weights == b.log_weights).all() and a.log_z == b.log_z and a.status == b.status
            assert [node.id for node in a.nodes] == [node.id for node in b.nodes]
            for x, y in zip(a.rounds, b.rounds, strict=True):
                assert (x.log_weights == y.log_weights).all() and x.ess == y.ess
                assert x.temperature == y.temperature
                assert (x.ancestors is None) == (y.ancestors is None)
                assert x.ancestors is None or y.ancestors is None or (x.ancestors == y.ancestors).all()


def test_resampling_splices_and_swaps_were_really_replayed(tmp_path):
    """The cases above are not empty: in each something happened that a replay has to find again."""
    rounds = [r for chain in run(RECIPES["annealed"]).chains for p in chain for r in p.rounds]
    assert any(r.temperature > 1 and r.ancestors is not None for r in rounds)
    spliced = [r for p in run(RECIPES["ancestors"]).chains[0] for r in p.rounds if r.spliced]
    assert any(
        r.ancestors is not None and r.ancestors[-1] != 5 for r in spliced
    )  # the reference was given another past
    assert {s.accepted for s in run(RECIPES["tempering"]).swaps} == {True, False}


def test_the_same_seed_and_configuration_give_the_same_log(tmp_path):
    recipe = RECIPES["tempering"]
    sums = [write(tmp_path / f"{i}", PROBLEM, recipe, run(recipe)) for i in range(2)]
    assert sums[0] == sums[1] and len(sums[0]) == 16
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    other = replace(recipe, draws=Draws(4, "p1"))
    assert write(tmp_path / "2", PROBLEM, other, run(other)) != sums[0]


def test_dead_and_halted_runs_are_replayed(tmp_path):
    toy = toys.hidden_markov()
    toy.reward = lambda path: 0.0
    recipe = replace(RECIPES["filter"], filter=smc.Filter(4, Potential("prob", clip=0.0)))
    dead = run(recipe, toy)
    assert dead.chains[0][0].status == "dead"
    write(tmp_path / "a", PROBLEM, recipe, dead)
    assert replay(tmp_path / "a")[0].exact
    for name in ("filter", "ancestors", "tempering", "islands"):
        for after in range(1, 12):
            toy, algorithm = toys.hidden_markov(), RECIPES[name].run(Node(None))
            request = next(algorithm)
            try:
                for _ in range(after):
                    request = algorithm.send(toy.answer(request))
                algorithm.throw(Halted("out of tokens"))
            except StopIteration as end:
                path = tmp_path / f"{name}-{after}"
                write(path, PROBLEM, RECIPES[name], end.value)
                found = replay(path)[0]
                assert found.exact, (name, after, found.findings)


def test_several_logs_in_one_file_and_a_torn_one(tmp_path):
    path = tmp_path / "audit.jsonl"
    for name in ("filter", "gibbs", "islands"):
        write(path, replace(PROBLEM, id=name), RECIPES[name], run(RECIPES[name]))
    assert [(r.problem["id"], r.exact) for r in replay(path)] == [
        ("filter", True),
        ("gibbs", True),
        ("islands", True),
    ]
    text = path.read_bytes()
    path.write_bytes(text[:-300])  # a kill tore the last write
    found = replay(path)
    assert [r.exact for r in found] == [True, True, False]
    assert any("torn" in f.what for f in found[2].findings) and any(
        "breaks off" in f.what for f in found[2].findings
    )
    write(path, replace(PROBLEM, id="next"), RECIPES["filter"], run(RECIPES["filter"]))
    found = replay(path)
    assert [r.problem["id"] for r in found if r.exact] == ["filter", "gibbs", "next"]


def numbered(rows, **where) -> int:
    return next(i for i, row in enumerate(rows) if all(row.get(k) == v for k, v in where.items()))


CHANGES = [
    ({"event": "node", "node": 3}, "r", 0.123, "g is"),
    ({"event": "particle", "t": 2, "slot": 4}, "g", -0.5, "g is -0.5"),
    ({"event": "particle", "t": 2, "slot": 4}, "after", -0.5, "after is -0.5"),
    ({"event": "particle", "t": 2, "slot": 4}, "before", -0.5, "before is -0.5"),
    ({"event": "particle", "t": 3, "slot": 1}, "W", 0.25, "W is 0.25"),
    ({"event": "particle", "t": 3, "slot": 1}, "stream", "0" * 16, "stream is"),
    ({"event": "round", "t": 2}, "ess", 8.0, "ess is 8.0"),
    ({"event": "sweep"}, "log_z", 0.0, "log_z is 0.0"),
    ({"event": "sweep"}, "status", "dead", "status is 'dead'"),
    ({"event": "node", "node": 3}, "tokens", [9], "id is"),
]


@pytest.mark.parametrize(
    ("where", "field", "value", "said"), CHANGES, ids=[f"{c[0]['event']} {c[1]}" for c in CHANGES]
)
@pytest.mark.parametrize("with_sums", [False, True])
def test_a_changed_number_is_found_and_named(log, where, field, value, said, with_sums):
    rows = lines(log)
    at = numbered(rows, **where)
    assert rows[at][field] != value
    rows[at][field] = value
    if with_sums:  # by somebody who knows how
        from reason.methods.particle.audit import _sum

        for before, row in zip([{}, *rows], rows, strict=False):
            row["sum"] = _sum(before.get("sum", ""), row)
    save(log, rows)
    found = findings(log)
    assert any(said in what for _, what in found), found
    if field not in ("r", "tokens"):
        assert found[0][0] == at + 1
    if not with_sums:
        assert any(line == at + 1 and "was changed" in what for line, what in found)


def test_a_changed_ancestor_is_found_and_named(log):
    rows = lines(log)
    t = next(row["t"] for row in rows if row["event"] == "round" and row["resampled"])
    at = numbered(rows, event="particle", t=t, slot=2)
    old = rows[at]["ancestor"]
    rows[at]["ancestor"] = (old + 1) % 8
    save(log, rows)
    what = [w for line, w in findings(log) if line == at + 1]
    assert f"particle sweep 0 chain 0 t {t} slot 2: ancestor is {(old + 1) % 8}, computed again {old}" in what


def test_changed_text_and_missing_added_and_swapped_lines(log):
    rows = lines(log)
    at = numbered(rows, event="node", node=5)

    def broken(some: list[dict]) -> list[tuple[int, str]]:
        save(log, some)
        return findings(log)

    assert broken(rows) == []
    told = broken([*rows[:at], {**rows[at], "text": "other"}, *rows[at + 1 :]])
    assert told == [(at + 1, "was changed (node node 5): its sum is that of another text")]
    round_ = numbered(rows, event="round", t=2)
    told = broken(rows[:round_] + rows[round_ + 1 :])
    assert (round_ + 1, f"is line {round_ + 2} of its log; line {round_ + 1} is missing or moved") in told
    assert any("round sweep 0 chain 0 t 2 is missing" in what for _, what in told)
    assert broken([*rows[: at + 1], rows[at], *rows[at + 1 :]])[0][0] == at + 2
    assert broken([*rows[:at], rows[at + 1], rows[at], *rows[at + 2 :]])[0][0] == at + 1
    assert broken(rows[:at])  # the rest is lost
    assert broken([*rows[:-1]])[-1][1].endswith("breaks off before its end")
    header = {**rows[0], "recipe": {**rows[0]["recipe"], "algorithm": "magic"}}
    assert any("cannot be replayed" in what for _, what in broken([header, *rows[1:]]))


def test_another_configuration_than_the_logged_one_is_found(log):
    rows = lines(log)
    for key, value in (("threshold", 0.1), ("scheme", "multinomial"), ("particles", 7)):
        changed = json.loads(json.dumps(rows))
        changed[0]["recipe"]["filter"][key] = value
        save(log, changed)
        found = findings(log)
        told = ("computed again", "another way", "cannot be replayed")
        assert any(some in what for _, what in found for some in told), key
    changed = json.loads(json.dumps(rows))
    changed[0]["recipe"]["draws"]["seed"] = 4
    save(log, changed)
    assert any(": stream is" in what for _, what in findings(log))


def test_rewards_absent_and_members_survive(tmp_path):
    recipe = replace(RECIPES["filter"], filter=smc.Filter(4, Potential("self_certainty"), threshold=1.0))
    toy = toys.hidden_markov()
    toy.reward = lambda path: math.nan
    trail = run(recipe, toy)
    trail.chains[0][0].nodes[0].members = (0.25, math.nan)
    write(tmp_path / "a", PROBLEM, recipe, trail)
    assert "NaN" not in (tmp_path / "a").read_text() and "Infinity" not in (tmp_path / "a").read_text()
    (found,) = replay(tmp_path / "a")
    assert found.exact and found.trail is not None
    node = found.trail.chains[0][0].nodes[0]
    assert node.members[0] == 0.25 and math.isnan(node.members[1]) and math.isnan(node.reward)


def test_the_answer_is_told(tmp_path):
    recipe = RECIPES["filter"]
    trail = run(recipe)
    candidates = Candidates.of_populations([trail.chains[0][0]])
    answer = candidates.answer(0, candidates.select("argmax_last"))
    write(tmp_path / "a", PROBLEM, recipe, trail, answer=("argmax_last", answer))
    (found,) = replay(tmp_path / "a")
    assert found.exact and found.answer is not None and answer.node is not None
    assert found.answer["id"] == answer.node.id and found.answer["rule"] == "argmax_last"


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        replay(tmp_path / "no")
    (tmp_path / "empty").write_text("\n{}\n[1]\nx\n")
    with pytest.raises(DataError, match="no audit log"):
        replay(tmp_path / "empty")
    with pytest.raises(ConfigError, match="gibbs"):
        Recipe("gibs", MULTINOMIAL, DRAWS)


def test_sizes_are_modest(log):
    """About 0.3 kB and the text for a particle and a step."""
    rows = lines(log)
    particles = sum(row["event"] == "particle" for row in rows)
    assert log.stat().st_size / particles < 700
    assert np.isfinite([row["W"] for row in rows if row["event"] == "particle"]).all()


def test_runs_of_a_language_model_are_replayed(model, tmp_path):
    """Through the driver, the cache and the splices of a real decoder; several problems at once, one cut short."""
    path = tmp_path / "audit.jsonl"
    names = ("filter", "ancestors", "tempered ancestors", "islands")
    recipes = [replace(RECIPES[name], draws=Draws(1, f"p{i}")) for i, name in enumerate(names)]
    tasks = [Task(lm.problem(i), lm.prompt(i), recipe.run, key=recipe) for i, recipe in enumerate(recipes)]
    tasks[3] = replace(tasks[3], budget=25)
    for outcome in lm.driver(model).run(tasks):
        write(path, outcome.task.problem, outcome.task.key, outcome.result)
    found = {r.problem["id"]: r for r in replay(path)}
    assert len(found) == 4 and all(r.exact for r in found.values()), [r.findings for r in found.values()]
    assert found["p3"].trail is not None
    assert {p[0].status for p in found["p3"].trail.chains} == {"out of tokens"}
