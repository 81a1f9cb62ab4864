"""The algorithms over a real language model and its cache: a tiny one, whose every text is enumerated."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from reason.backbones.causal import Causal
from reason.backbones.config import CausalConfig
from reason.backbones.generation import Sampling, Stop
from reason.backbones.tokens import Tokens
from reason.datasets.problems import Problem
from reason.errors import DataError, RunError
from reason.methods.particle import searches, smc
from reason.methods.particle.driver import Driver, Prefix, Task
from reason.methods.particle.lineage import Node
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Draws

LETTERS = ("<end>", "a", "b", ",", ";")  # , and ; end a chunk; <end> ends a text
STOP = Stop(separators=(",", ";"), chunk=2, length=4)
SAMPLING = Sampling(0.9)
PROB = Potential("prob", clip=0.0)


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


def table(prefixes) -> np.ndarray:
    """A reward that is a function of the text, from 0.1 to 0.9."""
    found = []
    for prefix in prefixes:
        text = f"{prefix.problem.id} {prefix.node.all_tokens}"
        found.append(0.1 + 0.8 * int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32)
    return np.array(found)


def problem(i: int = 0) -> Problem:
    return Problem(f"p{i}", "ab" * (i + 1))


def prompt(i: int = 0) -> list[int]:
    return [1, 2] * (i + 1)


def tasks(algorithm, problems=(0,), **options) -> list[Task]:
    return [Task(problem(i), prompt(i), lambda root, i=i: algorithm(root, i), **options) for i in problems]


def driver(model: Causal, **options) -> Driver:
    return Driver(
        model.batch(), SAMPLING, STOP, options.pop("reward", table), steps=options.pop("steps", 4), **options
    )


def enumerated(model: Causal, i: int, potential: Potential) -> tuple[dict[tuple[int, ...], float], float]:
    """Posterior of every text and the log-evidence: plain forward passes, no cache, no chunks but those of the rules."""
    found: dict[tuple[int, ...], float] = {}

    def law(tokens: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt(i), *tokens]]))[0, -1]
        return (logits.double() / SAMPLING.temperature).softmax(-1).numpy()

    def visit(node: Node, begun: tuple[int, ...], log_p: float) -> None:
        """begun: tokens of a chunk that is being written behind ``node``."""
        for token, p in enumerate(law((*node.all_tokens, *begun))):
            chunk, whole = (*begun, token), log_p + np.log(p)
            length = node.length + len(chunk)
            finish = "eos" if token == 0 else "length" if length == 4 else ""
            if finish or token in (3, 4) or len(chunk) == 2:
                child = Node(node, chunk, finish=finish)
                child.reward = float(table([Prefix(problem(i), child, None)])[0])  # type: ignore[arg-type]
                weighed = whole + potential(child)
                if finish:
                    found[tuple(child.all_tokens)] = weighed
                else:
                    visit(child, (), weighed)
            else:
                visit(node, chunk, whole)

    visit(Node(None), (), 0.0)
    top = max(found.values())
    total = sum(np.exp(v - top) for v in found.values())
    return {k: float(np.exp(v - top) / total) for k, v in found.items()}, float(top + np.log(total))


def features(nodes) -> np.ndarray:
    """(n, 4): how often a text has b, has a comma, is ended by the model, and its length."""
    return np.array([[t.count(2), t.count(3), t[-1] == 0, len(t)] for t in (list(n) for n in nodes)], float)


@pytest.mark.parametrize(("scheme", "threshold"), [("systematic", 0.9), ("multinomial", 1.0)])
def test_the_filter_samples_the_enumerated_posterior(model, scheme, threshold):
    sharp = replace(PROB, temperature=0.4)
    law, log_z = enumerated(model, 1, sharp)
    exact = np.array(list(law.values())) @ features(law)
    config = smc.Filter(8, sharp, scheme, threshold)
    several = [
        Task(problem(1), prompt(1), lambda root, s=s: smc.sweep(root, config, Draws(s, "p1")))
        for s in range(250)
    ]
    found = []
    for outcome in driver(model).run(several):
        population = outcome.result
        ratio = np.exp(population.log_z - log_z)
        means = population.weights @ features([node.all_tokens for node in population.nodes])
        found.append(np.append(ratio * means, ratio))
    mean, error = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
    assert (np.abs(mean - np.append(exact, 1.0)) < 4 * error).all(), (mean, exact, error)
    assert (error < 0.2).all()


def test_particle_gibbs_and_its_splices_do_too(model):
    sharp = replace(PROB, temperature=0.4)
    law, _ = enumerated(model, 0, sharp)
    exact = np.array(list(law.values())) @ features(law)
    config = smc.Filter(3, sharp, "multinomial", 1.0)
    for ancestor_sampling in (False, True):
        several = [
            Task(problem(0), prompt(0), lambda root, s=s, a=ancestor_sampling: smc.gibbs(root, config, Draws(s, "p0"), 8, a))
            for s in range(50)
        ]  # fmt: skip
        found = []
        for outcome in driver(model).run(several):
            pooled = smc.pooled(outcome.result[2:])
            found.append(pooled.weights @ features([node.all_tokens for node in pooled.nodes]))
        mean, error = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
        assert (np.abs(mean - exact) < 4.5 * error + 0.02).all(), (ancestor_sampling, mean, exact, error)


def everything(root: Node, i: int):
    """An algorithm that forks, waits, and continues what it had given up."""
    population = yield from smc.sweep(root, smc.Filter(5, PROB, threshold=1.0), Draws(1, f"p{i}"))
    whole = yield from searches.samples(root, 3, Draws(2, f"p{i}"))
    beams = yield from searches.beam(root, 4, 2, Draws(3, f"p{i}"))
    best = yield from searches.greedy(root)
    return [node.all_tokens for node in (*population.nodes, *whole, *beams, best)]


def test_neither_neighbours_nor_the_width_of_the_batch_change_a_result(model):
    alone = {}
    for i in range(4):
        (outcome,) = driver(model, width=1).run(tasks(everything, [i]))
        alone[i] = outcome.result
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        for outcome in driver(model, width=100).run(tasks(everything, order)):
            assert outcome.result == alone[int(outcome.task.problem.id[1:])]


def test_one_particle_is_plain_sampling_from_scratch(model):
    from reason.backbones.generation import draw, uniforms

    for seed in range(5):
        draws = Draws(seed, "p0")
        algorithm = tasks(lambda root, i, d=draws: smc.sweep(root, smc.Filter(1, PROB, threshold=1.0), d))
        (outcome,) = driver(model).run(algorithm)
        tokens: list[int] = []
        while len(tokens) < 4 and 0 not in tokens:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt(0), *tokens]]))[:, -1]
            u = uniforms(draws.streams(1), np.array([len(tokens)]))
            tokens.append(int(draw(logits, SAMPLING, u).tokens[0]))
        assert outcome.result.nodes[0].all_tokens == tokens


def test_the_ledger_adds_up_and_rows_are_given_back(model):
    one = driver(model)
    outcomes = list(one.run(tasks(everything, range(3))))
    assert sum(outcome.ledger.drawn for outcome in outcomes) == one.batch.drawn
    assert all(outcome.ledger.prompt for outcome in outcomes)
    assert one.batch.active == 0 and not one._roots and not one._jobs
    assert not one.batch.lm._slot  # every row of the cache is free


def test_all_tokens_drawn_are_those_of_the_rounds(model):
    config = smc.Filter(6, PROB, threshold=0.8)
    (outcome,) = driver(model).run(tasks(lambda root, i: smc.sweep(root, config, Draws(0, "p0"))))
    seen = {id(node): len(node.tokens) for round in outcome.result.rounds for node in round.nodes}
    assert outcome.ledger.drawn == sum(seen.values())
    assert outcome.ledger.judged == len(seen)


def test_a_budget_ends_a_problem_and_no_other(model):
    config = smc.Filter(8, PROB)
    several = tasks(lambda root, i: smc.sweep(root, config, Draws(0, f"p{i}")), range(3))
    several[1] = replace(several[1], budget=10)
    found = {o.task.problem.id: o for o in driver(model).run(several)}
    assert found["p1"].result.status == "out of tokens"
    assert 10 <= found["p1"].ledger.drawn < 10 + 8
    for name in ("p0", "p2"):
        assert found[name].result.status == "finished" and found[name].result.finished.all()


def test_a_deadline_ends_all_with_what_they_have(model):
    ticks = iter([""] * 4 + ["out of time"] * 1000)
    config = smc.Filter(4, PROB)
    several = tasks(lambda root, i: smc.sweep(root, config, Draws(0, f"p{i}")), range(25))
    outcomes = list(driver(model, width=4, halted=lambda: next(ticks)).run(several))
    assert len(outcomes) == 25
    assert {o.result.status for o in outcomes} <= {"out of time", "finished"}
    assert all(len(o.result.nodes) == 4 for o in outcomes)


def test_a_cap_on_steps_finishes_a_text(model):
    config = smc.Filter(4, PROB)
    (outcome,) = driver(model, steps=1).run(tasks(lambda root, i: smc.sweep(root, config, Draws(0, "p0"))))
    assert {node.finish for node in outcome.result.nodes} <= {"steps", "eos"}


@pytest.mark.parametrize("bad", [float("nan"), 1.5, -0.1])
def test_a_reward_that_is_none_names_the_problem_and_the_step(model, bad):
    def reward(prefixes):
        return np.where([prefix.node.step == 2 for prefix in prefixes], bad, 0.5)

    config = smc.Filter(4, PROB)
    with pytest.raises(RunError, match=r"problem 'p0', step 2"):
        list(driver(model, reward=reward).run(tasks(lambda root, i: smc.sweep(root, config, Draws(0, "p0")))))


def test_too_few_rewards_are_an_error(model):
    config = smc.Filter(4, PROB)
    one = driver(model, reward=lambda prefixes: np.full(len(prefixes) - 1, 0.5))
    with pytest.raises(RunError, match="3 scores for 4 prefixes"):
        list(one.run(tasks(lambda root, i: smc.sweep(root, config, Draws(0, "p0")))))


def test_a_problem_longer_than_the_context_is_refused_before_anything_is_read(model):
    long = Task(Problem("long", ""), [1] * 64, lambda root: searches.samples(root, 1, Draws(0, "long")))
    one = driver(model)
    with pytest.raises(DataError, match="'long' has 64 tokens"):
        list(one.run([*tasks(everything), long]))
    assert one.batch.read == 0
