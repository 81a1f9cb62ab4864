"""Answers to requests: text written, recorded, watched for drift, and written again.

Many requests are written together, by the scheduler; one after another where each has to wait for what the last one showed
(``mor.guard``) or is to be replayed exactly (``mor.record``), and where layers are not shared by whole passes.

Depths of the latest requests are compared with those that the same profile gave to validation text. Where they differ
more than clean text does (``monitor.refer``), the answer says so; with ``mor.guard`` the requests after it are written
by the next safer profile, at last with all recursions.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reason.errors import ConfigError, DataError
from reason.methods.base import Context
from reason.methods.mor import judge, record
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.generate import Generation, Request, Sampling, generate
from reason.methods.mor.monitor import DRIFT, psi
from reason.methods.mor.routes import Above, Known
from reason.methods.mor.scheduler import Scheduler

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions

SAFER = {"economy": "default", "default": "max", "max": "max"}


@dataclass(frozen=True)
class Asked:
    """A request, understood."""

    prompt: str
    tokens: int = 64  # to write at most
    depth: int | None = None  # recursions at most; None: the run's
    profile: str | None = None  # of thresholds; None: the run's
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    seed: int = 0


def parse(request: dict[str, Any], recursions: int) -> Asked:
    """Raises DataError, in words for the asker."""
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
        raise DataError(
            'A request is {"prompt": "text to continue"}; it may also have '
            + ", ".join(f'"{f.name}"' for f in fields(Asked)[1:]) + '. {"replay": a line of audit.jsonl} stands alone.'
        )  # fmt: skip
    if not request["prompt"]:
        raise DataError("The prompt is empty.", "Give the text that is to be continued.")
    known = [f.name for f in fields(Asked)]
    if extra := sorted(set(request) - set(known)):
        raise DataError(f"Unknown key {extra[0]!r} in the request.", f"Known: {', '.join(known)}.")
    if request.get("profile") not in (None, *SAFER):
        raise DataError(f'"profile" is {request["profile"]!r}.', f"Choose from {', '.join(SAFER)}.")
    for name, kind, least, most in (
        ("tokens", int, 1, 100_000), ("depth", int, 1, recursions), ("temperature", float, 0, 100),
        ("top_p", float, 0.001, 1), ("seed", int, 0, 2**53),
    ):  # fmt: skip
        value = request.get(name)
        if value is None:
            continue
        fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not fits or not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            span = f"from {least:,} to {most:,}" if least < most else f"and can only be {least}"
            raise DataError(f'"{name}" is {json.dumps(value)}; it must be {what} {span}.')
    return Asked(**{k: v for k, v in request.items() if v is not None})


@dataclass(frozen=True)
class Wish:
    """A request, ready to be written."""

    request: Request
    wanted: str  # the profile that was asked for
    profile: str  # and the one it is written with
    cut: bool  # whether the context holds less than was asked for


class Answers:
    """Answers one request after another. depth: recursions at most, where a request says nothing."""

    def __init__(self, ctx: Context, network: MixtureOfRecursions, depth: int):
        self.ctx, self.network, self.config = ctx, network, ctx.config
        self.cap = min(depth, network.recursions)
        self.drift = {name: Drift(ctx.calibration, name) for name in SAFER}
        self.safer: dict[str, str] = {}  # profiles that are no longer used, and what is in their place
        self._identity = ""

    @property
    def identity(self) -> str:
        """Of the model; it takes a moment, so it is found when first asked for."""
        self._identity = self._identity or record.identity(self.network)
        return self._identity

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if isinstance(request, dict) and "replay" in request:
                return self._replay(request)
            return self._write(request)
        except ValueError as error:
            return _refusal(error)

    def _replay(self, request: dict[str, Any]) -> dict[str, Any]:
        if len(request) > 1:
            raise DataError('"replay" stands alone in a request: the record says everything else.')
        same, written = record.replay(self.network, self.identity, request["replay"])
        return {"same": same, "text": self.ctx.data.tokens.decode(written), "tokens": len(written)}

    def all(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One answer a request, in order."""
        mor, alone = self.network.config, len(requests) < 2
        if alone or mor.record or mor.guard or not self.network.decoder.sharing.cyclic:
            return [self(request) for request in requests]
        answers: dict[int, dict[str, Any]] = {}
        wishes: dict[int, Wish] = {}
        for i, request in enumerate(requests):
            if isinstance(request, dict) and "replay" in request:
                answers[i] = self(request)
                continue
            try:
                wishes[i] = self._understand(request)
            except ValueError as error:
                answers[i] = _refusal(error)
        broken = self.network.broken
        done = Scheduler(self.network, MoRCache(self.network)).run(wish.request for wish in wishes.values())
        broken = self.network.broken - broken
        for (i, wish), one in zip(wishes.items(), done, strict=True):
            answers[i] = self._told(one, self._notes(wish, one, broken, len(wishes)))
        return [answers[i] for i in range(len(requests))]

    def _understand(self, request: dict[str, Any]) -> Wish:
        """Raises DataError or ConfigError, in words for the asker."""
        network, tokens, context = self.network, self.ctx.data.tokens, self.config.backbone.context
        asked = parse(request, network.recursions)
        ids = [tokens.eos, *tokens.encode([asked.prompt])[0][0]]
        if len(ids) >= context:
            raise DataError(
                f"The prompt has {len(ids):,} tokens; the model was trained on {context:,} at a time.",
                "Shorten it, or train with a larger backbone.context.",
            )
        wanted = asked.profile or network.config.profile
        profile = self._usable(wanted)
        most, cap = min(asked.tokens, context - len(ids)), min(asked.depth or self.cap, network.recursions)
        # For random depths, which are drawn by token and place: what is not written yet stands there as the end.
        whole = torch.tensor([ids + [tokens.eos] * most], device=self.ctx.device)
        thresholds = judge.thresholds_of(self.ctx.calibration, profile)
        if profile != "default" and thresholds is None:
            raise ConfigError(f"This run has no profile {profile!r}: nothing was calibrated.")
        route = judge.judging_route(network.config, network, whole, thresholds, self.config.seed)
        sampling = Sampling(asked.temperature, asked.top_p, asked.seed)
        return Wish(
            Request(ids, most, route, cap, sampling, frozenset({tokens.eos})),
            wanted,
            profile,
            most < asked.tokens,
        )

    def _write(self, request: dict[str, Any]) -> dict[str, Any]:
        network, clock = self.network, self.ctx.meter.now
        begun = clock()
        wish = self._understand(request)
        broken, read = network.broken, clock()
        done = generate(network, wish.request)
        broken, written = network.broken - broken, clock()
        notes = self._notes(wish, done, broken)
        if network.config.record:
            route = wish.request.route
            known = {
                "route": "threshold" if isinstance(route, Above) else "known" if isinstance(route, Known) else "token",
                "profile": wish.profile, "thresholds": list(route.thresholds) if isinstance(route, Above) else None,
                "fallbacks": broken, "alerts": notes,
                "seconds": {"read": read - begun, "write": written - read},
            }  # fmt: skip
            line = record.record_of(network, self.identity, wish.request, done, **known)
            record.append(self.ctx.workdir / record.FILE, line)
        return self._told(done, notes)

    def _notes(self, wish: Wish, done: Generation, broken: int, together: int = 1) -> list[str]:
        """What the asker should know. broken: scores that were no number, in so many texts ``together``."""
        notes, wanted, profile = [], wish.wanted, wish.profile
        if wish.cut and not done.stopped:
            notes.append(f"the context of {self.config.backbone.context:,} tokens is full")
        if profile != wanted:
            notes.append(f"the depths of profile {wanted} have drifted: written with profile {profile}")
        if broken:
            where = f" in these {together:,} texts" if together > 1 else ""
            notes.append(f"the router said no number {broken:,} times{where}: these tokens went all the way")
        whole = wish.request.cap == min(self.config.depth, self.network.recursions)
        if whole and (moved := self.drift[profile].add(done.depth)):
            notes.append(self._drifted(profile, moved))
        return notes

    def _told(self, done: Generation, notes: Sequence[str]) -> dict[str, Any]:
        reply = {
            "text": self.ctx.data.tokens.decode(done.tokens), "tokens": len(done.tokens),
            "depth": float(done.depth.mean()), "stopped": done.stopped,
        }  # fmt: skip
        return reply | ({"note": "; ".join(notes)} if notes else {})

    def _usable(self, profile: str) -> str:
        """The profile in place of one that drifted."""
        while profile in self.safer:
            profile = self.safer[profile]
        return profile

    def _drifted(self, profile: str, moved: float) -> str:
        drift = self.drift[profile]
        said = f"depths have drifted from those of validation (PSI {moved:.2f}, limit {drift.limit:.2f})"
        if self.network.config.guard and SAFER[profile] != profile:
            self.safer[profile] = SAFER[profile]
            said += f": profile {SAFER[profile]} from here on"
        return said


def _refusal(error: ValueError) -> dict[str, Any]:
    return {"error": str(error).replace("\n", " ")}


class Drift:
    """The depths of the latest requests of a profile, against what it gave to validation text."""

    def __init__(self, calibration: Any, profile: str):
        fitted = calibration or {}
        reference = fitted.get("reference", {})
        of_profile = fitted.get("profiles", {}).get(profile, {})
        self.shares = of_profile.get("shares", reference.get("shares") if profile == "default" else None)
        self.limit = float(reference.get("drift", np.inf))
        self._latest: deque[np.ndarray] = deque()

    def add(self, depth: np.ndarray) -> float:
        """Note the depths (T,) of a request. Returns the PSI of the latest ``DRIFT`` tokens, where it is beyond the limit; else 0."""
        if self.shares is None:
            return 0.0
        self._latest.append(np.bincount(depth, minlength=len(self.shares) + 1)[1:])
        while sum(int(c.sum()) for c in self._latest) - int(self._latest[0].sum()) >= DRIFT:
            self._latest.popleft()
        counts = np.sum(self._latest, axis=0)
        found = psi(counts, self.shares) if counts.sum() >= DRIFT else 0.0
        return found if found > self.limit else 0.0
