"""Whole samples, greedy, beam search and DVTS, on a toy whose best path is known."""

from __future__ import annotations

import numpy as np
import pytest
import toys

from reason.methods.particle import searches
from reason.methods.particle.lineage import Node
from reason.methods.particle.requests import Draws, Extend, together

LAW = np.array([0.3, 0.3, 0.2, 0.2])  # symbols 2 and 3 end a path


def toy() -> toys.Toy:
    """Each 1 is worth having; ends come at random, after 6 symbols at the latest."""
    return toys.Toy(
        LAW,
        np.tile(LAW, (4, 1)),
        lambda path: (1 + sum(s % 2 for s in path)) / (2 + len(path)),
        6,
        frozenset({2, 3}),
    )


def test_samples_are_independent_and_finished():
    several = toy().run(searches.samples(Node(None), 50, Draws(0, "p")))
    assert len(several) == 50 and all(node.finished for node in several)
    fewer = toy().run(searches.samples(Node(None), 10, Draws(0, "p")))
    assert [toys.symbols(n) for n in fewer] == [toys.symbols(n) for n in several[:10]]


def test_greedy_takes_the_likeliest():
    assert toys.symbols(toy().run(searches.greedy(Node(None)))) == (0,) * 6


@pytest.mark.parametrize("search", [searches.beam, searches.dvts])
def test_candidates_are_finished_and_the_reward_is_followed(search):
    rewards, plain = [], []
    for seed in range(60):
        found = toy().run(search(Node(None), 8, 4, Draws(seed, "p")))
        assert found and all(node.finished for node in found)
        rewards.append(max(node.reward for node in found))
        plain.append(toy().run(searches.samples(Node(None), 1, Draws(seed, "p")))[0].reward)
    assert np.mean(rewards) > np.mean(plain) + 0.1


def test_a_beam_keeps_the_best_and_fills_up_with_copies():
    algorithm = searches.beam(Node(None), 4, 2, Draws(0, "p"))
    first = next(algorithm)
    children = [
        Node(node, (i,), reward=r)
        for i, (node, r) in enumerate(zip(first.nodes, (0.1, 0.9, 0.5, 0.2), strict=True))
    ]
    second = algorithm.send(children)
    assert [node.tokens[0] for node in second.nodes] == [1, 2, 1, 2]
    ends = [Node(node, (9,), reward=0.5, finish="eos") for node in second.nodes[:1]]
    ends += [Node(node, (7,), reward=0.3) for node in second.nodes[1:]]
    third = algorithm.send(ends)
    assert all(node.tokens == (7,) for node in third.nodes) and len(third.nodes) == 4


def test_four_siblings_of_which_one_is_finished():
    """No unfinished text is ever a candidate."""
    algorithm = searches.dvts(Node(None), 4, 4, Draws(0, "p"))
    request = next(algorithm)
    assert isinstance(request, Extend)
    children = [
        Node(n, (i,), reward=0.1 * i, finish="eos" if i == 3 else "") for i, n in enumerate(request.nodes)
    ]
    with pytest.raises(StopIteration) as end:
        algorithm.send(children)
    assert end.value.value == [children[3]]


def test_subtrees_of_dvts_do_not_meet():
    algorithm = searches.dvts(Node(None), 8, 4, Draws(0, "p"))
    request = next(algorithm)
    children = [Node(node, (i,), reward=0.1 * i) for i, node in enumerate(request.nodes)]
    request = algorithm.send(children)
    assert [node.tokens[0] for node in request.nodes] == [3] * 4 + [7] * 4


def test_fewer_beams_than_children_and_a_width_that_does_not_divide():
    assert toy().run(searches.beam(Node(None), 2, 4, Draws(0, "p")))
    with pytest.raises(ValueError, match="nearest that does: 3"):
        next(searches.beam(Node(None), 6, 4, Draws(0, "p")))


def test_side_by_side_is_one_after_the_other():
    several = toy().run(together([searches.samples(Node(None), 3, Draws(0, "p", chain=c)) for c in range(4)]))
    for c, found in enumerate(several):
        alone = toy().run(searches.samples(Node(None), 3, Draws(0, "p", chain=c)))
        assert [toys.symbols(n) for n in found] == [toys.symbols(n) for n in alone]


def test_a_node_is_known_by_its_tokens_and_where_they_were_cut():
    a, b = Node(Node(None), (1, 2)), Node(Node(None), (1, 2))
    assert a.id == b.id != Node(Node(Node(None), (1,)), (2,)).id
    assert len(a.id) == 16
