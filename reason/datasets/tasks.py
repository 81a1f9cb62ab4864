"""Made-up languages in which the number of steps that an answer takes is known: p-hop, chains, listops, mixed-stream.

A word is a symbol, and a document is complete: what its answers depend on stands in it. Supervised are the
answers, with the steps they take as their level, and the ``=`` before each, with level 0: it is predictable
at sight. All else is random and asks for nothing.

    p-hop        a map over symbols, as pairs; then ``? p x = y``: y is where p steps from x lead. Level p.
    chains       ``a = 3 ; b = a + 5 ; ...`` modulo m, chains interleaved; then the end of each is asked for.
                 Level: the chain's assignments.
    listops      ``[MAX 2 9 [MIN 4 7 ] ] = 9`` (Nangia and Bowman, arXiv 1804.06028). Level: nested operations
                 that the value depends on.
    mixed-stream the map of p-hop, then words that follow from the two before them (level 0), with questions
                 strewn in.

Levels are exact, not nominal: an example that has a shorter way to its answer is drawn anew (p-hop,
mixed-stream), cannot be drawn (chains), or is labelled by the shorter way (listops).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from reason.datasets.documents import Corpus, Documents, TextData, finish
from reason.datasets.generated import Words, distinct, names
from reason.datasets.textconfig import (
    ChainsConfig,
    GeneratedKeys,
    HopConfig,
    ListOpsConfig,
    MixedStreamConfig,
)
from reason.errors import DataError


def load(config: GeneratedKeys, offline: bool = False) -> TextData:
    """Generate the task whose configuration this is. Nothing is fetched, so ``offline`` is moot.

    Raises:
        DataError: too few different documents of these sizes, or training lacks a word.
    """
    write = WRITERS[type(config)](config)
    documents = distinct(write, lambda words: words.text, config)
    parts = {
        split: Documents(names(split, len(several)), [w.text for w in several], [w.spans for w in several])
        for split, several in documents.items()
    }
    known = {word for text in parts["train"].text for word in text.split(" ")}
    for split in ("valid", "test"):
        if strange := {word for text in parts[split].text for word in text.split(" ")} - known:
            raise DataError(
                f"{config.name}: {min(strange)!r} occurs in {split}, but in no training document.",
                "Raise dataset.train_documents.",
            )
    levels = sorted({level for part in parts.values() for spans in part.levels or [] for *_, level in spans})
    return finish(config.name, Corpus.of(parts, words=True), {"levels": f"{levels[0]} to {levels[-1]}"})


# --- p-hop --------------------------------------------------------------------------------------------


class Map:
    """One cycle through all symbols, and the questions asked about it so far."""

    def __init__(self, symbols: int, rng: random.Random):
        self.ring = rng.sample(range(symbols), symbols)  # each symbol leads to the next
        self._joined: dict[int, list[int]] = {}  # by place on the ring, what earlier answers join to it

    def say(self, words: Words, rng: random.Random) -> None:
        pairs = list(zip(self.ring, self.ring[1:] + self.ring[:1], strict=True))
        rng.shuffle(pairs)
        words.say(*(f"s{symbol}" for pair in pairs for symbol in pair))

    def ask(self, words: Words, hops: int, rng: random.Random) -> None:
        """A question whose answer is ``hops`` steps away, or the most that is to be had below that."""
        size = len(self.ring)
        first = rng.randrange(size)
        for far in range(hops, 0, -1):
            for start in (*range(first, size), *range(first)):
                end = (start + far) % size
                if not self._nearer(start, end, far):
                    words.say("?", str(far), f"s{self.ring[start]}")
                    words.say("=", level=0)
                    words.say(f"s{self.ring[end]}", level=far)
                    self._joined.setdefault(start, []).append(end)
                    self._joined.setdefault(end, []).append(start)
                    return

    def _nearer(self, start: int, end: int, hops: int) -> bool:
        """Whether fewer steps than ``hops`` lead to ``end``: along the map or back, or across by an answer."""
        size, reached, edge = len(self.ring), {start}, {start}
        for _ in range(hops - 1):
            near = {n for i in edge for n in ((i + 1) % size, (i - 1) % size, *self._joined.get(i, ()))}
            edge = near - reached
            reached |= edge
        return end in reached


def p_hop(keys: HopConfig) -> Callable[[random.Random], Words]:
    def write(rng: random.Random) -> Words:
        words, ring = Words(), Map(keys.symbols, rng)
        ring.say(words, rng)
        for _ in range(keys.queries):
            ring.ask(words, rng.randint(1, keys.hops), rng)
        return words

    return write


# --- chains -------------------------------------------------------------------------------------------


def chains(keys: ChainsConfig) -> Callable[[random.Random], Words]:
    """Every operation is reversible, so no part of a chain can be left out of its value."""
    modulus = keys.modulus
    factors = [n for n in range(2, modulus) if math.gcd(n, modulus) == 1]
    signs = ["+", "-", *("*" if factors else "")]

    def write(rng: random.Random) -> Words:
        lengths = [rng.randint(1, keys.depth) for _ in range(keys.chains)]
        fresh = iter(rng.sample(range(keys.chains * keys.depth), sum(lengths)))
        turns = [chain for chain, length in enumerate(lengths) for _ in range(length)]
        rng.shuffle(turns)
        words = Words()
        name, value = [""] * keys.chains, [0] * keys.chains
        for chain in turns:
            before, name[chain] = name[chain], f"x{next(fresh)}"
            if not before:
                value[chain] = rng.randrange(modulus)
                words.say(name[chain], "=", str(value[chain]), ";")
                continue
            sign = rng.choice(signs)
            number = rng.choice(factors) if sign == "*" else rng.randrange(1, modulus)
            moved = {"+": value[chain] + number, "-": value[chain] - number, "*": value[chain] * number}[sign]
            value[chain] = moved % modulus
            words.say(name[chain], "=", before, sign, str(number), ";")
        for chain in rng.sample(range(keys.chains), keys.chains):
            words.say("?", name[chain])
            words.say("=", level=0)
            words.say(str(value[chain]), level=lengths[chain])
        return words

    return write


# --- listops ------------------------------------------------------------------------------------------

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "MAX": max,
    "MIN": min,
    "MED": lambda values: sorted(values)[(len(values) - 1) // 2],  # the lower one of two
    "SUM": sum,
}


class Expression:
    """A digit, or an operation on expressions, with its value and its level.

    The level is the height of the lowest part of the tree that settles the value, whatever the rest may be:
    ``[MAX 9 [...] ]`` is 9 at level 1 if digits end at 9.
    """

    def __init__(self, words: list[str], value: int, level: int):
        self.words, self.value, self.level = words, value, level

    @classmethod
    def of(cls, operator: str, arguments: list[Expression], modulus: int) -> Expression:
        words = [f"[{operator}", *(word for a in arguments for word in a.words), "]"]
        value = OPERATORS[operator]([a.value for a in arguments]) % modulus
        level = next(
            level
            for level in sorted({a.level for a in arguments})
            if settled(operator, [a.value if a.level <= level else None for a in arguments], modulus)
        )
        return cls(words, value, level + 1)


def settled(operator: str, values: list[int | None], modulus: int) -> bool:
    """Whether the result is the same whatever the values are that are not known (None)."""
    if None not in values:
        return True
    if operator == "SUM":
        return False
    ends = ([fill if v is None else v for v in values] for fill in (0, modulus - 1))
    return len(set(map(OPERATORS[operator], ends))) == 1  # the others rise with each of their arguments


def list_ops(keys: ListOpsConfig) -> Callable[[random.Random], Words]:
    signs = list(OPERATORS)

    def grow(level: int, rng: random.Random) -> Expression:
        """An expression of exactly ``level``: around one of the level below, redrawn until that one matters."""
        if level == 0:
            digit = rng.randrange(keys.modulus)
            return Expression([str(digit)], digit, 0)
        inner = grow(level - 1, rng)
        while True:
            count = rng.randint(2, keys.arguments) - 1
            rest = [grow(rng.randint(0, level - 1) if rng.random() < 0.25 else 0, rng) for _ in range(count)]
            rest.insert(rng.randint(0, count), inner)
            found = Expression.of(rng.choice(signs), rest, keys.modulus)
            if found.level == level:
                return found

    def write(rng: random.Random) -> Words:
        words = Words()
        said = set()
        for _ in range(keys.expressions):
            level = rng.randint(1, keys.depth)
            found = grow(level, rng)
            while level > 1 and tuple(found.words) in said:  # its answer stands there already
                found = grow(level, rng)
            said.add(tuple(found.words))
            words.say(*found.words)
            words.say("=", level=0)
            words.say(str(found.value), level=found.level)
        return words

    return write


# --- mixed-stream -------------------------------------------------------------------------------------


def mixed_stream(keys: MixedStreamConfig) -> Callable[[random.Random], Words]:
    """The rule of the predictable words is one for all documents: it depends on the seed alone."""
    table = random.Random(f"{keys.seed} filler")
    follows = [[table.randrange(keys.filler) for _ in range(keys.filler)] for _ in range(keys.filler)]

    def write(rng: random.Random) -> Words:
        words, ring = Words(), Map(keys.symbols, rng)
        ring.say(words, rng)
        words.say("|")
        end = len(words) + keys.length
        rest = keys.length - 5 * keys.queries
        places = sorted(rng.randint(0, rest) for _ in range(keys.queries))
        runs = [b - a for a, b in zip([0, *places], [*places, rest], strict=True)]
        for number, run in enumerate(runs):
            said = [rng.randrange(keys.filler), rng.randrange(keys.filler)]
            while len(said) < run:
                said.append(follows[said[-2]][said[-1]])
            plain = [f"w{word}" for word in said[:run]]
            words.say(*plain[:2])
            words.say(*plain[2:], level=0)
            if number < keys.queries:
                ring.ask(words, rng.randint(1, keys.hops), rng)
        assert len(words) == end
        return words

    return write


WRITERS: dict[type, Callable[[Any], Callable[[random.Random], Words]]] = {
    HopConfig: p_hop,
    ChainsConfig: chains,
    ListOpsConfig: list_ops,
    MixedStreamConfig: mixed_stream,
}
