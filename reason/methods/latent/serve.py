"""Depth on demand: one state machine that answers a batch of requests, each at a depth of its own.

``start`` encodes, ``step`` takes one latent step, ``read`` is the state that would answer now, ``stop``
is somebody else's: a fixed depth, a stop test, a router and the clock are policies on top of the same
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
    from reason.methods.latent.candidates import Catalogue
    from reason.methods.latent.config import LatentConfig


class Reasoning:
    """A batch of requests in the midst of reasoning. A rows are active, ``row`` says which of the B they are."""

    def __init__(
        self, config: LatentConfig, model: SequenceEncoder, catalogue: Catalogue, items: Tensor, length: Tensor, depth: int
    ):  # fmt: skip
        """Start: encode. items: (B, T) padded on the right; length: (B,)."""
        self.config, self.model, self.catalogue = config, model, catalogue
        self.items, self.length, self.depth = items, length, depth
        self.thought = model.start(items, length, depth, catalogue.vectors)
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
    """What decides, after each step, which rows have had enough."""

    def __call__(self, run: Reasoning) -> Tensor:
        """(A,) bool: the active rows that stop here."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Forget what is remembered of all but ``rows`` of the active ones."""
        ...


@dataclass
class Served:
    """Answers of a batch."""

    state: Tensor  # (B, d), the state that answers, at each row's own depth
    depth: Tensor  # (B,) int64, on the CPU: steps taken
    late: bool = False  # the clock stopped what was still active
    moved: Tensor | None = (
        None  # (B,), where asked for: cosine of the last two states; 1 where no step was taken
    )


def serve(
    run: Reasoning,
    test: StopTest | None = None,
    *,
    late: Callable[[int], bool] | None = None,
    compact: float = 0.75,
    watch: bool = False,
) -> Served:
    """Take steps until ``test`` stops a row, the depth is reached, or ``late(k)`` says there is no time for another.

    compact: see ``Thought.keep``. watch: also say how far the last step moved each row.
    """
    rows = len(run.items)
    served: Served | None = None
    hurried = False
    while True:
        last = run.k >= run.depth
        if not last and test is not None:
            stop = test(run)
            if rows == 1:
                last = bool(stop)
            elif len(gone := stop.nonzero().squeeze(1)):
                if len(gone) == len(stop):
                    last = True
                else:
                    served = served or _room(run, rows, watch)
                    _leave(run, gone, served)
                    stay = (~stop).nonzero().squeeze(1)
                    test.keep(stay)
                    run.keep(stay, compact)
        if not last and late is not None and late(run.k):
            last = hurried = True
        if last:
            if served is None:  # all rows leave together
                moved = _cosine(run) if watch else None
                return Served(run.read(), torch.full((rows,), run.k), hurried, moved)
            _leave(run, None, served)
            served.late = hurried
            return served
        run.step()


def _room(run: Reasoning, rows: int, watch: bool) -> Served:
    """Places for the answers of rows that leave one after the other."""
    state = run.state
    return Served(
        state.new_empty(rows, state.shape[1]),
        torch.zeros(rows, dtype=torch.int64),
        moved=state.new_ones(rows) if watch else None,
    )


def _leave(run: Reasoning, gone: Tensor | None, served: Served) -> None:
    """Write the answers of the rows ``gone`` of the active ones (None: all) to their places."""

    def chosen(x: Tensor) -> Tensor:
        return x if gone is None else x.index_select(0, gone)

    everyone = torch.arange(len(run.state), device=run.state.device) if run.row is None else run.row
    where = chosen(everyone)
    served.state.index_copy_(0, where, chosen(run.read()))
    served.depth[where.cpu()] = run.k
    if served.moved is not None:
        served.moved.index_copy_(0, where, chosen(_cosine(run)))


def _cosine(run: Reasoning) -> Tensor:
    """(A,), how far the last step turned the state: 1 means not at all."""
    if run.previous is None:
        return run.state.new_ones(len(run.state))
    return torch.cosine_similarity(run.state, run.previous)
