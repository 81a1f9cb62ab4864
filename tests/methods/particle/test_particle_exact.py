"""The algorithms against posteriors that were enumerated (spec: finite state spaces)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import toys

from reason.backbones.generation import uniforms
from reason.methods.particle import requests, smc
from reason.methods.particle.lineage import Node
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Draws, Slots
from reason.methods.particle.resampling import normalized, resample

PROB = Potential("prob", clip=0.0)


def evidence(toy: toys.Toy, config: smc.Filter, runs: int) -> np.ndarray:
    """(runs,) estimates of Z over the exact one."""
    _, log_z = toy.posterior(config.potential)
    found = [toy.run(smc.sweep(Node(None), config, Draws(seed, "hmm"))).log_z for seed in range(runs)]
    return np.exp(np.array(found) - log_z)


@pytest.mark.parametrize(("scheme", "threshold"), toys.ALL)
def test_the_evidence_is_unbiased(scheme, threshold):
    ratio = evidence(toys.hidden_markov(), smc.Filter(4, PROB, scheme, threshold), 600)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(len(ratio))


def test_the_error_falls_with_the_root_of_the_number_of_particles():
    toy = toys.hidden_markov()
    variance = [n * evidence(toy, smc.Filter(n, PROB, "multinomial", 1.0), 400).var() for n in (4, 16, 64)]
    assert max(variance) / min(variance) < 1.8
    assert np.polyfit(np.log([4, 16, 64]), np.log(np.sqrt(np.array(variance) / [4, 16, 64])), 1)[
        0
    ] == pytest.approx(-0.5, abs=0.12)


def test_the_mean_under_normalised_weights_is_biased_and_the_unnormalised_one_is_not():
    toy = toys.hidden_markov()
    law, log_z = toy.posterior(PROB)
    exact = sum(p for path, p in law.items() if path[-1] == 0)
    own, weighted = [], []
    for seed in range(1500):
        found = toy.run(smc.sweep(Node(None), smc.Filter(2, PROB, "multinomial", 1.0), Draws(seed, "hmm")))
        share = sum(w for node, w in zip(found.nodes, found.weights, strict=True) if node.tokens[-1] == 0)
        own.append(share)
        weighted.append(share * np.exp(found.log_z - log_z))
    assert abs(np.mean(weighted) - exact) < 4 * np.std(weighted) / np.sqrt(len(weighted))
    assert abs(np.mean(own) - exact) > 4 * np.std(own) / np.sqrt(len(own))


@pytest.mark.parametrize("anneal", ["", "ess"])
def test_finished_particles_absorb(anneal):
    """Mean length 1.6881; weighing finished particles again would give 1.885."""
    toy = toys.stopping()
    law, _ = toy.posterior(PROB)
    exact = sum(len(path) * p for path, p in law.items())
    assert exact == pytest.approx(1.6881, abs=5e-5)
    config = smc.Filter(64, PROB, "systematic", 0.5 if anneal else 1.0, anneal=anneal, length=20)
    found = []
    for seed in range(400):
        population = toy.run(smc.sweep(Node(None), config, Draws(seed, "stopping")))
        lengths = [node.step for node in population.nodes]
        found.append(np.exp(population.log_z) * (population.weights @ lengths))
    z = np.exp(toy.posterior(PROB)[1])
    assert np.mean(found) / z == pytest.approx(exact, abs=4 * np.std(found) / z / 20)


def test_annealing_keeps_what_it_flattened():
    toy = toys.hidden_markov()
    config = smc.Filter(8, Potential("prob", 0.25, 0.0), "systematic", 0.5, anneal="ess", length=20)
    ratio = evidence(toy, config, 800)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(len(ratio))


# --- particle Gibbs ---------------------------------------------------------------------------------


def drift(toy: toys.Toy, config: smc.Filter, runs: int, ancestor_sampling: bool = False) -> float:
    """How far a conditional sweep moves references that are exact draws from the posterior.

    The largest z-score over the symbols at all places and the lengths, of the mean under the weights after the
    sweep less the value before.
    """
    law, _ = toy.posterior(config.potential)
    paths = list(law)
    places = np.random.default_rng(0).choice(len(paths), runs, p=np.array(list(law.values())))
    change = []
    for run, place in enumerate(places):
        reference = _node(toy, paths[place])
        algorithm = smc.sweep(Node(None), config, Draws(run, "gibbs", sweep=1), reference, ancestor_sampling)
        population = toy.run(algorithm)
        after = population.weights @ np.array([_features(toy, node) for node in population.nodes])
        change.append(after - _features(toy, reference))
    mean, spread = np.mean(change, 0), np.std(change, 0) / np.sqrt(runs)
    share = sum(p * _features(toy, _node(toy, path)) for path, p in law.items())
    some = (share > 0.05) & (share < 0.95) | (spread > 0.01)  # what is seen often enough for a z-score
    return float(np.abs(mean[some] / spread[some]).max())


def _features(toy: toys.Toy, node: Node) -> np.ndarray:
    found = np.zeros((toy.longest, len(toy.first)))
    symbols = toys.symbols(node)
    found[np.arange(len(symbols)), symbols] = 1
    return np.append(found.ravel(), len(symbols))


SHORT = toys.hidden_markov(1, 3, 3)
SHARP = Potential("prob", 0.5, 0.0)


@pytest.mark.parametrize(("scheme", "threshold"), [pair for pair in toys.ALL if pair[1]])
def test_a_conditional_sweep_leaves_the_posterior_as_it_is(scheme, threshold):
    assert drift(toys.hidden_markov(), smc.Filter(3, SHARP, scheme, threshold), 1000) < 4


def test_so_does_ancestor_sampling():
    config = smc.Filter(3, SHARP, "multinomial", 1.0)
    assert drift(toys.hidden_markov(), config, 1000, ancestor_sampling=True) < 4


@pytest.mark.parametrize("ancestor_sampling", [False, True])
def test_so_does_a_sweep_over_solutions_of_different_lengths(ancestor_sampling):
    config = smc.Filter(3, SHARP, "multinomial", 1.0)
    assert drift(toys.stopping(), config, 1000, ancestor_sampling) < 4


def test_so_does_annealing():
    config = smc.Filter(4, SHARP, "systematic", 0.5, anneal="ess", length=20)
    assert drift(toys.hidden_markov(), config, 1000) < 4


def test_an_unconditional_scheme_in_its_place_does_not(monkeypatch):
    """Negative control: residual resampling with the reference put in by hand."""

    def careless(weights, n, u, scheme, keep=None):
        found = resample(weights, n, u, scheme)
        if keep is not None:
            found[-1] = keep
        return found

    monkeypatch.setattr(smc, "resample", careless)
    assert drift(toys.hidden_markov(), smc.Filter(2, PROB, "residual", 1.0), 1500) > 5


def test_nor_does_a_reference_that_is_lost(monkeypatch):
    """Negative control: nothing pins the reference, and the sweep is a plain particle filter."""
    whole = smc.sweep
    monkeypatch.setattr(smc, "sweep", lambda root, config, draws, reference, past: whole(root, config, draws))
    assert drift(toys.hidden_markov(), smc.Filter(3, SHARP, "multinomial", 1.0), 1500) > 5


@pytest.mark.parametrize(("particles", "near"), [(2, 0.42), (4, 0.22), (8, 0.14)])
def test_a_chain_of_sweeps_finds_the_posterior(particles, near):
    toy = toys.hidden_markov()
    law, _ = toy.posterior(PROB)
    config = smc.Filter(particles, PROB, "multinomial", 1.0)
    chain = toy.run(smc.gibbs(Node(None), config, Draws(0, "chain"), 1000))
    early, late = (toys.total_variation(toys.occupation(part), law) for part in (chain[20:80], chain[20:]))
    assert late < near and late < 0.7 * early


def test_the_reference_is_there_unchanged_and_prefixes_of_it_are_shared():
    toy = toys.hidden_markov()
    config = smc.Filter(8, PROB, "multinomial", 1.0)
    first = toy.run(smc.sweep(Node(None), config, Draws(0, "p")))
    reference = smc.choose(first, requests.Uniforms(0))
    path = reference.path
    second = toy.run(smc.sweep(Node(None), config, Draws(0, "p", sweep=1), reference))
    assert second.nodes[-1] is reference
    for t, round in enumerate(second.rounds):
        assert round.nodes[-1] is path[t]
    assert any(path[0] in node.path for node in second.nodes[:-1])


# --- tempering and islands --------------------------------------------------------------------------


def test_swaps_leave_the_joint_posterior_as_it_is():
    toy = SHORT
    config = smc.Filter(4, Potential("prob", 1.0, 0.0), "multinomial", 1.0)
    law, _ = toy.posterior(replace(config.potential, temperature=0.4))
    chains, swaps = toy.run(smc.tempering(Node(None), config, Draws(3, "pt"), [2.0, 0.4], 1500))
    assert toys.total_variation(toys.occupation(chains[-1][20:]), law) < 0.09
    hot, _ = toy.posterior(replace(config.potential, temperature=2.0))
    assert toys.total_variation(toys.occupation(chains[0][20:]), hot) < 0.09
    assert 0.2 < np.mean([swap.accepted for swap in swaps]) < 1
    assert len(swaps) == 750  # every other sweep


def test_the_swap_is_the_metropolis_ratio():
    toy = SHORT
    base = Potential("prob", 1.0, 0.0)
    hot, _ = toy.posterior(replace(base, temperature=2.0))
    cold, _ = toy.posterior(replace(base, temperature=0.5))
    ends = {path: _node(toy, path) for path in hot}
    for x, y in [((0, 1, 2), (2, 2, 0)), ((1, 1, 1), (0, 0, 2))]:
        ratio = hot[y] * cold[x] / (hot[x] * cold[y])
        found = smc.swap_log_ratio(2.0, 0.5, base.path(ends[x]), base.path(ends[y]))
        assert np.exp(found) == pytest.approx(ratio)


def _node(toy: toys.Toy, path) -> Node:
    node = Node(None)
    for symbol in path:
        node = toy.child(node, symbol)
    return node


def test_islands_merged_by_their_evidence_are_unbiased():
    toy = toys.hidden_markov()
    law, log_z = toy.posterior(PROB)
    exact = sum(p for path, p in law.items() if path[-1] == 0)
    config = smc.Filter(2, PROB, "systematic", 0.5)
    found = []
    for seed in range(800):
        several = toy.run(smc.islands(Node(None), config, Draws(seed, "islands"), 4))
        merged = smc.pooled(several, [p.log_z for p in several])
        share = sum(w for node, w in zip(merged.nodes, merged.weights, strict=True) if node.tokens[-1] == 0)
        found.append(share * np.exp(merged.log_z - log_z))
    assert abs(np.mean(found) - exact) < 4 * np.std(found) / np.sqrt(len(found))


# --- what stays and what does not matter ------------------------------------------------------------


def test_one_particle_is_plain_sampling():
    toy = toys.hidden_markov()
    for seed in range(20):
        draws = Draws(seed, "one")
        population = toy.run(smc.sweep(Node(None), smc.Filter(1, PROB, "systematic", 1.0), draws))
        u = uniforms(np.repeat(draws.streams(1), 5), np.arange(5))
        node = Node(None)
        for t in range(5):
            node = toy.child(node, int((toy.law(node).cumsum() <= u[t]).sum()))
        assert toys.symbols(population.nodes[0]) == toys.symbols(node)


def test_without_resampling_it_is_importance_sampling():
    toy = toys.hidden_markov()
    draws = Draws(5, "never")
    population = toy.run(smc.sweep(Node(None), smc.Filter(6, PROB, threshold=0.0), draws))
    assert all(round.ancestors is None for round in population.rounds)
    for node, log_weight in zip(population.nodes, population.log_weights, strict=True):
        assert log_weight == pytest.approx(PROB.path(node))


def test_a_constant_reward_gives_the_prior():
    toy = toys.hidden_markov()
    toy.reward = lambda path: 0.4
    population = toy.run(smc.sweep(Node(None), smc.Filter(8, PROB, threshold=0.9), Draws(0, "flat")))
    assert np.allclose(population.weights, 1 / 8)
    assert all(round.ancestors is None and round.ess == pytest.approx(8) for round in population.rounds)
    assert population.log_z == pytest.approx(5 * np.log(0.4))


def test_a_very_hot_reward_is_a_constant_one_and_a_very_cold_one_is_greedy():
    toy = toys.hidden_markov()
    hot = toy.run(smc.sweep(Node(None), smc.Filter(8, Potential("prob", 1e9)), Draws(0, "t")))
    assert np.allclose(hot.weights, 1 / 8)
    cold = toy.run(
        smc.sweep(Node(None), smc.Filter(8, Potential("prob", 1e-6), threshold=1.0), Draws(0, "t"))
    )
    for round in cold.rounds[:-1]:
        best = max(node.reward for node in round.nodes)
        assert all(round.nodes[a].reward == best for a in round.ancestors)


def test_paths_are_their_ancestors_chunks_and_weights_can_be_recomputed():
    toy = toys.hidden_markov()
    population = toy.run(smc.sweep(Node(None), smc.Filter(8, PROB, threshold=0.9), Draws(2, "replay")))
    before, log_weights = [Node(None)] * 8, np.zeros(8)
    resampled = 0
    for number, round in enumerate(population.rounds, 1):
        for slot, node in enumerate(round.nodes):
            assert node.parent is before[slot] or (node.parent.parent is None and before[slot].parent is None)
            log_weights[slot] += PROB(node)
        assert np.array_equal(log_weights, round.log_weights)
        before = list(round.nodes)
        if round.ancestors is not None:
            resampled += 1
            again = resample(normalized(log_weights), 8, Draws(2, "replay").uniforms("resample", number))
            assert np.array_equal(again, round.ancestors)
            before = [round.nodes[a] for a in again]
            log_weights = np.zeros(8)
    assert resampled
    assert population.nodes == tuple(before)


def test_finished_particles_do_not_change():
    toy = toys.stopping()
    population = toy.run(smc.sweep(Node(None), smc.Filter(16, PROB, threshold=0.0), Draws(0, "f")))
    for slot, end in enumerate(population.nodes):
        seen = [round.nodes[slot] for round in population.rounds]
        done = next(t for t, node in enumerate(seen) if node.finished)
        assert all(node is end for node in seen[done:])
        assert len({round.log_weights[slot] for round in population.rounds[done:]}) == 1


def test_slots_are_exchangeable():
    toy = toys.hidden_markov()
    config = smc.Filter(4, PROB, "systematic", 0.5)
    share = np.zeros(4)
    for seed in range(1500):
        population = toy.run(smc.sweep(Node(None), config, Draws(seed, "x")))
        share += [
            w * (node.tokens[-1] == 0) for node, w in zip(population.nodes, population.weights, strict=True)
        ]
    assert np.allclose(share / share.sum(), 0.25, atol=0.05)


def test_all_weights_zero_is_a_dead_end_and_said():
    toy = toys.hidden_markov()
    toy.reward = lambda path: 0.0 if len(path) == 3 else 0.5
    config = smc.Filter(4, PROB, threshold=1.0)
    population = toy.run(smc.sweep(Node(None), config, Draws(0, "dead")))
    assert population.status == "dead" and population.log_z == -np.inf
    assert not population.weights.any() and not np.isnan(population.weights).any()
    assert len(population.rounds) == 3 and population.rounds[-1].ancestors is None


@pytest.mark.parametrize("reward", [float("nan"), -0.1, 1.2])
def test_a_reward_that_is_none_is_an_error(reward):
    toy = toys.hidden_markov()
    toy.reward = lambda path: reward
    with pytest.raises(ValueError, match="between 0 and 1"):
        toy.run(smc.sweep(Node(None), smc.Filter(4, PROB), Draws(0, "bad")))


def test_gibbs_needs_two_particles_and_ancestor_sampling_a_scheme_that_allows_it():
    with pytest.raises(ValueError, match="at least 2 particles"):
        next(smc.gibbs(Node(None), smc.Filter(1, PROB), Draws(0, "x"), 2))
    with pytest.raises(ValueError, match="multinomial"):
        next(smc.gibbs(Node(None), smc.Filter(4, PROB), Draws(0, "x"), 2, ancestor_sampling=True))


def test_a_halt_returns_what_there_is():
    toy = toys.hidden_markov()
    algorithm = smc.islands(Node(None), smc.Filter(4, PROB), Draws(0, "halt"), 2)
    request = next(algorithm)
    request = algorithm.send(toy.answer(request))
    with pytest.raises(StopIteration) as end:
        algorithm.throw(requests.Halted("out of tokens"))
    for population in end.value.value:
        assert population.status == "out of tokens"
        assert all(node.step == 1 for node in population.nodes)


def test_a_slot_never_draws_by_the_same_number_twice():
    seen = set()
    toy = toys.hidden_markov()
    algorithm = smc.gibbs(Node(None), smc.Filter(4, PROB, "multinomial", 1.0), Draws(0, "ticks"), 3)
    request = next(algorithm)
    try:
        while True:
            for pair in zip(request.streams.tolist(), request.ticks.tolist(), strict=True):
                assert pair not in seen
                seen.add(pair)
            request = algorithm.send(toy.answer(request))
    except StopIteration:
        pass
    assert len(seen) == 5 * (4 + 3 + 3)


def test_ticks_count_what_a_slot_has_drawn_not_how_long_its_text_is():
    slots = Slots(Node(None), 2, Draws(0, "p"))
    step = slots.extend([0, 1])
    next(step)
    root = Node(None)
    with pytest.raises(StopIteration):
        step.send([Node(root, (1, 2, 3)), Node(root, (1,))])
    slots.nodes = [slots.nodes[1]] * 2
    request = next(slots.extend([0, 1]))
    assert request.ticks.tolist() == [3, 1]
