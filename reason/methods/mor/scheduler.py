"""Continuous depth batching: many sequences at once, in batches whose rows may be at different steps of the loop.

A batch whose rows go through the loop together waits for its deepest row, and adaptive depth saves nothing. Here
a row that exits makes room for another at once (Schwethelm et al. 2026 measure it on other looped models). It works
because all steps of the loop have the same weights; only keys differ.

A sequence has one token in progress, and is in one of four states: *prefilling* (its text is read, but for the last
token), *entering* (embedding and first layer), *looping* (at some step), *leaving* (last layer, head, the next token).
The text does not depend on the schedule: not on the rows of a pass, the other sequences, or preemption.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from reason.backbones.generation import Sampler
from reason.errors import ConfigError
from reason.methods.mor.cache import MoRCache, OutOfPages, Past
from reason.methods.mor.cached_pass import Segment, begin, finish, recurse, write_exit_keys
from reason.methods.mor.decode import extend
from reason.methods.mor.generate import Generation, GenerationRequest
from reason.methods.mor.halting import HaltingRule, choose_depths, exit_states, router_logits
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.token_selection import KnownDepths


@dataclass
class SchedulerStats:
    """Counters of a scheduler since it was made."""

    passes: int = 0  # through the block; prompts are counted apart
    rows: int = 0  # in all of these
    prefilled: int = 0  # tokens of prompts, and of texts that were read again after preemption
    preempted: int = 0  # times that a sequence lost its pages to another


class Scheduler:
    """Decodes any number of requests together.

    Args:
        rows: B_max, rows of a pass through the block.
        exits: B_min, rows that wait behind the loop before last layer and head run for them together; fewer
            where few sequences are in progress. None: as many as ``rows``.
        max_sequences: sequences in progress at most. None: enough to fill the loop while others wait behind it.
        chunk: tokens of prompts that are read between two passes.
        patience: passes that a row may wait for before it goes first. Before that the deepest go first: they are
            nearest to the next token of their sequence. 0: first come, first served.

    ``submit`` may be called at any time, ``tick`` does one pass, ``run`` does everything.

    Raises:
        ValueError: a number that is too small.
        ConfigError: a network whose recursions are not passes through one block.
    """

    def __init__(
        self, model: MixtureOfRecursions, cache: MoRCache, *, rows: int = 32, exits: int | None = None,
        max_sequences: int | None = None, chunk: int = 256, patience: int = 4,
    ):  # fmt: skip
        self.model, self.cache, self.rows = model, cache, rows
        self.exits = rows if exits is None else exits
        self.max_sequences = rows + self.exits if max_sequences is None else max_sequences
        self.chunk, self.patience, self.stats = chunk, patience, SchedulerStats()
        if min(rows, self.exits, self.max_sequences, chunk) < 1 or patience < 0:
            raise ValueError(
                "rows, exits, max_sequences and chunk must be 1 or more, and patience 0 or more."
            )
        if not model.decoder.sharing.cyclic:
            raise ConfigError(
                f"backbone.sharing={model.decoder.sharing.scheme} repeats each layer in its place: sequences at "
                "different steps have no block in common.",
                "Generate one text after another (generate).",
            )
        self._number = self._tick = 0
        self._waiting: list[
            tuple[int, _Sequence]
        ] = []  # a heap: first come, first served, also after preemption
        self._running: dict[int, _Sequence] = {}
        self._prefilling: dict[int, _Sequence] = {}
        self._entering: dict[int, _Sequence] = {}
        self._looping: dict[int, _Sequence] = {}
        self._leaving: dict[int, _Sequence] = {}
        self._done: dict[int, Generation] = {}

    def submit(self, request: GenerationRequest) -> int:
        """Queue a request. Returns its number.

        Raises:
            ConfigError: a route that cannot be decoded with.
        """
        seq = _Sequence(self.model, self._number, request)
        heapq.heappush(self._waiting, (seq.number, seq))
        self._number += 1
        return seq.number

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or in progress."""
        return not (self._waiting or self._running)

    def run(self, requests: Iterable[GenerationRequest]) -> list[Generation]:
        """Generate all of these, in their order. Other requests that finish meanwhile are returned by the next ``tick``.

        Raises:
            OutOfPages, ConfigError: as ``tick``; what is finished already is returned by the next one.
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
        """Admit requests, prefill some of the prompts, and do one pass through the block. Returns the finished, by number.

        Raises:
            OutOfPages: a text that does not fit the cache even alone; it is dropped.
            ConfigError: a text longer than its known depths; it is dropped.
        """
        self._tick += 1
        self._admit()
        if self._prefilling:  # the earliest of these reads; later ones may be preempted
            self._with_pages(self._prefilling[min(self._prefilling)], self._prefill)
        if len(self._leaving) >= min(self.exits, max(1, len(self._running) // 2)) or not (
            self._looping or self._entering
        ):
            self._finish()
        if self._entering and len(self._looping) < self.rows:
            self._enter()
        if self._looping:
            self._loop()
        done, self._done = self._done, {}
        return done

    # --- admission and preemption -----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start requests, while there are free sequences, and free pages for the text they have to read."""
        promised = sum(self._pages_needed(seq) - seq.past.pages for seq in self._prefilling.values())
        while self._waiting and len(self._running) < self.max_sequences:
            seq = self._waiting[0][1]
            promised += self._pages_needed(seq)
            if self._running and promised > self.cache.free_pages:
                return
            heapq.heappop(self._waiting)
            seq.past = self.cache.open()
            place = self._prefilling if len(seq.text) > 1 else self._entering
            self._running[seq.number] = place[seq.number] = seq

    def _pages_needed(self, seq: _Sequence) -> int:
        """Pages that reading its text needs at most."""
        depth = np.full(len(seq.text), seq.rule.cap)
        depth[: len(seq.known_depth)] = seq.known_depth
        return self.cache.pages_needed(depth)

    def _with_pages(self, seq: _Sequence, act: Callable[[], object]) -> bool:
        """Do what allocates pages. While too few are free, preempt the latest sequence; False if that was ``seq`` itself."""
        while seq.number in self._running:
            try:
                act()
                return True
            except OutOfPages:
                last = self._running[max(self._running)]
                alone = len(self._running) == 1
                last.remember_depths()
                self._drop(last)
                if alone:
                    raise
                heapq.heappush(self._waiting, (last.number, last))
                self.stats.preempted += 1
            except ConfigError:
                self._drop(seq)
                raise
        return False

    def _drop(self, seq: _Sequence) -> None:
        for place in (self._running, self._prefilling, self._entering, self._looping, self._leaving):
            place.pop(seq.number, None)
        seq.past.free()

    # --- the four states ------------------------------------------------------------------------------------

    def _prefill(self) -> None:
        """Read up to ``chunk`` tokens, packed, of texts but for their last token. Depths decided before are kept."""
        seqs, texts, rules, budget = [], [], [], self.chunk
        for _, seq in sorted(self._prefilling.items()):
            start, known, text = seq.past.length, len(seq.known_depth), seq.text
            again = start < known
            texts.append(text[start : min(known if again else len(text) - 1, start + budget)])
            rules.append(
                HaltingRule(self.model, KnownDepths(torch.from_numpy(seq.known_depth))) if again else seq.rule
            )
            seqs.append(seq)
            budget -= len(texts[-1])
            if not budget:
                break
        extend(self.model, [seq.past for seq in seqs], texts, rules, "none")
        self.stats.prefilled += sum(map(len, texts))
        for seq in seqs:
            if seq.past.length == len(seq.text) - 1:
                self._entering[seq.number] = self._prefilling.pop(seq.number)

    def _enter(self) -> None:
        """Bring new tokens to the loop."""
        for seq in list(self._entering.values()):
            if self._with_pages(seq, partial(seq.begin, self._tick)):
                self._looping[seq.number] = self._entering.pop(seq.number)
        seqs = [seq for seq in self._looping.values() if seq.fresh]
        if not seqs:
            return
        device = self.cache.device
        cos, sin = self.model.decoder.rope(
            torch.tensor([int(seq.positions[0]) for seq in seqs], device=device)
        )
        tokens = torch.tensor([seq.text[-1] for seq in seqs], device=device)
        x = begin(self.model.decoder, [seq.segment for seq in seqs], tokens, (cos, sin))
        entry, choice = choose_depths(self.model, x)
        logits = router_logits(self.model, 0, x)[0].tolist()
        for i, (seq, *rows) in enumerate(zip(seqs, x.split(1), cos.split(1), sin.split(1), strict=True)):
            seq.u, seq.cos, seq.sin = rows
            seq.logit = logits[i]
            seq.fresh = False
            if entry is not None and choice is not None:
                seq.x, seq.entry = seq.u, entry[i : i + 1]
                seq.max_depth = int(seq.rule.max_depths(seq.positions, choice[i : i + 1])[0])

    def _loop(self) -> None:
        """A pass through the block; then the next step's router decides which tokens stay."""
        chosen = self._next_rows()
        for seq in chosen:
            self._with_pages(seq, seq.enter)
        seqs = [seq for seq in chosen if seq.number in self._looping]
        if not seqs:
            return
        model, rope = self.model, _ropes(seqs)
        u = torch.cat([seq.u for seq in seqs])
        logits = torch.tensor([seq.logit for seq in seqs], device=u.device)
        u = model.combine(u, recurse(model.decoder, [seq.segment for seq in seqs], u, rope), logits)
        self.stats.passes, self.stats.rows = self.stats.passes + 1, self.stats.rows + len(seqs)
        for seq, row in zip(seqs, u.split(1), strict=True):
            seq.u, seq.step, seq.since = row, seq.step + 1, self._tick
        exiting, first = [], 0
        for step, group in groupby(seqs, key=lambda seq: seq.step):
            same = list(group)
            if any(step < seq.max_depth for seq in same):
                logits, deciding = router_logits(model, step, u[first : first + len(same)])
                for seq, logit, deciding_logit in zip(same, logits.tolist(), deciding.tolist(), strict=True):
                    seq.logit = logit
                    if step >= seq.max_depth or deciding_logit <= seq.rule.thresholds[step]:
                        exiting.append(seq)
            else:
                exiting += same
            first += len(same)
        self._exit_loop(exiting)

    def _next_rows(self) -> list[_Sequence]:
        """The rows of the next pass, step by step."""
        rows = list(self._looping.values())
        if len(rows) > self.rows:
            overdue = self._tick - self.patience

            def urgency(seq: _Sequence) -> tuple[int, int, int]:
                return (0, seq.since, 0) if seq.since < overdue else (1, -seq.step, seq.since)

            rows = sorted(rows, key=urgency)[: self.rows]
        return sorted(rows, key=lambda seq: seq.step)

    def _exit_loop(self, seqs: list[_Sequence]) -> None:
        """Move sequences out of the loop."""
        early = [seq for seq in seqs if seq.step < self.model.recursions]
        if self.cache.kv_mode == "propagate" and early:
            spans = {}
            for seq in early:
                self._with_pages(
                    seq, lambda seq=seq: spans.__setitem__(seq.number, seq.past.exit(seq.positions))
                )
            early = [seq for seq in early if seq.number in self._looping]
            if early:
                u = torch.cat([seq.u for seq in early])
                segments = [seq.segment for seq in early]
                write_exit_keys(
                    self.model.decoder, segments, [spans[seq.number] for seq in early], u, _ropes(early)
                )
        for seq in seqs:
            if seq.number in self._looping:
                self._leaving[seq.number] = self._looping.pop(seq.number)

    def _finish(self) -> None:
        """Last layer and head, for all rows that wait."""
        seqs = list(self._leaving.values())
        if not seqs:
            return
        self._leaving.clear()
        model, u = self.model, torch.cat([seq.u for seq in seqs])
        if model.by_token is not None:
            x, entry = torch.cat([seq.x for seq in seqs]), torch.cat([seq.entry for seq in seqs])
            u = exit_states(model, x, u, entry, lambda: np.array([seq.step for seq in seqs]))
        hidden = finish(model.decoder, [seq.segment for seq in seqs], u, _ropes(seqs))
        self._next_tokens(seqs, model.decoder.logits(hidden))

    def _next_tokens(self, seqs: list[_Sequence], logits: Tensor) -> None:
        """Sample the next token of each from logits (n, V): on to the entry, or finished."""
        best = logits.argmax(-1).tolist()
        for i, seq in enumerate(seqs):
            token = seq.sample(logits[i]) if seq.request.sampling.temperature else best[i]
            stopped = token in seq.request.stop
            if not stopped:
                seq.written.append(token)
            if stopped or len(seq.written) == seq.request.max_tokens:
                self._done[seq.number] = Generation(seq.written, stopped, seq.past.depth.astype(np.int64))
                self._drop(seq)
            else:
                self._entering[seq.number] = seq


