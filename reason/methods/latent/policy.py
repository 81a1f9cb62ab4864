"""Which requests get how much depth: stop tests and a router.

After step k a *measure* says how settled a request is, larger meaning surer; the request stops where it
reaches the threshold, which ``calibrate`` fits so that a given number of steps is spent. Five measures read the
answer itself (``cos``, ``kl``, ``margin``, ``overlap``, ``entropy``); the router reads what is known before any
step and spends all of the depth or none.

A catalogue costs more to score than several steps, so all measures but ``cos`` look at a *shortlist*: the best
items of step 0, and one bucket for the rest, which keeps the mass that step 0 gave it.
Probabilities are calibrated: each step has a temperature of its own, fitted on validation, because steps
trained at falling temperatures are not equally confident in the same scores.

Sources: the tests restate halting rules of adaptive-depth models for this setting (KL between steps: ManCAR,
arXiv 2602.20093); router, shortlist and budget are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reason.datasets.requests import TOP
from reason.methods.latent.reasoning import Reasoning
from reason.metrics.calibration import EXCLUDED

MEANING = {
    "cos": "the cosine of the last two states",
    "kl": "the divergence from the step before",
    "margin": "the margin of the first item over the second",
    "overlap": "the share of the ten items that stayed",
    "entropy": "the entropy of the answers",
}
FEW_ROWS = 8  # below these, a product with the whole catalogue is bound by memory too
GATHER_RATIO = 24  # items over shortlist, above which such a product costs more than gathering the shortlist
FALLING = ("kl", "entropy")  # these stop once they have fallen to the threshold; inside, all measures rise


def rising(name: str, value: float) -> float:
    """A measure, or its threshold, on the scale on which larger is surer; its own inverse."""
    return -value if name in FALLING else value


def log_counts(counts: np.ndarray, device: torch.device | None = None) -> Tensor:
    """(N,) occurrences in training -> (N,) float32: log of 1 + each, a feature of the router."""
    return torch.as_tensor(counts, device=device).float().log1p()


@dataclass(frozen=True)
class DepthRouter:
    """A linear forecast of what depth would gain: ``bias + weight . (x - mean) / scale``."""

    features: list[str]
    mean: list[float]
    scale: list[float]
    weight: list[float]
    bias: float

    @cached_property
    def affine(self) -> tuple[Tensor, float]:
        """(F,) float32 and a number: the same forecast as ``x @ weight + bias``, with the scaling folded in."""
        weight = np.array(self.weight) / self.scale
        return torch.from_numpy(weight).float(), self.bias - float(weight @ self.mean)


@dataclass(frozen=True)
class DepthPolicy:
    """What was fitted for a run. ``to_json`` and ``from_json`` are inverse."""

    name: str  # cos, kl, margin, overlap, entropy or router
    threshold: float  # in the measure's own units, as people write it
    least: int  # steps before the test is asked
    temperature: list[float]  # of the scores after step 0..K
    shortlist: int
    router: DepthRouter | None = None

    @property
    def needs_scores(self) -> bool:
        """Whether it has to score the catalogue at step 0."""
        seen = self.router.features if self.router else []
        return self.name in ("kl", "margin", "overlap", "entropy") or "entropy" in seen or "margin" in seen

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> DepthPolicy:
        router = kept.get("router")
        return cls(**{**kept, "router": DepthRouter(**router) if router else None})

    def reason(self, depth: int, cap: int) -> str:
        """Why a request that took ``depth`` of at most ``cap`` steps took no more, in words."""
        if self.name == "router":
            return (
                "the router expected a gain from depth" if depth else "the router expected no gain from depth"
            )
        if cap <= self.least:
            return f"the stop test is asked only after {self.least} step{'s' * (self.least != 1)}"
        reached = f"{'fell to' if self.name in FALLING else 'reached'} {self.threshold:.3g}"
        if depth >= cap:
            return f"{MEANING[self.name]} never {reached}: all {cap} steps were taken"
        return f"{MEANING[self.name]} {reached} after step {depth}"


class PolicyTest:
    """A policy at work on one batch: the ``StopTest`` that ``run_steps`` asks."""

    def __init__(self, policy: DepthPolicy, log_counts: Tensor | None = None, exclude: Tensor | None = None):
        """log_counts: (N,), log of 1 + occurrences in training, for the router. exclude: (B, N) bool, no candidates."""
        self.policy = policy
        self.measure = Measure(policy, log_counts, exclude)

    def __call__(self, run: Reasoning) -> Tensor:
        """(A,) bool: who stops."""
        routed = self.policy.name == "router"
        if run.k < self.policy.least or (routed and run.k):
            return torch.zeros(len(run.state), dtype=torch.bool, device=run.state.device)
        return self.measure(run) >= rising(self.policy.name, self.policy.threshold)

    def keep(self, rows: Tensor) -> None:
        self.measure.keep(rows)


class Measure:
    """How settled each active row is after the step it has just taken; larger is surer.

    Called once after every step from the policy's least on; remembers what it compares with.
    """

    def __init__(self, policy: DepthPolicy, log_counts: Tensor | None = None, exclude: Tensor | None = None):
        self.policy, self.log_counts, self.exclude = policy, log_counts, exclude
        self.shortlist: Tensor | None = None  # (A, C), item codes
        self.scores: Tensor | None = None  # (A, C), of the shortlist at step 0
        self.vectors: Tensor | None = None  # (A, C, d), of the shortlist, where scoring it alone is cheaper
        self.shortlist_excluded: Tensor | None = (
            None  # (A, C), True where the shortlist holds what is no candidate
        )
        self.log_mass: Tensor | None = None  # (A, 2), log of the probability of the shortlist and of the rest
        self.before: Tensor | None = None  # what the last call computed: (A, C + 1) or (A, 10)

    def __call__(self, run: Reasoning) -> Tensor:
        """(A,) float."""
        name = self.policy.name
        if name == "cos":
            assert run.previous is not None
            return torch.cosine_similarity(run.state, run.previous)
        if name == "router":
            return -forecast(self.policy, self, run)
        if name == "overlap":
            return self._overlap(run)
        log_p = self.log_p(run)  # (A, C + 1)
        if name == "margin":
            return margin(log_p)
        if name == "entropy":
            return -normalized_entropy(log_p)
        before = self._log_p(run, run.k - 1) if self.before is None else self.before
        self.before = log_p
        return -(before.exp() * (before - log_p)).sum(-1)

    def keep(self, rows: Tensor) -> None:
        self.scores = None  # those of step 0 are used before any row leaves
        for kept in ("shortlist", "vectors", "shortlist_excluded", "log_mass", "before", "exclude"):
            if (value := getattr(self, kept)) is not None:
                setattr(self, kept, value.index_select(0, rows))

    def log_p(self, run: Reasoning) -> Tensor:
        """(A, C + 1): log probabilities of the shortlist and, last, of everything else."""
        return self._log_p(run, run.k)

    def _log_p(self, run: Reasoning, k: int) -> Tensor:
        inside = (self._scores(run, k).float() / self.policy.temperature[k]).log_softmax(-1)
        assert self.log_mass is not None
        return torch.cat([inside + self.log_mass[:, :1], self.log_mass[:, 1:]], 1)

    def _scores(self, run: Reasoning, k: int) -> Tensor:
        """(A, C): of the shortlist, which the first call makes, after this step or the one before."""
        if self.shortlist is None:
            self._make_shortlist(run)
        assert self.shortlist is not None
        if k == 0 and self.scores is not None:
            return self.scores
        state = run.read() if k == run.k else run.read_before()
        # One product with the whole catalogue is arithmetic, rows of vectors of their own are memory traffic.
        items, (rows, size) = len(run.embeddings), self.shortlist.shape
        if self.vectors is None and (rows < FEW_ROWS or items > GATHER_RATIO * size):
            self.vectors = F.embedding(self.shortlist, run.embeddings.vectors)
        if self.vectors is not None:
            scores = torch.bmm(self.vectors, state.unsqueeze(2)).squeeze(2)
        else:
            scores = run.embeddings.scores(state).gather(1, self.shortlist)
        return (
            scores
            if self.shortlist_excluded is None
            else scores.masked_fill(self.shortlist_excluded, EXCLUDED)
        )

    def _make_shortlist(self, run: Reasoning) -> None:
        """The shortlist of step 0, whatever step it is now."""
        scores = run.embeddings.scores(run.first)  # (A, N)
        if self.exclude is not None:
            scores = scores.masked_fill(self.exclude, EXCLUDED)
        best = scores.topk(min(self.policy.shortlist, scores.shape[1]), sorted=False)
        self.scores, self.shortlist = best
        if self.exclude is not None:  # where fewer candidates are left than the list is long
            self.shortlist_excluded = self.exclude.gather(1, self.shortlist)
            self.exclude = None
        if self.policy.name != "overlap":
            p = (scores.float() / self.policy.temperature[0]).softmax(-1)
            inside = p.gather(1, self.shortlist).sum(-1)
            rest = p.scatter_(1, self.shortlist, 0).sum(-1)  # not 1 - inside, which would cancel
            self.log_mass = torch.stack([inside, rest], 1).log().clamp_min(EXCLUDED)

    def _overlap(self, run: Reasoning) -> Tensor:
        def top(k: int) -> Tensor:
            scores = self._scores(run, k)
            return scores.topk(min(TOP, scores.shape[1])).indices  # (A, 10), places in the shortlist

        before = top(run.k - 1) if self.before is None else self.before
        self.before = top(run.k)
        same = (self.before.unsqueeze(2) == before.unsqueeze(1)).any(2)
        return same.float().mean(1)


def margin(log_p: Tensor) -> Tensor:
    """(A, C + 1) -> (A,): probability of the best item less that of the second."""
    best = log_p[:, :-1].topk(min(2, log_p.shape[1] - 1)).values.exp()
    return best[:, 0] - best[:, -1]


def normalized_entropy(log_p: Tensor) -> Tensor:
    """(A, C + 1) -> (A,): entropy as a share of its largest value."""
    return -(log_p.exp() * log_p).sum(-1) / math.log(log_p.shape[1])


# --- the router -------------------------------------------------------------------------------------


def features(names: list[str], measure: Measure, run: Reasoning) -> Tensor:
    """(A, F): what is known of each request before its first step, and nothing that is known only after."""
    length = run.length.to(run.state.device)
    real = torch.arange(run.items.shape[1], device=length.device) < length[:, None]  # (A, T)
    log_p = measure.log_p(run) if {"entropy", "margin"} & set(names) else None
    columns = []
    for name in names:
        if name == "history":
            column = length.float().log()
        elif name == "distinct":
            ordered = run.items.masked_fill(~real, -1).sort(1).values
            new = (ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] >= 0)
            column = (new.sum(1) + (ordered[:, 0] >= 0)).float() / length
        elif name == "popularity":
            assert measure.log_counts is not None
            known = run.items.clamp_max(len(measure.log_counts) - 1)
            column = measure.log_counts.take(known).mul_(real).sum(1) / length
        elif name == "norm":
            column = run.state.float().norm(dim=1)
        else:
            assert log_p is not None
            column = normalized_entropy(log_p) if name == "entropy" else margin(log_p)
        columns.append(column)
    return torch.stack(columns, 1)


def forecast(policy: DepthPolicy, measure: Measure, run: Reasoning) -> Tensor:
    """(A,): the gain that the router expects of depth, on no particular scale."""
    router = policy.router
    assert router is not None
    x = features(router.features, measure, run)
    weight, bias = router.affine
    return x @ weight.to(x.device) + bias
