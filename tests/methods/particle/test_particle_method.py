"""Runs of ``particle``: its stages, what it is judged beside, what it refuses, and how it answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.feather as feather
import pytest
import torch

from reason.engine import runner
from reason.engine.config import resolve
from reason.engine.parallel import World
from reason.engine.session import Session, load_dataset, open_run
from reason.engine.stages import source_digests
from reason.engine.worker import work
from reason.errors import ConfigError, DataError
from reason.methods.particle import audit
from reason.methods.particle.allocation import settled, sizes
from reason.methods.particle.lineage import Node, Population

SUMS = [
    "dataset=arithmetic", "dataset.modulus=5", "dataset.largest=4", "dataset.least=1", "dataset.most=2",
    "dataset.train_documents=200", "dataset.valid_documents=12", "dataset.test_documents=10", "dataset.slip=0.2",
    "backbone.hidden=32", "backbone.heads=2", "backbone.kv_heads=1", "backbone.ffn=48", "backbone.layers=2",
    "backbone.context=64", "particle.length=24", "particle.steps=6", "eval.resamples=100", "eval.latency_samples=0",
    "hardware.threads=1", "hardware.device=cpu",
]  # fmt: skip
POLICY = [
    "particle.stage=policy", "backbone.source=", "particle.reward.kind=constant", "particle.reward.source=", "depth=1",
    "particle.rivals=", "particle.record=0", "train.steps=80", "train.batch_size=16", "train.lr=0.005",
]  # fmt: skip
EXACT = ["particle.reward.kind=exact", "particle.reward.source="]


def execute(*words: str):
    return _executed(resolve("particle", [*SUMS, *words], environ={}))


def _executed(plan):
    folder = runner.prepare(plan, load_dataset(plan).digest)
    work({"folder": str(folder.path), "device": "cpu", "quiet": True})
    assert folder.result
    return folder


def session(*words: str) -> Session:
    Path("work").mkdir(exist_ok=True)
    return Session.begin(
        resolve("particle", [*SUMS, *words], environ={}), World(0, 1, torch.device("cpu")), Path("work")
    )


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A policy, and a value head on its states. Their folders."""
    runs = tmp_path_factory.mktemp("stages") / "runs"
    policy = execute(*POLICY, f"runs={runs}")
    value = execute(
        "particle.stage=value", f"backbone.source=run:{policy.path}", "particle.reward.kind=constant",
        "particle.reward.source=", "depth=1", "particle.rivals=", "particle.record=0", "particle.value.problems=40",
        "particle.value.solutions=3", "train.epochs=3", f"runs={runs}",
    )  # fmt: skip
    return policy, value


@pytest.fixture
def policy(stages):
    return f"backbone.source=run:{stages[0].path}"


@pytest.fixture
def value(stages):
    return f"particle.reward.source=run:{stages[1].path}"


def rows(folder, split="test", depth=4):
    return feather.read_table(folder / f"rows/{split}-depth{depth}.arrow")


def test_the_policy_learns_and_the_value_head_reads_its_states(stages, policy, value):
    trained, head = stages
    assert trained.result.training.parameters == head.result.params_m * 1e6 - head.result.training.parameters
    best = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [p["value"] for p in best if p.get("key", p.get("name")) == "train/loss"]
    assert losses[-1] < losses[0] / 2
    told = json.loads((head / "value.json").read_text())
    assert len(told["seen"]) == 40 and told["width"] == 32
    folder = execute(policy, value, "depth=4")
    result = folder.result
    assert [judged.depth for judged in result.curve] == [1, 2, 4] and result.training is None
    assert set(result.baselines) == {"greedy", "commonest answer"}
    for judged in result.curve:
        assert {"best-of-n", "self-consistency", "weighted best-of-n", "beam search", "DVTS", "oracle", "one sample",
                "best-of-n at equal tokens"} <= set(judged.rivals)  # fmt: skip
        assert judged.rivals["oracle"].accuracy.value >= judged.rivals["best-of-n"].accuracy.value
    fitted = json.loads((folder / "calibration.json").read_text())["fitted"]
    alarms = {name: rate for name, rate in result.curve[-1].overall.items() if name.startswith("alarm ")}
    assert (
        len(alarms) == 8 and all(0 <= rate <= 1 for rate in alarms.values()) and not result.curve[0].overall
    )
    assert fitted["reward"]["kind"] == "platt" and fitted["steps"] > 1


