"""Sequential Monte Carlo over solutions: the particle filter and what is built of its sweeps.

The target is the distribution of solutions given that every step was accepted,

    pi(x_1..x_T)  =  1/Z  prod_t p(x_t | x_<t)  exp g_t(x_1..x_t) ,

with p the policy and g the log-potential (``potentials``). ``sweep`` samples it (particle filter), or moves a given
solution so that the target stays what it is (conditional sweep; particle Gibbs, Andrieu et al. 2010). Applied to
language models: Puri et al., arXiv 2502.01618. Finished particles absorb: they keep their weight, are not weighed
again, and stay in the population.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reason.errors import ConfigError
from reason.methods.particle.lineage import Node, Population, Round
from reason.methods.particle.potentials import Potential, annealing
from reason.methods.particle.requests import Algorithm, Draws, Halted, Slots, Splice, Uniforms, together
from reason.methods.particle.resampling import effective_size, log_mean, normalized, resample


@dataclass(frozen=True)
class Filter:
    """How a sweep weighs and resamples.

    particles: N. scheme: see ``resampling``. threshold: resampled when ESS is at most this share of N; 1 = in every
    round, 0 = never (importance sampling). first: rounds before which nothing is resampled. anneal: schedule of
    entropic particle filtering, "" = none; length: steps that a solution is expected to take, for this schedule.
    """

    particles: int
    potential: Potential
    scheme: str = "systematic"
    threshold: float = 0.5
    first: int = 1
    anneal: str = ""
    length: float = 10.0


def sweep(
    root: Node,
    config: Filter,
    draws: Draws,
    reference: Node | None = None,
    ancestor_sampling: bool = False,
) -> Algorithm[Population]:
    """A particle filter; with a ``reference``, a conditional one.

    The reference, a finished solution, is replayed in the last slot with the rewards it has. Free particles may
    copy its prefix; it is not overwritten. With ``ancestor_sampling`` (Lindsten et al. 2014) its own past is drawn
    anew at each resampling, in proportion to how well its future follows the prefixes of all.

    Returns:
        The population. Its weights are those after the last resampling; nothing is resampled at the end.
    """
    n, free = config.particles, config.particles - (reference is not None)
    slots = Slots(root, n, draws)
    log_weights = np.zeros(n)
    log_z, rounds, status = 0.0, [], "finished"
    future = reference.path if reference is not None else []
    t = 0
    try:
        while True:
            moved = slots.unfinished(free)
            if moved:
                yield from slots.extend(moved)
            if t < len(future):
                slots.nodes[-1] = future[t]
                moved.append(n - 1)
            t += 1
            for slot in moved:
                log_weights[slot] += config.potential(slots.nodes[slot])
            weights = normalized(log_weights)
            ess = effective_size(weights)
            record = Round(tuple(slots.nodes), log_weights.copy(), ess)
            rounds.append(record)
            if ess == 0:
                status = "dead"
                break
            if not slots.unfinished():
                break
            if config.threshold == 0 or t < config.first or ess > config.threshold * n:
                continue
            temperature = annealing(config.anneal, weights, t / config.length) if config.anneal else 1.0
            log_z += log_mean(log_weights)
            chosen_by = normalized(log_weights / temperature)
            keep = n - 1 if reference is not None else None
            ancestors = resample(chosen_by, n, draws.uniforms("resample", t), config.scheme, keep)
            spliced: tuple[Node | None, ...] = ()
            if reference is not None and ancestor_sampling and t < len(future):
                future, ancestors[-1], spliced = yield from _new_past(
                    slots.nodes, log_weights, future, t, config, draws
                )
            rounds[-1] = replace(record, temperature=temperature, ancestors=ancestors, spliced=spliced)
            slots.nodes = [slots.nodes[a] for a in ancestors]
            log_weights = leftover(weights, chosen_by)[ancestors]
    except Halted as halt:
        status = str(halt)
    log_z += log_mean(log_weights)
    return Population(tuple(slots.nodes), log_weights, log_z, tuple(rounds), status)


def leftover(weights: np.ndarray, chosen_by: np.ndarray) -> np.ndarray:
    """(N,) log-weights that offspring begin with: 0 where they were chosen by weight, else what that left out."""
    if chosen_by is weights or np.array_equal(chosen_by, weights):
        return np.zeros(len(weights))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chosen_by > 0, np.log(weights) - np.log(chosen_by), -np.inf)


def _new_past(
    nodes: Sequence[Node], log_weights: np.ndarray, future: list[Node], t: int, config: Filter, draws: Draws
):  # fmt: skip
    """Draw the prefix that the reference continues after step ``t``: its path from there on, the slot, and all there were."""
    rest = future[t:]
    spliced = yield Splice(list(nodes), rest)
    log_p = np.full(len(nodes), -np.inf)
    for slot, last in enumerate(spliced):
        if last is not None and log_weights[slot] > -np.inf:
            steps = last.path[t:]
            log_p[slot] = log_weights[slot] + sum(step.log_p + config.potential(step) for step in steps)
    chosen = int(resample(normalized(log_p), 1, draws.uniforms("ancestor", t), "multinomial")[0])
    return spliced[chosen].path, chosen, tuple(spliced)


# --- several sweeps ---------------------------------------------------------------------------------


def choose(population: Population, u: Uniforms) -> Node:
    """One particle, by weight."""
    return population.nodes[int(resample(population.weights, 1, u, "multinomial")[0])]


def pooled(populations: Sequence[Population], log_shares: Sequence[float] | None = None) -> Population:
    """Several populations as one.

    Args:
        log_shares: log of the share of each, unnormalised; None: each counts the same.
    """
    shares = np.zeros(len(populations)) if log_shares is None else np.asarray(log_shares, float)
    with np.errstate(divide="ignore"):
        weights = [np.log(p.weights) + share for p, share in zip(populations, shares, strict=True)]
    nodes = tuple(node for p in populations for node in p.nodes)
    statuses = {p.status for p in populations}
    status = next((s for s in (p.status for p in populations) if s not in ("finished", "dead")), "finished")
    if statuses == {"dead"}:
        status = "dead"
    rounds = tuple(r for p in populations for r in p.rounds)
    log_z = log_mean(np.array([p.log_z for p in populations]))
    return Population(nodes, np.concatenate(weights), log_z, rounds, status)


def islands(root: Node, config: Filter, draws: Draws, count: int) -> Algorithm[list[Population]]:
    """Independent particle filters side by side. ``pooled`` with their ``log_z`` as shares keeps them unbiased."""
    return (yield from together([sweep(root, config, replace(draws, chain=m)) for m in range(count)]))


def gibbs(
    root: Node, config: Filter, draws: Draws, sweeps: int, ancestor_sampling: bool = False
) -> Algorithm[list[Population]]:
    """Particle Gibbs: a particle filter, then conditional sweeps, each on a particle of the one before.

    Raises:
        ConfigError: fewer than two particles, of which one is the reference, or ancestor sampling without
            multinomial resampling.
    """
    _fit_for_gibbs(config, "Particle Gibbs", ancestor_sampling)
    populations: list[Population] = []
    reference = None
    for number in range(sweeps):
        here = replace(draws, sweep=number)
        population = yield from sweep(root, config, here, reference, ancestor_sampling)
        populations.append(population)
        if population.status != "finished":
            break
        reference = choose(population, here.uniforms("reference"))
    return populations


@dataclass(frozen=True)
class Swap:
    """A proposed exchange of references between neighbouring chains."""

    sweep: int
    chain: int  # the hotter one; its neighbour is the next
    log_ratio: float
    accepted: bool


def swap_log_ratio(hot: float, cold: float, s_hot: float, s_cold: float) -> float:
    """Log of the Metropolis ratio of an exchange between chains at temperatures ``hot`` and ``cold``.

    ``s`` is the sum of base log-potentials of each chain's reference. The policy's likelihoods cancel, because all chains
    sample with the same temperature of the language model.
    """
    return (1 / hot - 1 / cold) * (s_cold - s_hot)


def tempering(
    root: Node,
    config: Filter,
    draws: Draws,
    temperatures: Sequence[float],
    sweeps: int,
    ancestor_sampling: bool = False,
) -> Algorithm[tuple[list[list[Population]], list[Swap]]]:
    """Parallel tempering: chains of particle Gibbs at falling temperatures of the reward, which swap references.

    Args:
        temperatures: hottest first; the last is the target's.

    Returns:
        For each chain its populations, and all proposed swaps. Those of the last chain sample the target.
    """
    _fit_for_gibbs(config, "Parallel tempering", ancestor_sampling)
    chains = [
        replace(config, potential=replace(config.potential, temperature=temperature))
        for temperature in temperatures
    ]
    populations: list[list[Population]] = [[] for _ in chains]
    references: list[Node | None] = [None] * len(chains)
    swaps: list[Swap] = []
    for number in range(sweeps):
        heres = [replace(draws, sweep=number, chain=k) for k in range(len(chains))]
        found = yield from together(
            [
                sweep(root, chain, here, reference, ancestor_sampling)
                for chain, here, reference in zip(chains, heres, references, strict=True)
            ]
        )
        for mine, population in zip(populations, found, strict=True):
            mine.append(population)
        if any(population.status != "finished" for population in found):
            break
        chosen = [choose(p, here.uniforms("reference")) for p, here in zip(found, heres, strict=True)]
        for k in range(number % 2, len(chains) - 1, 2):  # pairs in turns
            s = [config.potential.path(chosen[k]), config.potential.path(chosen[k + 1])]
            log_ratio = swap_log_ratio(temperatures[k], temperatures[k + 1], s[0], s[1])
            accepted = math.log1p(-heres[k].uniforms("swap").random()[0]) < log_ratio
            swaps.append(Swap(number, k, log_ratio, accepted))
            if accepted:
                chosen[k], chosen[k + 1] = chosen[k + 1], chosen[k]
        references = list(chosen)
    return populations, swaps


def _fit_for_gibbs(config: Filter, name: str, ancestor_sampling: bool) -> None:
    if config.particles < 2:
        raise ConfigError(
            f"{name} needs at least 2 particles, one of them the reference; there is {config.particles}.",
            "Ask for depth=2 or more; 8 is the least with which the reference moves often.",
        )
    if ancestor_sampling and config.scheme != "multinomial":
        raise ConfigError(
            f"Ancestor sampling draws one parent by itself, which {config.scheme} resampling does not allow.",
            "Use particle.resampling=multinomial with it.",
        )
