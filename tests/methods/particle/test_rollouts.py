"""Rollouts of a tiny language model, and a value head that learns from them."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from reason.backbones.causal import Causal
from reason.backbones.config import CausalConfig
from reason.backbones.generation import Sampling, Stop
from reason.backbones.tokens import Tokens
from reason.datasets.problems import Problem
from reason.errors import ConfigError, DataError
from reason.methods.base import Examples
from reason.methods.particle import smc
from reason.methods.particle.calibrate import Calibrated, fit, quality, quality_by_depth
from reason.methods.particle.driver import Driver, Prefix, Task
from reason.methods.particle.lineage import Node
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Draws
from reason.methods.particle.rewards import Ensemble, SelfCertainty, stack
from reason.methods.particle.rollouts import Rollouts, collect, solved
from reason.methods.particle.value import FEATURES, Value, ValueHead, signs

LETTERS = ("<end>", "a", "b", ",", ";")
STOP = Stop(separators=(",", ";"), chunk=2, length=6)
SAMPLING = Sampling(1.0)


@pytest.fixture(scope="module")
def model() -> Causal:
    tokenizer = Tokenizer(
        models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<end>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    torch.manual_seed(0)
    config = CausalConfig(hidden=16, heads=2, kv_heads=1, ffn=32, layers=2, context=64, init_std=0.6)
    return Causal(config, tokens=Tokens(tokenizer, 0))


def problems(n: int) -> list[Problem]:
    return [Problem(f"p{i}", f"question {i}", "1") for i in range(n)]


def prompts(n: int) -> list[list[int]]:
    return [[1 + i % 2, *(1 + (i >> k) % 2 for k in range(4))] for i in range(n)]


def more_a(problem: Problem, node: Node) -> bool:
    """What counts as solved here."""
    return node.all_tokens.count(1) >= node.all_tokens.count(2)


def rollouts(model: Causal, n: int = 4, **options) -> Rollouts:
    given = {"count": 6, "grade": more_a, **options}
    return collect(model.batch(), SAMPLING, STOP, problems(n), prompts(n), **given)


def test_every_prefix_is_labelled_by_its_own_end(model):
    found = rollouts(model)
    assert (found.label[found.finished] <= 1).all()
    ends = np.flatnonzero(found.finished)
    assert len(ends) == 4 * 6  # a path after the other, each up to its end
    begin = 0
    for end in ends:
        assert found.step[begin : end + 1].tolist() == list(range(1, end - begin + 2))
        assert len(set(found.label[begin : end + 1].tolist())) == 1
        assert len(set(found.problem[begin : end + 1].tolist())) == 1
        begin = end + 1
    assert (
        0 < found.label.mean() < 1 and np.isnan(found.reward).all() and found.members.shape == (len(found), 0)
    )
    assert found.seen == {p.fingerprint for p in problems(4)}


def test_hidden_states_are_those_of_the_prefix_read_from_scratch(model):
    seen: list[Node] = []

    def grade(problem, node):
        seen.append(node)
        return True

    found = rollouts(model, 2, grade=grade)
    nodes = [node for end in seen for node in end.path]
    assert len(nodes) == len(found)
    for i in range(0, len(found), 5):
        text = [*prompts(2)[found.problem[i]], *nodes[i].all_tokens]
        with torch.no_grad():
            want = model.model.model(torch.tensor([text])).last_hidden_state[0, -1]
        torch.testing.assert_close(found.known[i, :16], want, atol=1e-4, rtol=1e-4)


def test_shares_of_completions_are_right_on_average(model):
    """Of the value of each first chunk: many completions agree with many independent solutions."""
    by_chunk: dict[tuple[int, ...], list[list[float]]] = defaultdict(lambda: [[], []])
    for which, options in enumerate(({"count": 400}, {"count": 30, "completions": 30})):
        found = rollouts(model, 1, seed=which, **options)
        label = found.label[(found.step == 1) & ~found.finished]
        hidden = found.known[:, :16][torch.from_numpy((found.step == 1) & ~found.finished)]
        for state, value in zip(hidden, label, strict=True):  # equal chunks have equal states, up to rounding
            by_chunk[tuple((state * 100).round().int().tolist())][which].append(float(value))
    compared = 0
    for own, shares in by_chunk.values():
        if len(own) >= 40 and shares:
            assert len(set(shares)) == 1  # completions belong to the prefix, whoever drew it
            compared += 1
            error = (0.25 / len(own) + 0.25 / 30) ** 0.5
            assert abs(np.mean(own) - shares[0]) < 4 * error
    assert compared >= 2


def test_the_same_seed_gives_the_same_rollouts_in_any_batch(model):
    a, b, c = rollouts(model), rollouts(model, width=1), rollouts(model, seed=1)
    assert (a.label == b.label).all() and torch.allclose(a.known, b.known, atol=1e-5)
    assert len(a) != len(c) or (a.step != c.step).any() or (a.label != c.label).any()


def test_rollouts_are_examples_and_split_by_problem(model):
    found = rollouts(model, 10)
    examples: Examples = found
    order = examples.order(np.random.default_rng(0), 8)
    assert sorted(order.tolist()) == list(range(len(found)))
    batch = examples.batch(order[:8])
    assert batch["known"].shape == (8, 16 + FEATURES) and batch["label"].dtype == torch.float32
    assert batch["label"].tolist() == found.label[order[:8]].tolist()
    most, held = found.split(0.3)
    assert len(most) + len(held) == len(found) and len(held.seen) == 3 and not most.seen & held.seen
    assert most.seen | held.seen == found.seen


def test_solutions_are_graded_by_the_answer_they_state():
    right = Node(Node(None), [1], "so\nanswer 07", finish="eos")
    assert solved(Problem("p", "", "7"), right) and not solved(Problem("p", "", "8"), right)
    assert not solved(Problem("p", "", "7"), Node(Node(None), [1], "7", finish="eos"))
    own = Problem("p", "", score=lambda answer: answer == "07")
    assert solved(own, right) and not solved(own, Node(Node(None), [1], "hm", finish="eos"))
    with pytest.raises(DataError, match="'p' has no answer"):
        solved(Problem("p", ""), right)


def train(head: ValueHead, found: Rollouts, steps: int = 200) -> None:
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        total, count = head.loss(found.batch(rng.integers(0, len(found), 128)))["value"]
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()


@pytest.mark.parametrize("hidden", [0, 32])
def test_the_loss_is_that_of_soft_labels_by_hand(hidden):
    torch.manual_seed(0)
    head = ValueHead(4, hidden)
    batch = {"known": torch.randn(3, 4 + FEATURES), "label": torch.tensor([0.0, 1.0, 0.25])}
    total, count = head.loss(batch)["value"]
    p = head(batch["known"]).sigmoid()
    want = -(batch["label"] * p.log() + (1 - batch["label"]) * (1 - p).log()).sum()
    torch.testing.assert_close(total, want)
    assert count == 3


def test_a_value_head_learns_steers_is_stacked_and_calibrated(model):
    """The whole way: rollouts, training, judging of held-out problems, stacking, calibration, a filter."""
    torch.manual_seed(0)
    found = rollouts(model, 30, count=12)
    train_part, held = found.split(0.3)
    head = ValueHead(16, 32)
    train(head, train_part)
    value = Value(head, train_part.seen)
    with torch.no_grad():
        said = head(held.known).sigmoid().numpy()
    depths = quality_by_depth(held, said)
    assert quality(said, held.label)["auroc"] > 0.7, depths
    assert sum(d["examples"] for d in depths.values()) == len(held)
    base = quality(np.full(len(held), train_part.label.mean()), held.label)
    assert quality(said, held.label)["nll"] < base["nll"] - 0.03

    members = Ensemble({"value": value, "certainty": SelfCertainty()})
    fresh = collect(
        model.batch(),
        SAMPLING,
        STOP,
        problems(40)[30:],
        prompts(40)[30:],
        count=12,
        grade=more_a,
        reward=members,
    )
    assert fresh.members.shape == (len(fresh), 2) and not fresh.seen & value.seen
    np.testing.assert_allclose(fresh.members[:, 0], head(fresh.known).sigmoid().detach(), rtol=1e-4)
    weights, bias = stack(fresh.members, fresh.label)
    assert weights[0] > 0.3
    combined = Ensemble(
        {"value": value, "certainty": SelfCertainty()},
        weights=dict(zip(members.names, weights, strict=True)),
        bias=bias,
    )
    calibrated = Calibrated(combined, fit("temperature", fresh, least=100))
    assert calibrated.seen == value.seen | fresh.seen

    ps, asked = problems(60)[40:], prompts(60)[40:]
    plain = collect(model.batch(), SAMPLING, STOP, ps, asked, count=40, grade=more_a)
    config = smc.Filter(16, Potential("logit"))
    driver = Driver(model.batch(), SAMPLING, STOP, calibrated)
    rates = []
    tasks = [
        Task(p, prompt, lambda root, p=p: smc.sweep(root, config, Draws(0, p.id)))
        for p, prompt in zip(ps, asked, strict=True)
    ]
    for outcome in driver.run(tasks):
        nodes, weights = outcome.result.nodes, outcome.result.weights
        assert all(len(node.members) == 2 for node in nodes)
        rates.append(float(weights @ [more_a(outcome.task.problem, node) for node in nodes]))
    assert np.mean(rates) > plain.label[plain.finished].mean() + 0.1  # it steers to where the answer is


def test_a_policy_without_hidden_states_has_no_value():
    with pytest.raises(ConfigError, match="behind a server"):
        Value(ValueHead(4))([Prefix(Problem("p", ""), Node(Node(None), [1]), None)])  # type: ignore[arg-type]


def test_signs_of_a_path():
    """By hand: the last chunk, the least likely one and their mean, a token each; steps; the end."""
    first = Node(Node(None), [1, 2], "a\n", -1.0)
    last = Node(Node(first, [3], "b\n", -2.0), [4, 5, 6, 7], "c", -2.0, finish="eos")
    np.testing.assert_allclose(signs(last), [-0.5, -2.0, -1.0, np.log(3), 1.0])
    np.testing.assert_allclose(signs(first), [-0.5, -0.5, -0.5, 0.0, 0.0])
