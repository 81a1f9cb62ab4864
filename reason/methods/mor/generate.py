"""Generating text: requests, and the decoding of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reason.backbones.generation import GREEDY, Sampler, Sampling
from reason.errors import ConfigError
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.decode import prefill, step
from reason.methods.mor.halting import HaltingRule
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.token_selection import Route


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
    sampling: Sampling = GREEDY
    stop: frozenset[int] = frozenset()  # tokens that end the text
    seed: int = 0  # of its own random numbers: its tokens do not depend on which texts are decoded with it

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
    rule, sample = HaltingRule(model, request.route, request.cap), Sampler(request.sampling, request.seed)
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