class _Sequence:
    """A request, and the token of it that is in progress. Its rows are (1, ...).

    number: its place in the order of arrival.
    known_depth: depths of the first tokens, from before it was preempted.
    step: recursions that the token took so far.
    fresh: whether the token was appended and is not computed up to the loop.
    since: the tick in which it entered the loop, or last took a step.
    """

    past: Past
    u: Tensor  # its state
    cos: Tensor
    sin: Tensor
    x: Tensor  # the state it entered the loop with, and the logits of a token-choice router for it
    entry: Tensor

    def __init__(self, model: MixtureOfRecursions, number: int, request: GenerationRequest):
        self.number, self.request = number, request
        self.rule, self.sample = (
            HaltingRule(model, request.route, request.cap),
            Sampler(request.sampling, request.seed),
        )
        self.rule.max_depths(np.array([len(request.prompt) - 1]))  # refused here rather than halfway
        self.written: list[int] = []
        self.known_depth = np.zeros(0, np.int64)
        self.positions, self.step, self.max_depth, self.logit = np.zeros(1, np.int64), 0, 0, 0.0
        self.fresh, self.since = True, 0

    @property
    def text(self) -> list[int]:
        return [*self.request.prompt, *self.written]

    @property
    def segment(self) -> Segment:
        return Segment(self.past, self.positions, self.step)

    def begin(self, tick: int) -> None:
        """Append its new token."""
        positions = np.array([self.past.length])
        self.max_depth = int(self.rule.max_depths(positions)[0])
        self.past.append(1)
        self.positions, self.step, self.since, self.fresh = positions, 0, tick, True

    def enter(self) -> None:
        """Its token takes its next step."""
        self.past.enter(self.step, self.positions)

    def remember_depths(self) -> None:
        """Remember the depths of the tokens that were read, but for the last one, which may be undecided."""
        depth = self.past.depth[: len(self.text) - 1]
        if len(depth) > len(self.known_depth):
            self.known_depth = depth.astype(np.int64)


def _ropes(seqs: list[_Sequence]) -> tuple[Tensor, Tensor]:
    return torch.cat([seq.cos for seq in seqs]), torch.cat([seq.sin for seq in seqs])
