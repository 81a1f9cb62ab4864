"""How many particles a problem is worth: few at first, and more as long as its answer is not settled.

Islands of particles are run one after another, each as large as all before it together, so that the number doubles up to a
cap. Nothing is thrown away: all islands vote, by their evidence. The search ends when the leading answer is more than
half of what would be said, with some probability: the rule of self-consistency with early stopping (Beta posterior over
the share of the leading answer, uniform prior), applied to as many votes as there are independent ones. Copies of one
first step are not independent, so these are counted as no more than the first steps that survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.stats import beta

from reason.methods.particle import smc
from reason.methods.particle.lineage import Node, Population, distinct_ancestors
from reason.methods.particle.requests import Algorithm, Draws
from reason.methods.particle.resampling import effective_size
from reason.methods.particle.selection import NONE, Candidates


def sizes(cap: int, start: int) -> list[int]:
    """Particles of the islands: ``start``, as many again, twice as many, and so on; ``cap`` in all.

    >>> sizes(32, 4)
    [4, 4, 8, 16]
    """
    found, total = [min(start, cap)], min(start, cap)
    while total < cap:
        found.append(min(total, cap - total))
        total += found[-1]
    return found


def pooled(islands: Sequence[Population]) -> Population:
    """All islands as one population, each by the evidence it has found for its particles."""
    shares = [island.log_z + np.log(len(island.nodes)) for island in islands]
    return smc.pooled(islands, shares)


def settled(population: Population) -> float:
    """The probability that the leading answer has more than half of all votes that could be asked for; 0 without any."""
    candidates = Candidates.of_populations([population])
    weights, kinds = candidates.weights[0], candidates.kinds[0]
    voting = kinds != NONE
    if not voting.any():
        return 0.0
    nodes = [node for node, votes in zip(population.nodes, voting, strict=True) if votes]
    independent = min(effective_size(weights), distinct_ancestors(nodes, 1))
    leading = max(weights[kinds == kind].sum() for kind in np.unique(kinds[voting]))
    return float(beta.sf(0.5, 1 + leading * independent, 1 + (1 - leading) * independent))


def adaptive(
    root: Node, config: smc.Filter, draws: Draws, start: int, confidence: float
) -> Algorithm[list[Population]]:
    """Islands until an answer is settled.

    Args:
        config: its particles are the cap.
        start: particles of the first island.
        confidence: see ``settled``; 1 = up to the cap, always.
    """
    islands: list[Population] = []
    for number, size in enumerate(sizes(config.particles, start)):
        found = yield from smc.sweep(root, replace(config, particles=size), replace(draws, chain=number))
        islands.append(found)
        if found.status not in ("finished", "dead") or settled(pooled(islands)) >= confidence:
            break
    return islands
