"""Depth on demand: one state machine that answers a batch of requests, each at a depth of its own.

``Reasoning`` encodes, takes one latent step at a time, and reads the state that would answer now; when to stop
is decided elsewhere: a fixed depth, a stop test, a router and the clock are policies on top of the same
loop. Rows that stop leave at once, so a batch pays for the depth that it uses; a single request simply
breaks out. The states do not depend on how many steps follow (nothing is noisy at inference), which is
what makes an early exit the same as running all steps and picking one.

Knows the encoder and the readout; knows no stop test and no threshold (``policy``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from reason.methods.latent import objective

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder
    from reason.methods.latent.config import LatentConfig


@dataclass(frozen=True)
class ItemEmbeddings:
    """The vectors that a trained encoder scores the N items with, in both orders of memory."""

    vectors: Tensor  # (N, d)
    columns: Tensor  # (d, N), contiguous: a CPU scores a single request faster by columns than by rows

    @classmethod
    def of(cls, model: SequenceEncoder) -> ItemEmbeddings:
        vectors = model.item_vectors()
        return cls(vectors, vectors.T.contiguous())

    def __len__(self) -> int:
        return len(self.vectors)

    def scores(self, state: Tensor) -> Tensor:
        """(A, d) -> (A, N)."""
        return state @ self.columns


class Reasoning:
    """A batch of requests in the midst of reasoning. A rows are active, ``row`` says which of the B they are."""

    def __init__(
        self, config: LatentConfig, model: SequenceEncoder, embeddings: ItemEmbeddings, items: Tensor, length: Tensor, depth: int
    ):  # fmt: skip
        """Start: encode. items: (B, T) padded on the right; length: (B,)."""
        self.config, self.model, self.embeddings = config, model, embeddings
        self.items, self.length, self.depth = items, length, depth
        self.thought = model.start(items, length, depth, embeddings.vectors)
        self.row: Tensor | None = None  # (A,) of the B; None: all of them, in order
        self.first = self.thought.state  # (A, d), r_0
        self.previous: Tensor | None = None  # (A, d), r_(k-1)
        self._sum = self.thought.state if objective.reads_mean(config) else None  # (A, d)

    @property
    def k(self) -> int:
        """Steps taken so far."""
        return self.thought.step

    @property
    def state(self) -> Tensor:
        """(A, d), r_k."""
        return self.thought.state

    def step(self) -> None:
        """Take one latent step in every active row."""
        self.previous = self.thought.state
        state = self.model.advance(self.thought)
        if self._sum is not None:
            self._sum = self._sum + state

    def read(self) -> Tensor:
        """(A, d), the state that answers if a row stops now."""
        return self.thought.state if self._sum is None else self._sum / (self.k + 1)

    def read_before(self) -> Tensor:
        """(A, d), the state that would have answered one step ago."""
        assert self.previous is not None
        return self.previous if self._sum is None else (self._sum - self.thought.state) / self.k

    def keep(self, rows: Tensor, compact: float) -> None:
        """Go on with ``rows`` (ascending positions among the A) alone."""
        self.thought.keep(rows, compact=compact)
        self.first = self.first.index_select(0, rows)
        self.row = rows if self.row is None else self.row.index_select(0, rows)
        if self.previous is not None:
            self.previous = self.previous.index_select(0, rows)
        if self._sum is not None:
            self._sum = self._sum.index_select(0, rows)


class StopTest(Protocol):
    """What decides, after each step, which rows stop."""

    def __call__(self, run: Reasoning) -> Tensor:
        """(A,) bool: the active rows that stop here."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Forget what is remembered of all but ``rows`` of the active ones."""
        ...


@dataclass
class ReasoningOutput:
    """The states that a batch stopped at."""

    state: Tensor  # (B, d), the state that answers, at each row's own depth
    depth: Tensor  # (B,) int64, on the CPU: steps taken
    out_of_time: bool = False  # the clock stopped what was still active
    step_cosine: Tensor | None = None  # (B,), if asked for: of the last two states; 1 where no step was taken


def run_steps(
    run: Reasoning,
    test: StopTest | None = None,
    *,
    out_of_time: Callable[[int], bool] | None = None,
    compact: float = 0.75,
    with_cosine: bool = False,
) -> ReasoningOutput:
    """Take steps until ``test`` stops a row, the depth is reached, or no time is left for another step.

    Args:
        out_of_time: whether step k + 1 would end too late, called with k.
        compact: see ``Thought.keep``.
        with_cosine: also give the cosine of the last two states of each row.
    """
    rows = len(run.items)
    output: ReasoningOutput | None = None
    timed_out = False
    while True:
        last = run.k >= run.depth
        if not last and test is not None:
            stop = test(run)
            if rows == 1:
                last = bool(stop)
            elif len(leaving := stop.nonzero().squeeze(1)):
                if len(leaving) == len(stop):
                    last = True
                else:
                    output = output or _empty_output(run, rows, with_cosine)
                    _write(run, leaving, output)
                    staying = (~stop).nonzero().squeeze(1)
                    test.keep(staying)
                    run.keep(staying, compact)
        if not last and out_of_time is not None and out_of_time(run.k):
            last = timed_out = True
        if last:
            if output is None:  # all rows leave together
                cosine = _cosine(run) if with_cosine else None
                return ReasoningOutput(run.read(), torch.full((rows,), run.k), timed_out, cosine)
            _write(run, None, output)
            output.out_of_time = timed_out
            return output
        run.step()


def _empty_output(run: Reasoning, rows: int, with_cosine: bool) -> ReasoningOutput:
    """Room for the states of rows that leave one after the other."""
    state = run.state
    return ReasoningOutput(
        state.new_empty(rows, state.shape[1]),
        torch.zeros(rows, dtype=torch.int64),
        step_cosine=state.new_ones(rows) if with_cosine else None,
    )


def _write(run: Reasoning, leaving: Tensor | None, output: ReasoningOutput) -> None:
    """Write the states of the rows ``leaving`` of the active ones (None: all) to their places."""

    def chosen(x: Tensor) -> Tensor:
        return x if leaving is None else x.index_select(0, leaving)

    everyone = torch.arange(len(run.state), device=run.state.device) if run.row is None else run.row
    where = chosen(everyone)
    output.state.index_copy_(0, where, chosen(run.read()))
    output.depth[where.cpu()] = run.k
    if output.step_cosine is not None:
        output.step_cosine.index_copy_(0, where, chosen(_cosine(run)))


def _cosine(run: Reasoning) -> Tensor:
    """(A,), the cosine of the last two states: 1 means that the last step changed nothing."""
    if run.previous is None:
        return run.state.new_ones(len(run.state))
    return torch.cosine_similarity(run.state, run.previous)