def test_one_particle_is_the_first_sample(policy):
    folder = execute(policy, *EXACT, "depth=2", "particle.rivals=samples")
    one = rows(folder, depth=1)
    assert one["exact"].to_pylist() == one["best-of-n"].to_pylist() == one["one sample"].to_pylist()
    judged = folder.result.curve[0]
    assert judged.cost["tokens"] == judged.rivals["best-of-n"].cost["tokens"]
    assert judged.cost["tokens"] == sum(one["tokens"].to_pylist())


def test_samples_at_equal_tokens_cost_what_the_filter_costs(policy):
    judged = execute(policy, *EXACT, "depth=4", "particle.rivals=samples").result.curve[-1]
    equal, filter_ = judged.rivals["best-of-n at equal tokens"].cost["tokens"], judged.cost["tokens"]
    assert abs(equal - filter_) / filter_ < 0.15
    assert judged.rivals["one sample"].cost["tokens"] == judged.rivals["self-consistency"].cost["tokens"] / 4
    assert judged.rivals["self-consistency"].cost["judged"] == 0 < judged.rivals["best-of-n"].cost["judged"]


def test_the_audit_log_of_a_run_replays_exactly_and_repeats_itself(policy):
    words = (
        policy,
        *EXACT,
        "particle.reward.noise.sigma=1",
        "depth=4",
        "particle.rivals=",
        "particle.record=3",
    )
    first, second = execute(*words), execute(*words)
    logs = audit.replay(first / audit.FILE)
    assert len(logs) == 3 and all(log.exact for log in logs)
    assert (first / audit.FILE).read_bytes() == (second / audit.FILE).read_bytes()
    other = execute(*words, "seed=1")
    assert (other / audit.FILE).read_bytes() != (first / audit.FILE).read_bytes()


@pytest.mark.parametrize("algorithm", ["islands", "adaptive", "gibbs", "tempering"])
def test_every_algorithm_runs_and_replays(policy, algorithm):
    folder = execute(
        policy, *EXACT, "particle.reward.noise.sigma=1", "depth=4", f"particle.algorithm={algorithm}", "particle.sweeps=2",
        "particle.chains=2", "particle.start=2", "particle.rivals=", "particle.record=2", "eval.limit=4",
    )  # fmt: skip
    assert all(log.exact for log in audit.replay(folder / audit.FILE))
    assert folder.result.curve[-1].depth == 4


def test_adaptive_particles_cost_less_and_a_confidence_of_one_costs_all(policy):
    words = (
        policy,
        *EXACT,
        "depth=8",
        "eval.curve=false",
        "particle.rivals=",
        "particle.algorithm=adaptive",
        "particle.start=2",
    )
    sure, all_ = (execute(*words, f"particle.confidence={c}") for c in (0.6, 1))
    assert sure.result.curve[0].cost["tokens"] < 0.9 * all_.result.curve[0].cost["tokens"]


def test_sizes_of_islands():
    assert (
        sizes(32, 4) == [4, 4, 8, 16] and sizes(6, 4) == [4, 2] and sizes(3, 4) == [3] and sizes(1, 1) == [1]
    )


def population(answers: list[str], apart: bool = True) -> Population:
    root = Node(None)
    shared = Node(root, (1,), "a\n")
    nodes = tuple(
        Node(Node(root, (i,), "a\n") if apart else shared, (9,), f"answer {a}", finish="eos")
        for i, a in enumerate(answers)
    )
    return Population(nodes, np.zeros(len(nodes)), 0.0)


def test_an_answer_is_settled_by_independent_votes_alone():
    assert settled(population(["1"] * 4)) == pytest.approx(1 - 0.5**5)
    assert settled(population(["1"] * 4, apart=False)) == pytest.approx(1 - 0.5**2)
    assert settled(population(["1", "2"])) == pytest.approx(0.5)
    assert settled(population(["1", "1", "2", "3"])) < 0.6


def test_a_value_head_belongs_to_its_policy(stages, value, tmp_path):
    other = execute(*POLICY, "seed=1")
    with pytest.raises(ConfigError, match="another policy"):
        session(f"backbone.source=run:{other.path}", value, "depth=2")


def test_a_reward_that_has_seen_the_test_is_refused(stages, policy, value):
    head = json.loads((stages[1] / "value.json").read_text())
    s = session(policy, value, "depth=2")
    seen = {p.fingerprint for p in s.ctx.data.test}
    assert not seen & set(head["seen"])
    from reason.methods.particle import network

    with pytest.MonkeyPatch.context() as m:
        source = network.opened_value(s.plan.config.particle.reward.source)
        object.__setattr__(source, "seen", frozenset(seen))
        m.setattr("reason.methods.particle.solver.opened_value", lambda *_: source)
        with pytest.raises(ConfigError, match="would be tested on"):
            s.method.check(s.ctx, s.network)
    network.opened_value.cache_clear()


