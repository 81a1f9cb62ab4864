"""Requests of ``predict``: text is generated, recorded, monitored for drift, and replayed.

Many requests are decoded together, by the scheduler; one after another where each depends on the one before
(``mor.guard``) or is to be replayed exactly (``mor.record``), and where layers are not shared by whole passes.

Depths of the latest requests are compared with those that the same profile gave to validation text. Where they differ
more than clean text does (``monitor.fit_reference``), the reply has a note; with ``mor.guard`` later requests use the next
safer profile, in the end all recursions.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from reason.backbones.generation import Sampling
from reason.backbones.tokens import Tokens
from reason.errors import ConfigError, DataError
from reason.methods.base import Context
from reason.methods.mor import record
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.calibrate import profile_thresholds, require_thresholds
from reason.methods.mor.generate import Generation, GenerationRequest, generate
from reason.methods.mor.monitor import DRIFT_TOKENS
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.scheduler import Scheduler
from reason.methods.mor.token_selection import AboveThreshold, KnownDepths, evaluation_route
from reason.metrics.association import population_stability_index

SAFER = {"economy": "default", "default": "max", "max": "max"}


@dataclass(frozen=True)
class CompletionRequest:
    """A valid request, as users write it."""

    prompt: str
    tokens: int = 64  # to generate at most
    depth: int | None = None  # recursions at most; None: the run's
    profile: str | None = None  # of thresholds; None: the run's
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    seed: int = 0


def parse(request: dict[str, Any], recursions: int) -> CompletionRequest:
    """The request, if it is valid.

    Raises:
        DataError: what is wrong with it, for its author.
    """
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
        raise DataError(
            'A request is {"prompt": "text to continue"}; it may also have '
            + ", ".join(f'"{f.name}"' for f in fields(CompletionRequest)[1:]) + '. {"replay": a line of audit.jsonl} stands alone.'
        )  # fmt: skip
    if not request["prompt"]:
        raise DataError("The prompt is empty.", "Give the text to continue.")
    known = [f.name for f in fields(CompletionRequest)]
    if extra := sorted(set(request) - set(known)):
        raise DataError(f"Unknown key {extra[0]!r} in the request.", f"Known: {', '.join(known)}.")
    if request.get("profile") not in (None, *SAFER):
        raise DataError(f'"profile" is {request["profile"]!r}.', f"Choose from {', '.join(SAFER)}.")
    for name, kind, least, max_tokens in (
        ("tokens", int, 1, 100_000), ("depth", int, 1, recursions), ("temperature", float, 0, 100),
        ("top_p", float, 0.001, 1), ("seed", int, 0, 2**53),
    ):  # fmt: skip
        value = request.get(name)
        if value is None:
            continue
        fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not fits or not least <= value <= max_tokens:
            what = "a whole number" if kind is int else "a number"
            span = f"from {least:,} to {max_tokens:,}" if least < max_tokens else f"and can only be {least}"
            raise DataError(f'"{name}" is {json.dumps(value)}; it must be {what} {span}.')
    return CompletionRequest(**{k: v for k, v in request.items() if v is not None})


@dataclass(frozen=True)
class PreparedRequest:
    """A request, ready to be decoded."""

    request: GenerationRequest
    requested: str  # the profile that was requested
    profile: str  # the profile that is used
    truncated: bool  # whether the context has room for fewer tokens than were requested


class RequestHandler:
    """Replies to requests. depth: recursions at most, for requests that name none."""

    def __init__(self, ctx: Context, network: MixtureOfRecursions, tokens: Tokens, depth: int):
        self.ctx, self.network, self.tokens, self.config = ctx, network, tokens, ctx.config
        self.cap = min(depth, network.recursions)
        self.drift = {name: DriftMonitor(ctx.calibration, name) for name in SAFER}
        self.replaced_profiles: dict[str, str] = {}  # profiles that drifted -> the one used instead
        self._model_digest = ""

    @property
    def model_digest(self) -> str:
        """Of the weights; computed when it is first needed, because it takes a moment."""
        self._model_digest = self._model_digest or record.model_digest(self.network)
        return self._model_digest

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if isinstance(request, dict) and "replay" in request:
                return self._replay(request)
            return self._generate(request)
        except ValueError as error:
            return _error(error)

    def _replay(self, request: dict[str, Any]) -> dict[str, Any]:
        if len(request) > 1:
            raise DataError('"replay" must be the only key of a request: the record holds everything else.')
        same, tokens = record.replay(self.network, self.model_digest, request["replay"])
        return {"same": same, "text": self.tokens.decode(tokens), "tokens": len(tokens)}

    def all(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One reply for each request, in order."""
        mor, alone = self.network.config, len(requests) < 2
        if alone or mor.record or mor.guard or not self.network.decoder.sharing.cyclic:
            return [self(request) for request in requests]
        answers: dict[int, dict[str, Any]] = {}
        by_index: dict[int, PreparedRequest] = {}
        for i, request in enumerate(requests):
            if isinstance(request, dict) and "replay" in request:
                answers[i] = self(request)
                continue
            try:
                by_index[i] = self._prepare(request)
            except ValueError as error:
                answers[i] = _error(error)
        fallbacks = self.network.fallbacks
        generation = Scheduler(self.network, MoRCache(self.network)).run(
            prepared.request for prepared in by_index.values()
        )
        fallbacks = self.network.fallbacks - fallbacks
        for (i, prepared), one in zip(by_index.items(), generation, strict=True):
            answers[i] = self._reply(one, self._notes(prepared, one, fallbacks, len(by_index)))
        return [answers[i] for i in range(len(requests))]

    def _prepare(self, request: dict[str, Any]) -> PreparedRequest:
        """
        Raises:
            DataError, ConfigError: what is wrong with the request, for its author.
            RunError: the run's thresholds are gone.
        """
        require_thresholds(self.network.config, self.network.recursions, self.ctx.calibration)
        network, tokens, context = self.network, self.tokens, self.config.backbone.context
        parsed = parse(request, network.recursions)
        ids = [tokens.eos, *tokens.encode([parsed.prompt])[0][0]]
        if len(ids) >= context:
            raise DataError(
                f"The prompt has {len(ids):,} tokens; the model was trained on {context:,} at a time.",
                "Shorten it, or train with a larger backbone.context.",
            )
        requested = parsed.profile or network.config.profile
        profile = self._profile_in_use(requested)
        max_tokens, cap = (
            min(parsed.tokens, context - len(ids)),
            min(parsed.depth or self.cap, network.recursions),
        )
        # For random depths, which are drawn by token and position: EOS stands for tokens that are not generated yet.
        whole = torch.tensor([ids + [tokens.eos] * max_tokens], device=self.ctx.device)
        thresholds = profile_thresholds(self.ctx.calibration, profile)
        if profile != "default" and thresholds is None:
            raise ConfigError(f"This run has no profile {profile!r}: nothing was calibrated.")
        route = evaluation_route(network.config, network.recursions, whole, thresholds, self.config.seed)
        sampling = Sampling(parsed.temperature, parsed.top_p)
        return PreparedRequest(
            GenerationRequest(ids, max_tokens, route, cap, sampling, frozenset({tokens.eos}), parsed.seed),
            requested,
            profile,
            max_tokens < parsed.tokens,
        )

    def _generate(self, request: dict[str, Any]) -> dict[str, Any]:
        network, clock = self.network, self.ctx.meter.now
        start = clock()
        prepared = self._prepare(request)
        fallbacks, prepared_at = network.fallbacks, clock()
        generation = generate(network, prepared.request)
        fallbacks, end = network.fallbacks - fallbacks, clock()
        notes = self._notes(prepared, generation, fallbacks)
        if network.config.record:
            route = prepared.request.route
            known = {
                "route": "threshold" if isinstance(route, AboveThreshold) else "known" if isinstance(route, KnownDepths) else "token",
                "profile": prepared.profile, "thresholds": list(route.thresholds) if isinstance(route, AboveThreshold) else None,
                "fallbacks": fallbacks, "alerts": notes,
                "seconds": {"read": prepared_at - start, "write": end - prepared_at},
            }  # fmt: skip
            line = record.record_of(network, self.model_digest, prepared.request, generation, **known)
            record.append(self.ctx.workdir / record.FILE, line)
        return self._reply(generation, notes)

    def _notes(
        self, prepared: PreparedRequest, generation: Generation, fallbacks: int, texts: int = 1
    ) -> list[str]:
        """Notes for the author of the request. fallbacks: router outputs that were not finite, over this many ``texts``."""
        notes, requested, profile = [], prepared.requested, prepared.profile
        if prepared.truncated and not generation.stopped:
            notes.append(f"the context of {self.config.backbone.context:,} tokens is full")
        if profile != requested:
            notes.append(
                f"the depths of profile {requested} have drifted; profile {profile} was used instead"
            )
        if fallbacks:
            where = f" in these {texts:,} texts" if texts > 1 else ""
            times = f"{fallbacks:,} times" if fallbacks > 1 else "once"
            notes.append(
                f"the router returned NaN or infinity {times}{where}; these tokens ran at full depth"
            )
        whole = prepared.request.cap == min(self.config.depth, self.network.recursions)
        if whole and (psi := self.drift[profile].add(generation.depth)):
            notes.append(self._drifted(profile, psi))
        return notes

    def _reply(self, generation: Generation, notes: Sequence[str]) -> dict[str, Any]:
        reply = {
            "text": self.tokens.decode(generation.tokens), "tokens": len(generation.tokens),
            "depth": float(generation.depth.mean()), "stopped": generation.stopped,
        }  # fmt: skip
        return reply | ({"note": "; ".join(notes)} if notes else {})

    def _profile_in_use(self, profile: str) -> str:
        """The profile itself, or the one used instead where it drifted."""
        while profile in self.replaced_profiles:
            profile = self.replaced_profiles[profile]
        return profile

    def _drifted(self, profile: str, psi: float) -> str:
        drift = self.drift[profile]
        message = (
            f"depths have drifted from those of validation text (PSI {psi:.2f}, limit {drift.limit:.2f})"
        )
        if self.network.config.guard and SAFER[profile] != profile:
            self.replaced_profiles[profile] = SAFER[profile]
            message += f"; later requests use profile {SAFER[profile]}"
        return message


