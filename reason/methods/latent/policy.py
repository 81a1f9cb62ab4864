"""Who deserves depth: stop tests, a router, and the budget that sets their thresholds.

After step k a *measure* says how settled a request is, larger meaning surer; the request stops where it
reaches the threshold. Five measures read the answer itself (``cos``, ``kl``, ``margin``, ``overlap``,
``entropy``); the router reads what is known before any step and spends all of the depth or none.

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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reason.methods.latent.serve import Reasoning

MEANING = {
    "cos": "the cosine of the last two states",
    "kl": "the divergence from the step before",
    "margin": "the lead of the first item",
    "overlap": "the share of the ten items that stayed",
    "entropy": "the entropy of the answers",
}
TOP = 10  # items a user sees
OUT = -1e9  # score of what is no candidate: no mass at any temperature, and no NaN in 0 log 0
FEW = 8  # rows, below which a product with the whole catalogue is bound by memory too
DEAR = 24  # catalogue over shortlist, above which such a product costs more than gathering the shortlist
LESS_IS_SURER = ("kl", "entropy")  # in these the threshold is crossed from above; inside, all measures rise


@dataclass(frozen=True)
class Router:
    """A linear forecast of what depth would gain: ``bias + weight . (x - mean) / scale``."""

    features: list[str]
    mean: list[float]
    scale: list[float]
    weight: list[float]
    bias: float


@dataclass(frozen=True)
class Policy:
    """What was fitted for a run. ``to_json`` and ``from_json`` are inverse."""

    name: str  # cos, kl, margin, overlap, entropy or router
    threshold: float  # in the measure's own units, as people write it
    least: int  # steps before the test is asked
    temperature: list[float]  # of the scores after step 0..K
    shortlist: int
    router: Router | None = None

    @property
    def bar(self) -> float:
        """The threshold on the rising scale that ``Measure`` uses."""
        return -self.threshold if self.name in LESS_IS_SURER else self.threshold

    @property
    def needs_scores(self) -> bool:
        """Whether it has to score the catalogue at step 0."""
        seen = self.router.features if self.router else []
        return self.name in ("kl", "margin", "overlap", "entropy") or "entropy" in seen or "margin" in seen

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Policy:
        router = kept.get("router")
        return cls(**{**kept, "router": Router(**router) if router else None})

    def reason(self, depth: int, cap: int) -> str:
        """Why a request that took ``depth`` of at most ``cap`` steps took no more, in words."""
        if self.name == "router":
            return "the router spent the depth on it" if depth else "the router saw no gain in depth"
        if cap <= self.least:
            return f"{cap} steps are taken before the test is asked"
        if depth >= cap:
            return f"{MEANING[self.name]} never said stop: all {cap} steps were taken"
        side = "fell to" if self.name in LESS_IS_SURER else "reached"
        return f"{MEANING[self.name]} {side} {self.threshold:.3g} after step {depth}"


class Stop:
    """A policy at work on one batch: the ``StopTest`` that ``serve`` asks."""

    def __init__(self, policy: Policy, log_counts: Tensor | None = None, exclude: Tensor | None = None):
        """log_counts: (N,), log of 1 + occurrences in training, for the router. exclude: (B, N) bool, no candidates."""
        self.policy = policy
        self.measure = Measure(policy, log_counts, exclude)

    def __call__(self, run: Reasoning) -> Tensor:
        """(A,) bool: who stops."""
        routed = self.policy.name == "router"
        if run.k < self.policy.least or (routed and run.k):
            return torch.zeros(len(run.state), dtype=torch.bool, device=run.state.device)
        return self.measure(run) >= self.policy.bar

    def keep(self, rows: Tensor) -> None:
        self.measure.keep(rows)


class Measure:
    """How settled each active row is after the step it has just taken; larger is surer.

    Called once after every step from the policy's least on; remembers what it compares with.
    """

    def __init__(self, policy: Policy, log_counts: Tensor | None = None, exclude: Tensor | None = None):
        self.policy, self.log_counts, self.exclude = policy, log_counts, exclude
        self.short: Tensor | None = None  # (A, C), the items of the shortlist
        self.scores: Tensor | None = None  # (A, C), theirs at step 0
        self.table: Tensor | None = None  # (A, C, d), their vectors, where looking at these alone is cheaper
        self.barred: Tensor | None = None  # (A, C), True where the shortlist holds what is no candidate
        self.log_mass: Tensor | None = None  # (A, 2), log of the probability of the shortlist and of the rest
        self.before: Tensor | None = None  # what the last call found: (A, C + 1) or (A, 10)

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
            return lead(log_p)
        if name == "entropy":
            return -spread(log_p)
        before = self._log_p(run, run.k - 1) if self.before is None else self.before
        self.before = log_p
        return -(before.exp() * (before - log_p)).sum(-1)

    def keep(self, rows: Tensor) -> None:
        self.scores = None  # the look at step 0 comes before anybody leaves
        for kept in ("short", "table", "barred", "log_mass", "before", "exclude"):
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
        """(A, C): of the shortlist, which the first call draws up, after this step or the one before."""
        if self.short is None:
            self._draw_up(run)
        assert self.short is not None
        if k == 0 and self.scores is not None:
            return self.scores
        state = run.read() if k == run.k else run.read_before()
        # One product with the whole catalogue is arithmetic, rows of vectors of their own are memory traffic.
        items, (rows, size) = len(run.catalogue), self.short.shape
        if self.table is None and (rows < FEW or items > DEAR * size):
            self.table = F.embedding(self.short, run.catalogue.vectors)
        if self.table is not None:
            scores = torch.bmm(self.table, state.unsqueeze(2)).squeeze(2)
        else:
            scores = run.catalogue.scores(state).gather(1, self.short)
        return scores if self.barred is None else scores.masked_fill(self.barred, OUT)

    def _draw_up(self, run: Reasoning) -> None:
        """The shortlist of step 0, whatever step it is now."""
        scores = run.catalogue.scores(run.first)  # (A, N)
        if self.exclude is not None:
            scores = scores.masked_fill(self.exclude, OUT)
        best = scores.topk(min(self.policy.shortlist, scores.shape[1]), sorted=False)
        self.scores, self.short = best
        if self.exclude is not None:  # where fewer candidates are left than the list is long
            self.barred = self.exclude.gather(1, self.short)
            self.exclude = None
        if self.policy.name != "overlap":
            p = (scores.float() / self.policy.temperature[0]).softmax(-1)
            inside = p.gather(1, self.short).sum(-1)
            rest = p.scatter_(1, self.short, 0).sum(-1)  # not 1 - inside, which would cancel
            self.log_mass = torch.stack([inside, rest], 1).log().clamp_min(OUT)

    def _overlap(self, run: Reasoning) -> Tensor:
        def top(k: int) -> Tensor:
            scores = self._scores(run, k)
            return scores.topk(min(TOP, scores.shape[1])).indices  # (A, 10), places in the shortlist

        before = top(run.k - 1) if self.before is None else self.before
        self.before = top(run.k)
        same = (self.before.unsqueeze(2) == before.unsqueeze(1)).any(2)
        return same.float().mean(1)


def lead(log_p: Tensor) -> Tensor:
    """(A, C + 1) -> (A,): probability of the best item less that of the second."""
    best = log_p[:, :-1].topk(min(2, log_p.shape[1] - 1)).values.exp()
    return best[:, 0] - best[:, -1]


def spread(log_p: Tensor) -> Tensor:
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
            column = (measure.log_counts[known] * real).sum(1) / length
        elif name == "norm":
            column = run.state.float().norm(dim=1)
        else:
            assert log_p is not None
            column = spread(log_p) if name == "entropy" else lead(log_p)
        columns.append(column)
    return torch.stack(columns, 1)


def forecast(policy: Policy, measure: Measure, run: Reasoning) -> Tensor:
    """(A,): the gain that the router expects of depth, on no particular scale."""
    router = policy.router
    assert router is not None
    x = features(router.features, measure, run)
    mean, scale, weight = (x.new_tensor(v) for v in (router.mean, router.scale, router.weight))
    return ((x - mean) / scale) @ weight + router.bias


# --- the budget -------------------------------------------------------------------------------------


def depths(measures: Tensor, bar: float, least: int) -> Tensor:
    """(n, K) measures after step 0..K-1 -> (n,) steps that each case takes before it stops; K where it never does."""
    K = measures.shape[1]
    if not K:
        return torch.zeros(len(measures), dtype=torch.int64)
    fires = measures >= bar
    fires[:, :least] = False
    return torch.where(fires.any(1), fires.float().argmax(1), K)


def solve(measures: Tensor, target: float, least: int) -> float:
    """The bar at which the cases spend ``target`` steps on average, as nearly as they can.

    Mean depth does not fall as the bar rises, so the bar is found by bisection over the measured values.

    measures: (n, K), see ``depths``.
    """
    values = measures[:, least:].flatten().unique()  # ascending
    if not len(values):
        return 0.0  # there is nothing to decide
    values = torch.cat([values, values[-1:] + 1])  # the last one never fires
    low, high = 0, len(values) - 1  # the first bar that spends at least the target lies in low..high
    spent = lambda i: float(depths(measures, float(values[i]), least).float().mean())  # noqa: E731
    while low < high:
        middle = (low + high) // 2
        if spent(middle) < target:
            low = middle + 1
        else:
            high = middle
    if low and abs(spent(low - 1) - target) <= abs(spent(low) - target):
        low -= 1
    if low == 0:
        return float(values[0])
    return float((values[low - 1] + values[low]) / 2)  # between two cases, so that none sits on the bar
