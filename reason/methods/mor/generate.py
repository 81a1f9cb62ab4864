"""Generating text: requests, sampling, and the decoding of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reason.errors import ConfigError
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.decode import prefill, step
from reason.methods.mor.halting import HaltingRule
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.token_selection import Route


@dataclass(frozen=True)
class Sampling:
    """How a token is sampled. A sequence has random numbers of its own, one for each token, so that its tokens do not
    depend on which sequences are decoded with it.

    Raises:
        ConfigError: values out of range.
    """

    temperature: float = 0.0  # 0: always the most probable token
    top_p: float = 1.0  # sample among the most probable tokens that have this mass together
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ConfigError(
                f"The temperature is {self.temperature}; it must not be below 0.", "0 is greedy decoding."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p is {self.top_p}; it is a share, above 0 and at most 1.", "1 keeps all tokens."
            )


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue.

    Raises:
        ConfigError: an empty prompt, or no token to write.
    """

    prompt: Sequence[int]
    max_tokens: int  # tokens to write at most
    route: Route | None = None  # see ``HaltingRule``
    cap: int | None = None  # recursions at most
    sampling: Sampling = Sampling()
    stop: frozenset[int] = frozenset()  # tokens that end the text

    def __post_init__(self):
        if not len(self.prompt):
            raise ConfigError(
                "The prompt has no tokens.", "Begin it with the token that ends documents, for example."
            )
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}.", "Ask for 1 or more.")


@dataclass
class Generation:
    """The text that was generated.

    tokens: without the prompt and without the stop token.
    stopped: whether a token of ``Request.stop`` ended it.
    depth: (T,) recursions of every token that was read: the prompt and the generated tokens, but for the last one.
        With ``KnownDepths(torch.from_numpy(depth))`` the text is generated again, step by step the same.
    """

    tokens: list[int]
    stopped: bool
    depth: np.ndarray


class Sampler:
    """Samples the tokens of one sequence, from logits (V,)."""

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
        index = int(torch.searchsorted(mass, point, right=True).clamp_max(len(mass) - 1))
        return index if order is None else int(order[index])


def generate(
    model: MixtureOfRecursions, request: GenerationRequest, *, cache: MoRCache | None = None, chunk: int | None = 512
) -> Generation:  # fmt: skip
    """Continue one text.

    Args:
        cache: None: one of its own, in the key-value mode that the model is evaluated with.
        chunk: tokens of the prompt computed at a time.

    Raises:
        ConfigError: a route that cannot be decoded with.
        OutOfPages: the cache cannot hold the text.
    """
    rule, sample = HaltingRule(model, request.route, request.cap), Sampler(request.sampling)
    past = (cache or MoRCache(model)).open()
    try:
        logits = prefill(model, past, request.prompt, rule, chunk=chunk)
        written: list[int] = []
        while True:
            token = sample(logits[0])
            if token in request.stop:
                return Generation(written, True, past.depth.astype(np.int64))
            written.append(token)
            if len(written) == request.max_tokens:
                return Generation(written, False, past.depth.astype(np.int64))
            logits = step(model, [past], [token], [rule])
    finally:
        past.free()