def test_the_digests_of_stages_are_theirs(stages, policy, value):
    digests = source_digests(resolve("particle", [*SUMS, policy, value], environ={}))
    assert set(digests) == {"backbone.source", "particle.reward.source"}
    assert digests["particle.reward.source"] != digests["backbone.source"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["particle.temperature=0"], "copies never part"),
        (["particle.algorithm=gibbs", "depth=1"], "2 particles or more"),
        (["particle.reward.kind=value", "particle.reward.source="], "needs a value head"),
        (["particle.reward.kind=prm"], "needs a reward model"),
        (["particle.reward.kind=vlaue"], "Did you mean 'value'"),
        (["particle.reward.kind=exact,exact"], "each once"),
        (["particle.reward.kind=certainty", "particle.reward.noise.sigma=1"], "makes the exact judge worse"),
        (["particle.reward.noise.sigma=-1"], "must not be below 0"),
        (["particle.tau=0"], "must be above 0"),
        (["particle.threshold=2"], "share of the particles"),
        (["particle.rivals=beams"], "Did you mean 'beam'"),
        (["particle.burn_in=4", "particle.algorithm=gibbs"], "leaves none"),
        (["particle.algorithm=tempering", "particle.chains=1"], "2 chains or more"),
        (["particle.algorithm=gibbs", "particle.ancestor_sampling=true", "particle.resampling=systematic"], "does not allow"),
        (["particle.budget.money=1"], "price of a million"),
        (["particle.budget.tokens=-1"], "must not be below 0"),
        (["particle.confidence=0.4"], "above 0.5"),
        (["particle.stage=value", "backbone.source="], "names none"),
        (["particle.server.url=http://localhost:1"], "needs both"),
        (["particle.server.url=http://localhost:1", "particle.server.tokenizer=a/b", "backbone.source=a/b"], "both name a policy"),
        (["particle.reward.prm.source=a/b", "particle.reward.kind=prm", "particle.reward.prm.aggregation=min", "particle.potential=logit"], "repeats the scores"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_loaded(words, message):
    with pytest.raises(ConfigError, match=message) as refused:
        resolve("particle", words, environ={})
    assert refused.value.hint or len(refused.value.message) > 20


def test_problems_without_answers_cannot_be_judged(policy, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"problem": f"({i}+1) mod 5"}) + "\n" for i in range(40)))
    with pytest.raises(DataError, match="None of the test problems has an answer"):
        words = (policy, "particle.reward.kind=constant", "particle.reward.source=", f"dataset={file}")
        plan = resolve("particle", [*[w for w in SUMS if not w.startswith("dataset")], *words], environ={})
        s = Session.begin(plan, World(0, 1, torch.device("cpu")), tmp_path)
        s.method.check(s.ctx, s.network)


def test_answers_to_requests(policy, stages):
    folder = execute(
        policy, *EXACT, "particle.reward.kind=certainty", "depth=4", "eval.curve=false", "particle.rivals="
    )
    loaded = open_run(folder)
    asked = [
        {"problem": "(1+2) mod 5", "answer": 3}, {"problem": "(1+2) mod 5"}, {"problem": "(1+2) mod 5", "seed": 5},
        {"problem": "(4*2) mod 5", "depth": 1}, {"problem": "(4*2+1) mod 5", "budget": 3},
        {"problem": ""}, {"problem": "x", "depht": 2}, {"problem": "x", "depth": 0}, "x", {"problem": "1" * 80},
    ]  # fmt: skip
    replies = loaded.predict(asked)
    first, again, other, one, capped, *bad = replies
    assert other["particles"] == 4
    assert first["right"] in (True, False) and first["particles"] == 4 and first["tokens"] > 0
    assert {k: v for k, v in first.items() if k != "right"} == again
    assert 0 <= first["mass"] <= 1 and one["particles"] == 1
    assert capped["status"] == "out of tokens" and capped["tokens"] <= 3 + 4
    assert all("error" in reply for reply in bad)
    assert "Did you mean 'depth'" in bad[1]["error"] and "82 tokens" in bad[-1]["error"]
    assert len(loaded.inspect("")) >= 4 and loaded.inspect('{"problem": "(1+2) mod 5"}')
    with pytest.raises(DataError, match="no problem"):
        loaded.inspect("nobody")


