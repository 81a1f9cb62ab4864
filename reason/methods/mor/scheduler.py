"""Many texts at once, with batches that stay full: rows share a pass through the block at whatever step they are.

A batch whose rows go through the loop together waits for its deepest row, and adaptive depth saves nothing. Here
a row that leaves makes room for another at once ("continuous depth batching"; Schwethelm et al. 2026 measure it on
other looped models). It works because all steps of the loop have the same weights; only keys differ.

A sequence has one token under way, and is in one of four places: *filling* (its text is read, but for the last
token), *entering* (embedding and first layer), *looping* (at some step), *leaving* (last layer, head, the next token).
What is written does not depend on the schedule: not on the rows of a pass, who else is there, or who had to give way.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reason.errors import ConfigError
from reason.methods.mor.cache import MoRCache, OutOfPages, Past
from reason.methods.mor.decode import extend
from reason.methods.mor.generate import Draw, Generation, Request
from reason.methods.mor.pace import Pace, after, chosen, score
from reason.methods.mor.packed import Part, begin, finish, part_with, recurse
from reason.methods.mor.routes import Known

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions


@dataclass
class Work:
    """What a scheduler has done so far."""

    passes: int = 0  # through the block; prompts are counted apart
    rows: int = 0  # in all of these
    read: int = 0  # tokens of prompts, and of texts that were read again
    preempted: int = 0  # times that a sequence gave its pages away


class Scheduler:
    """Decodes any number of requests together.

    Args:
        rows: B_max, rows of a pass through the block.
        exits: B_min, rows that wait behind the loop before last layer and head run for them together; fewer
            where few sequences are under way. None: as many as ``rows``.
        live: sequences under way at most. None: enough to fill the loop while others wait behind it.
        chunk: tokens of prompts that are read between two passes.
        patience: passes that a row may be left out of before it goes first. Before that the deepest go first:
            they soonest bring their sequence to its next token. 0: first come, first served.

    ``submit`` may be called at any time, ``tick`` does one pass, ``run`` does everything.

    Raises:
        ValueError: a number that is too small.
        ConfigError: a network whose recursions are not passes through one block.
    """

    def __init__(
        self, model: MixtureOfRecursions, cache: MoRCache, *, rows: int = 32, exits: int | None = None,
        live: int | None = None, chunk: int = 256, patience: int = 4,
    ):  # fmt: skip
        self.model, self.cache, self.rows = model, cache, rows
        self.exits = rows if exits is None else exits
        self.most = rows + self.exits if live is None else live
        self.chunk, self.patience, self.work = chunk, patience, Work()
        if min(rows, self.exits, self.most, chunk) < 1 or patience < 0:
            raise ValueError("rows, exits, live and chunk must be 1 or more, and patience 0 or more.")
        if not model.decoder.sharing.cyclic:
            raise ConfigError(
                f"backbone.sharing={model.decoder.sharing.scheme} repeats each layer in its place: texts at different "
                "steps have no block in common.",
                "Write one text after another (generate).",
            )
        self._number = self._tick = 0
        self._waiting: list[
            tuple[int, _Live]
        ] = []  # a heap: who came first goes first, also after giving way
        self._live: dict[int, _Live] = {}
        self._filling: dict[int, _Live] = {}
        self._entering: dict[int, _Live] = {}
        self._looping: dict[int, _Live] = {}
        self._leaving: dict[int, _Live] = {}
        self._done: dict[int, Generation] = {}

    def submit(self, request: Request) -> int:
        """Queue a request. Returns its number.

        Raises:
            ConfigError: a route that cannot be decoded with.
        """
        live = _Live(self.model, self._number, request)
        heapq.heappush(self._waiting, (live.number, live))
        self._number += 1
        return live.number

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._live)

    def run(self, requests: Iterable[Request]) -> list[Generation]:
        """Answers to all of these, in their order. What else is done meanwhile, the next ``tick`` tells.

        Raises:
            OutOfPages, ConfigError: as ``tick``; answers that are there already are told by the next one.
        """
        numbers = [self.submit(request) for request in requests]
        done: dict[int, Generation] = {}
        try:
            while not self.idle:
                done |= self.tick()
            return [done.pop(number) for number in numbers]
        finally:
            self._done |= done

    @torch.inference_mode()
    def tick(self) -> dict[int, Generation]:
        """Admit, read some of the prompts, and one pass through the block. Returns who is done, by number.

        Raises:
            OutOfPages: a text that the cache cannot hold even alone; it is dropped.
            ConfigError: a text longer than the depths that are known of it; it is dropped.
        """
        self._tick += 1
        self._admit()
        if self._filling:  # who came first of these reads, whoever came later gives way
            self._room(self._filling[min(self._filling)], self._read)
        if len(self._leaving) >= min(self.exits, max(1, len(self._live) // 2)) or not (
            self._looping or self._entering
        ):
            self._leave()
        if self._entering and len(self._looping) < self.rows:
            self._enter()
        if self._looping:
            self._loop()
        done, self._done = self._done, {}
        return done

    # --- who is under way -----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Begin requests, as long as there are places, and pages for what they have to read."""
        promised = sum(self._pages(live) - live.past.pages for live in self._filling.values())
        while self._waiting and len(self._live) < self.most:
            live = self._waiting[0][1]
            promised += self._pages(live)
            if self._live and promised > self.cache.left:
                return
            heapq.heappop(self._waiting)
            live.past = self.cache.open()
            place = self._filling if len(live.text) > 1 else self._entering
            self._live[live.number] = place[live.number] = live

    def _pages(self, live: _Live) -> int:
        """That reading its text takes at most."""
        depth = np.full(len(live.text), live.pace.cap)
        depth[: len(live.decided)] = live.decided
        return self.cache.pages(depth)

    def _room(self, live: _Live, act: Callable[[], object]) -> bool:
        """Do what takes pages. While there are none, who came last gives way; False if that was ``live`` itself."""
        while live.number in self._live:
            try:
                act()
                return True
            except OutOfPages:
                last = self._live[max(self._live)]
                alone = len(self._live) == 1
                last.settle()
                self._drop(last)
                if alone:
                    raise
                heapq.heappush(self._waiting, (last.number, last))
                self.work.preempted += 1
            except ConfigError:
                self._drop(live)
                raise
        return False

    def _drop(self, live: _Live) -> None:
        for place in (self._live, self._filling, self._entering, self._looping, self._leaving):
            place.pop(live.number, None)
        live.past.free()

    # --- the four places ------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Up to ``chunk`` tokens, packed, of texts but for their last token. What was decided is not decided anew."""
        lives, texts, paces, left = [], [], [], self.chunk
        for _, live in sorted(self._filling.items()):
            start, known, text = live.past.length, len(live.decided), live.text
            again = start < known
            texts.append(text[start : min(known if again else len(text) - 1, start + left)])
            paces.append(Pace(self.model, Known(torch.from_numpy(live.decided))) if again else live.pace)
            lives.append(live)
            left -= len(texts[-1])
            if not left:
                break
        extend(self.model, [live.past for live in lives], texts, paces, "none")
        self.work.read += sum(map(len, texts))
        for live in lives:
            if live.past.length == len(live.text) - 1:
                self._entering[live.number] = self._filling.pop(live.number)

    def _enter(self) -> None:
        """New tokens, up to the loop."""
        for live in list(self._entering.values()):
            if self._room(live, partial(live.begin, self._tick)):
                self._looping[live.number] = self._entering.pop(live.number)
        lives = [live for live in self._looping.values() if live.fresh]
        if not lives:
            return
        device = self.cache.device
        cos, sin = self.model.decoder.rope(torch.tensor([int(live.at[0]) for live in lives], device=device))
        tokens = torch.tensor([live.text[-1] for live in lives], device=device)
        x = begin(self.model.decoder, [live.part for live in lives], tokens, (cos, sin))
        entry, wish = chosen(self.model, x)
        logits = score(self.model, 0, x)[0].tolist()
        for i, (live, *rows) in enumerate(zip(lives, x.split(1), cos.split(1), sin.split(1), strict=True)):
            live.u, live.cos, live.sin = rows
            live.logit = logits[i]
            live.fresh = False
            if entry is not None and wish is not None:
                live.x, live.entry = live.u, entry[i : i + 1]
                live.limit = int(live.pace.limits(live.at, wish[i : i + 1])[0])

    def _loop(self) -> None:
        """A pass through the block; then the next step's router says who stays."""
        turn = self._next()
        for live in turn:
            self._room(live, live.enter)
        lives = [live for live in turn if live.number in self._looping]
        if not lives:
            return
        model, rope = self.model, _angles(lives)
        u = torch.cat([live.u for live in lives])
        logits = torch.tensor([live.logit for live in lives], device=u.device)
        u = model.combine(u, recurse(model.decoder, [live.part for live in lives], u, rope), logits)
        self.work.passes, self.work.rows = self.work.passes + 1, self.work.rows + len(lives)
        for live, row in zip(lives, u.split(1), strict=True):
            live.u, live.taken, live.since = row, live.taken + 1, self._tick
        gone, first = [], 0
        for taken, group in groupby(lives, key=lambda live: live.taken):
            same = list(group)
            if any(taken < live.limit for live in same):
                logits, heard = score(model, taken, u[first : first + len(same)])
                for live, logit, says in zip(same, logits.tolist(), heard.tolist(), strict=True):
                    live.logit = logit
                    if taken >= live.limit or says <= live.pace.bars[taken]:
                        gone.append(live)
            else:
                gone += same
            first += len(same)
        self._part(gone)

    def _next(self) -> list[_Live]:
        """The rows of the next pass, step by step."""
        rows = list(self._looping.values())
        if len(rows) > self.rows:
            overdue = self._tick - self.patience

            def urgency(live: _Live) -> tuple[int, int, int]:
                return (0, live.since, 0) if live.since < overdue else (1, -live.taken, live.since)

            rows = sorted(rows, key=urgency)[: self.rows]
        return sorted(rows, key=lambda live: live.taken)

    def _part(self, lives: list[_Live]) -> None:
        """Out of the loop."""
        early = [live for live in lives if live.taken < self.model.recursions]
        if self.cache.kind == "propagate" and early:
            runs = {}
            for live in early:
                self._room(live, lambda live=live: runs.__setitem__(live.number, live.past.leave(live.at)))
            early = [live for live in early if live.number in self._looping]
            if early:
                u = torch.cat([live.u for live in early])
                parts = [live.part for live in early]
                part_with(self.model.decoder, parts, [runs[live.number] for live in early], u, _angles(early))
        for live in lives:
            if live.number in self._looping:
                self._leaving[live.number] = self._looping.pop(live.number)

    def _leave(self) -> None:
        """Last layer and head, for all that wait."""
        lives = list(self._leaving.values())
        if not lives:
            return
        self._leaving.clear()
        model, u = self.model, torch.cat([live.u for live in lives])
        if model.by_token is not None:
            x, entry = torch.cat([live.x for live in lives]), torch.cat([live.entry for live in lives])
            u = after(model, x, u, entry, lambda: np.array([live.taken for live in lives]))
        hidden = finish(model.decoder, [live.part for live in lives], u, _angles(lives))
        self._answer(lives, model.decoder.logits(hidden))

    def _answer(self, lives: list[_Live], logits: Tensor) -> None:
        """The next token of each, of logits (n, V): on to the entry, or done."""
        best = logits.argmax(-1).tolist()
        for i, live in enumerate(lives):
            token = live.draw(logits[i]) if live.request.sampling.temperature else best[i]
            stopped = token in live.request.stop
            if not stopped:
                live.written.append(token)
            if stopped or len(live.written) == live.request.most:
                self._done[live.number] = Generation(live.written, stopped, live.past.depth.astype(np.int64))
                self._drop(live)
            else:
                self._entering[live.number] = live