def _error(error: ValueError) -> dict[str, Any]:
    return {"error": str(error).replace("\n", " ")}


class DriftMonitor:
    """Compares the depths of the latest requests of a profile with those that it gave to validation text."""

    def __init__(self, calibration: Any, profile: str):
        fitted = calibration or {}
        reference = fitted.get("reference", {})
        of_profile = fitted.get("profiles", {}).get(profile, {})
        self.shares = of_profile.get("shares", reference.get("shares") if profile == "default" else None)
        self.limit = float(reference.get("drift", np.inf))
        self._latest: deque[np.ndarray] = deque()

    def add(self, depth: np.ndarray) -> float:
        """Add the depths (T,) of a request. Returns the PSI of the latest ``DRIFT_TOKENS`` where it is beyond the limit, else
        0."""
        if self.shares is None:
            return 0.0
        self._latest.append(np.bincount(depth, minlength=len(self.shares) + 1)[1:])
        while sum(int(c.sum()) for c in self._latest) - int(self._latest[0].sum()) >= DRIFT_TOKENS:
            self._latest.popleft()
        counts = np.sum(self._latest, axis=0)
        found = population_stability_index(counts, self.shares) if counts.sum() >= DRIFT_TOKENS else 0.0
        return found if found > self.limit else 0.0
