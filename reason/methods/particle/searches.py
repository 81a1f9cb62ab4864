"""The rivals of particle filtering, by their exact definitions, on the same policy and reward.

Whole samples (self-consistency and best-of-n choose among them), beam search and DVTS (diverse verifier tree search), the
last two after Beeching et al. 2024 (search-and-learn). Two things of that code are mended: no unfinished text is ever
a candidate, and a beam that is finished is not extended again.
"""

from __future__ import annotations

import numpy as np

from reason.errors import ConfigError
from reason.methods.particle.lineage import Node
from reason.methods.particle.requests import Algorithm, Draws, Extend, Halted, Slots


def samples(root: Node, count: int, draws: Draws, scored: bool | str = "finished") -> Algorithm[list[Node]]:
    """``count`` whole solutions, drawn independently; as a rule only finished ones get a reward."""
    slots = Slots(root, count, draws)
    try:
        while moved := slots.unfinished():
            yield from slots.extend(moved, scored)
    except Halted:
        pass
    return slots.nodes


def greedy(root: Node) -> Algorithm[Node]:
    """The solution of the likeliest tokens."""
    node = root
    try:
        while not node.finished:
            (node,) = yield Extend(
                [node], np.zeros(1, np.uint64), np.zeros(1, np.int64), "finished", greedy=True
            )
    except Halted:
        pass
    return node


def beam(root: Node, beams: int, width: int, draws: Draws) -> Algorithm[list[Node]]:
    """Beam search: each round adds a chunk to every beam, and copies the best ``beams / width`` until
    there are as many as before.

    Finished beams leave and are collected, and the search ends when as many as ``beams`` are, or nothing is left.

    Raises:
        ConfigError: ``width`` does not divide ``beams``.
    """
    width = _width(beams, width)
    slots, collected = Slots(root, beams, draws), []
    try:
        while active := slots.unfinished():
            yield from slots.extend(active)
            collected += [slots.nodes[slot] for slot in active if slots.nodes[slot].finished]
            alive = slots.unfinished()
            if len(collected) >= beams or not alive:
                break
            best = sorted(alive, key=lambda slot: -slots.nodes[slot].reward)[: beams // width]
            kept = [slots.nodes[slot] for slot in best]
            slots.nodes = [kept[i % len(kept)] for i in range(beams)]
    except Halted:
        pass
    return collected


def dvts(root: Node, beams: int, width: int, draws: Draws) -> Algorithm[list[Node]]:
    """``beams / width`` independent subtrees, each of which samples ``width`` chunks and goes on with its best one.

    A subtree ends when its best chunk finishes the solution; its candidates are those of the last ``width`` that did.

    Raises:
        ConfigError: ``width`` does not divide ``beams``.
    """
    width = _width(beams, width)
    slots, collected = Slots(root, beams, draws), []
    try:
        while active := slots.unfinished():
            yield from slots.extend(active)
            for first in range(0, beams, width):
                siblings = slots.nodes[first : first + width]
                if siblings[0] is _DONE:
                    continue
                best = max(siblings, key=lambda node: node.reward)
                if best.finished:
                    collected += [node for node in siblings if node.finished]
                    best = _DONE
                slots.nodes[first : first + width] = [best] * width
    except Halted:
        pass
    return collected


def _width(beams: int, width: int) -> int:
    """Children of a beam: ``width``, or all where there are fewer beams."""
    width = min(width, beams)
    if beams % width:
        raise ConfigError(
            f"Beam search with {beams} beams cannot keep {beams} / {width} of them.",
            f"particle.beam_width must divide the depth; the nearest that does: "
            f"{max(k for k in range(1, width + 1) if beams % k == 0)}",
        )
    return width


_DONE = Node(None, finish="left")  # in a slot that is no longer used