def test_time_and_money_end_a_call_with_what_there_is(policy):
    words = (
        policy,
        *EXACT,
        "particle.reward.kind=certainty",
        "depth=4",
        "eval.curve=false",
        "particle.rivals=",
        "eval.limit=2",
    )
    poor = open_run(execute(*words, "particle.budget.price=1", "particle.budget.money=0.00002"))
    (reply,) = poor.predict([{"problem": "(1+2) mod 5"}])
    assert reply["status"] == "out of money" and reply["cost"] > 0
    late = open_run(execute(*words, "particle.budget.seconds=0.000001"))
    assert late.predict([{"problem": "(1+2) mod 5"}])[0]["status"] == "out of time"


def test_rewards_in_an_ensemble_and_rules_and_an_unfiltered_null(policy, value):
    several = execute(
        policy, value, "particle.reward.kind=value,rules", "depth=2", "particle.rivals=", "eval.limit=4"
    )
    assert several.result.curve[-1].depth == 2
    null = execute(
        policy,
        "particle.reward.kind=constant",
        "particle.reward.source=",
        "depth=4",
        "particle.rivals=samples",
    )
    found = rows(null)
    # nothing is resampled, so the particles are the samples, and their weighted vote is self-consistency
    assert found["exact"].to_pylist() == found["self-consistency"].to_pylist()
    assert set(found["ess"].to_pylist()) == {1.0}


def test_a_run_of_mor_writes_in_the_policys_place():
    mor = _mor()
    folder = execute(
        f"backbone.source=run:{mor.path}", *EXACT, "depth=2", "particle.rivals=samples", "eval.limit=4"
    )
    result = folder.result
    assert result.curve[0].cost["flops"] > 0 and len(result.curve) == 2
    assert (folder / audit.FILE).is_file()
    (reply,) = open_run(folder).predict([{"problem": "(1+2) mod 5"}])
    assert "does not know this problem" in reply["error"]


def _mor():
    words = [w for w in SUMS if not w.startswith("particle.")]
    plan = resolve(
        "mor", [*words, "train.steps=20", "train.batch_size=8", "depth=2", "backbone.tokenizer=byte", "backbone.layers=4"],
        environ={},
    )  # fmt: skip
    return _executed(plan)


def test_people_are_asked_and_their_ratings_count(policy, tmp_path):
    words = (
        policy,
        "particle.reward.kind=rules",
        "particle.reward.source=",
        "depth=4",
        "eval.curve=false",
        "particle.rivals=",
        "eval.limit=5",
    )
    asked = execute(*words, "particle.reward.questions=2")
    questions = [json.loads(line) for line in (asked / "questions.jsonl").read_text().splitlines()]
    assert questions and {"key", "problem", "solution", "information"} <= questions[0].keys()
    answers = tmp_path / "ratings.jsonl"
    answers.write_text(
        "".join(json.dumps({"key": q["key"], "good": i % 2 == 0}) + "\n" for i, q in enumerate(questions))
    )
    rated, plain = execute(*words, f"particle.reward.ratings={answers}"), execute(*words)
    assert rated.identity["config_hash"] != plain.identity["config_hash"]
    logs = [
        [
            line["r"]
            for line in map(json.loads, (folder / audit.FILE).read_text().splitlines())
            if line["event"] == "node"
        ]
        for folder in (rated, plain)
    ]
    assert logs[0] != logs[1]
    answers.write_text(answers.read_text() + json.dumps({"key": questions[0]["key"], "good": False}) + "\n")
    again = resolve("particle", [*SUMS, *words, f"particle.reward.ratings={answers}"], environ={})
    assert (
        source_digests(again)["particle.reward.ratings"]
        != rated.identity["sources"]["particle.reward.ratings"]
    )


def test_a_rank_without_a_problem_has_the_columns_all_the_same(policy):
    s = session(policy, *EXACT, "depth=2")
    split = s.ctx.data.test
    shares = [
        s.method.evaluate(replace(s.ctx, rank=rank, world_size=3, limit=2), s.network.eval(), split, 2)
        for rank in (0, 2)
    ]
    assert [share.rows.num_rows for share in shares] == [1, 0]
    assert (
        shares[0].rows.schema == shares[1].rows.schema and shares[0].rivals.keys() == shares[1].rivals.keys()
    )


def test_a_policy_that_has_learnt_from_the_test_is_refused(policy):
    s = session(policy, *EXACT, "dataset.seed=1", "dataset.test_documents=60")
    with pytest.raises(ConfigError, match=r"The policy was trained on \d+ of the problems"):
        s.method.check(s.ctx, s.network)