class _Live:
    """A request, and the token of it that is under way. Its rows are (1, ...).

    number: its place in the order of arrival.
    decided: depths of the first tokens, from before it gave way.
    fresh: whether the token has begun and is not computed up to the loop.
    since: the tick in which it entered the loop, or last took a step.
    """

    past: Past
    u: Tensor  # its state
    cos: Tensor
    sin: Tensor
    x: Tensor  # the state it entered the loop with, and what a token-choice router said of that
    entry: Tensor

    def __init__(self, model: MixtureOfRecursions, number: int, request: Request):
        self.number, self.request = number, request
        self.pace, self.draw = Pace(model, request.route, request.cap), Draw(request.sampling)
        self.pace.limits(np.array([len(request.prompt) - 1]))  # refused here rather than in the middle
        self.written: list[int] = []
        self.decided = np.zeros(0, np.int64)
        self.at, self.taken, self.limit, self.logit = np.zeros(1, np.int64), 0, 0, 0.0
        self.fresh, self.since = True, 0

    @property
    def text(self) -> list[int]:
        return [*self.request.prompt, *self.written]

    @property
    def part(self) -> Part:
        return Part(self.past, self.at, self.taken)

    def begin(self, tick: int) -> None:
        """Its new token begins."""
        at = np.array([self.past.length])
        self.limit = int(self.pace.limits(at)[0])
        self.past.begin(1)
        self.at, self.taken, self.since, self.fresh = at, 0, tick, True

    def enter(self) -> None:
        """Its token takes the step that it stands before."""
        self.past.enter(self.taken, self.at)

    def settle(self) -> None:
        """Remember the depths of what was read, but for the last token, which may not have been decided."""
        depth = self.past.depth[: len(self.text) - 1]
        if len(depth) > len(self.decided):
            self.decided = depth.astype(np.int64)


def _angles(lives: list[_Live]) -> tuple[Tensor, Tensor]:
    return torch.cat([live.cos for live in lives]), torch.cat([live.sin for live in lives])
