"""Writing text: what is asked for, how a token is drawn, and one request after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reason.errors import ConfigError
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.decode import prefill, step
from reason.methods.mor.pace import Pace
from reason.methods.mor.routes import Route

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. A sequence has random numbers of its own, one for each token, so that what it draws
    does not depend on who is decoded beside it.

    Raises:
        ConfigError: values that mean nothing.
    """

    temperature: float = 0.0  # 0: always the most probable token
    top_p: float = 1.0  # draw among the most probable tokens that have this mass together
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ConfigError(f"A temperature of {self.temperature}; it must not be below 0.", "0 is greedy.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p is {self.top_p}; it is a share, above 0 and at most 1.", "1 keeps all tokens."
            )


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Raises:
        ConfigError: nothing to read, or nothing to write.
    """

    prompt: Sequence[int]
    most: int  # tokens to write at most
    route: Route | None = None  # see ``Pace``
    cap: int | None = None  # recursions at most
    sampling: Sampling = Sampling()
    stop: frozenset[int] = frozenset()  # tokens that end the text

    def __post_init__(self):
        if not len(self.prompt):
            raise ConfigError(
                "There is no token to begin with.", "Begin with the token that ends documents, for one."
            )
        if self.most < 1:
            raise ConfigError(f"{self.most} tokens to write.", "Ask for 1 or more.")


@dataclass
class Generation:
    """What was written.

    tokens: without the prompt and without the token that ended it.
    stopped: whether a token of ``Request.stop`` ended it.
    depth: (T,) recursions of every token that was read: the prompt and what was written, but for the last one.
        With ``Known(torch.from_numpy(depth))`` the text is written again, step by step the same.
    """

    tokens: list[int]
    stopped: bool
    depth: np.ndarray


class Draw:
    """The tokens of one sequence, from logits (V,)."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed) if sampling.temperature else None

    def __call__(self, logits: Tensor) -> int:
        if self.generator is None:
            return int(logits.argmax())
        share = (logits.double() / self.sampling.temperature).softmax(-1).cpu()
        order = None
        if self.sampling.top_p < 1:
            share, order = share.sort(descending=True, stable=True)
            before = share.cumsum(0) - share  # mass of those that are more probable: 0 for the first
            share = share[before < self.sampling.top_p]
        mass = share.cumsum(0)
        point = torch.rand((), generator=self.generator, dtype=torch.float64) * mass[-1]
        place = int(torch.searchsorted(mass, point, right=True).clamp_max(len(mass) - 1))
        return place if order is None else int(order[place])


def generate(
    model: MixtureOfRecursions, request: Request, *, cache: MoRCache | None = None, chunk: int | None = 512
) -> Generation:  # fmt: skip
    """Continue one text.

    Args:
        cache: None: one of its own, of the kind that the model is judged with.
        chunk: tokens of the prompt computed at a time.

    Raises:
        ConfigError: a route that cannot be decoded with.
        OutOfPages: the cache cannot hold the text.
    """
    pace, draw = Pace(model, request.route, request.cap), Draw(request.sampling)
    past = (cache or MoRCache(model)).open()
    try:
        logits = prefill(model, past, request.prompt, pace, chunk=chunk)
        written: list[int] = []
        while True:
            token = draw(logits[0])
            if token in request.stop:
                return Generation(written, True, past.depth.astype(np.int64))
            written.append(token)
            if len(written) == request.most:
                return Generation(written, False, past.depth.astype(np.int64))
            logits = step(model, [past], [token], [pace])
    finally:
        past.free()
