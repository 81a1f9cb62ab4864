"""The health of a router: statistics of a window of text, and how far they may lie from those of validation text.

Limits are not set by hand. Windows of the same size are drawn from validation text, document by document, and
each statistic may differ from its median there as far as ``CLEAN`` of all windows do in their most unusual one, and
as far again because other documents differ more. So clean text seldom raises an alert, over all statistics together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reason.datasets.packing import Cases
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.outcomes import token_nll
from reason.methods.mor.router import max_violation, normalised_entropy
from reason.methods.mor.token_selection import KnownDepths, Route, TopK
from reason.methods.mor.trace import RoutingTrace, trace
from reason.metrics.association import auroc, population_stability_index

WINDOW_TOKENS = 4096  # tokens of a window of text
DRAWS = 300  # windows that limits are found with
CLEAN_SHARE, SLACK = 0.99, 2.0
SEQUENCES_PER_DOCUMENT = 4  # sequences of a document at most, so that a window holds several documents
MIN_SEQUENCES = 8  # sequences that a position must occur in before it can be called dead
DRIFT_TOKENS = 512  # tokens of requests over which drift is measured


@dataclass
class RoutingSample:
    """The routing of S sequences of T positions with N_r recursions, beside that of top-k and of full depth."""

    depth: np.ndarray  # (S, T) int8, 0 at padding
    logits: np.ndarray  # (S, N_r, T) float16, NaN where a token was not a candidate
    fallback: np.ndarray  # (S, T) bool, an output of a router was not finite
    case: np.ndarray  # (S,) document of each sequence
    top_k_depth: np.ndarray | None = None  # (S, T) depth by top-k
    is_target: np.ndarray | None = None  # (S, T) bool, there is a target
    nll: np.ndarray | None = None  # (S, T) nats, 0 without a target
    full_nll: np.ndarray | None = None  # (S, T) nats at full depth

    @classmethod
    def of(cls, traces: Sequence[RoutingTrace], case: np.ndarray) -> RoutingSample:
        """Of traces of equally long sequences."""
        depth, logits, fallback = (
            np.concatenate([getattr(t, name).cpu().numpy() for t in traces])
            for name in ("depth", "logits", "fallback")
        )
        return cls(depth, logits, fallback, case)

    def select(self, rows: np.ndarray) -> RoutingSample:
        """These sequences."""
        return replace(self, **{k: v[rows] for k, v in vars(self).items() if v is not None})


@torch.no_grad()
def observe(
    model: MixtureOfRecursions, windows: Mapping[str, Tensor], route: Callable[[Tensor], Route | None], cap: int,
    *, size: int, device: torch.device, whole: bool = True,
) -> RoutingSample:  # fmt: skip
    """Run windows (``Cases.batch``), ``size`` at a time: under ``route(tokens)``, and if ``whole`` is true also under top-k
    and at full depth."""
    kv_mode, expert = model.config.kv_mode, bool(model.by_step) and cap > 1
    traces, nll, full_nll, top_k_depth, is_target = [], [], [], [], []
    for a in range(0, len(windows["tokens"]), size):
        tokens, targets, lengths = (
            windows[k][a : a + size].to(device) for k in ("tokens", "targets", "length")
        )
        route_of = route(tokens)
        routed = model(tokens, route_of, lengths=lengths, cap=cap, kv_mode=kv_mode)
        traces.append(trace(model, routed, route_of))
        nll.append(token_nll(model, routed.states, targets))
        is_target.append((targets >= 0).cpu().numpy())
        if whole:
            deepest = model(tokens, KnownDepths(cap), lengths=lengths, cap=cap, kv_mode=kv_mode)
            full_nll.append(token_nll(model, deepest.states, targets))
        if whole and expert:
            top = TopK(model.config.shares(model.recursions))
            top_k_depth.append(
                model(tokens, top, lengths=lengths, cap=cap, kv_mode=kv_mode).depth.cpu().numpy()
            )
    observed = RoutingSample.of(traces, windows["case"].numpy())
    observed.nll, observed.is_target = np.concatenate(nll), np.concatenate(is_target)
    observed.full_nll = np.concatenate(full_nll) if full_nll else None
    observed.top_k_depth = np.concatenate(top_k_depth) if top_k_depth else None
    return observed


def sample(cases: Cases, order: np.ndarray, tokens: int) -> dict[str, Tensor]:
    """``Cases.batch`` of documents in this ``order``, ``SEQUENCES_PER_DOCUMENT`` spread over each, until they hold
    ``tokens``."""
    some = np.minimum(cases.tokens, SEQUENCES_PER_DOCUMENT * cases.context)[order]
    batch = cases.batch(order[: int(np.searchsorted(np.cumsum(some), tokens)) + 1])
    case = batch["case"].numpy()
    rows = []
    for document in range(int(case[-1]) + 1):
        of = np.flatnonzero(case == document)
        rows.append(
            of[
                np.unique(
                    np.linspace(0, len(of) - 1, min(SEQUENCES_PER_DOCUMENT, len(of))).round().astype(np.int64)
                )
            ]
        )
    return {name: column[torch.from_numpy(np.concatenate(rows))] for name, column in batch.items()}


def draw_windows(case: np.ndarray, length: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of sequences of documents drawn at random, until they hold ``tokens``; all of them where there are fewer."""
    rows, total = [], 0
    for document in rng.permutation(np.unique(case)):
        for row in np.flatnonzero(case == document):
            if total >= tokens:
                return np.array(rows)
            rows.append(row)
            total += int(length[row])
    return np.array(rows)


# --- statistics ------------------------------------------------------------------------------------------


def health(observed: RoutingSample, shares: Sequence[float] | None = None) -> dict[str, float]:
    """Statistics of a window by name; those that cannot be computed are absent.

    shares: of tokens that exit after 1, 2, ... recursions on validation text: what the PSI compares with.
    """
    N = observed.logits.shape[1]
    inside = observed.depth > 0
    depth = observed.depth[inside].astype(np.int64)
    load = np.bincount(depth, minlength=N + 1)[1:]
    found = {"mean depth": float(depth.mean())}
    if N > 1:
        found["entropy of depths"] = normalised_entropy(load.tolist())
        found["imbalance"] = max_violation(load.tolist())
        found["explained by position"] = variance_by_position(observed.depth)
        usual = (
            0 if shares is None else int(np.flatnonzero(shares)[-1]) + 1
        )  # a depth that no token takes any more counts
        found["dead positions"] = dead_positions(observed.depth, max(usual, int(depth.max())))
    if shares is not None:
        found["PSI"] = population_stability_index(load, shares)
    found["fallbacks"] = float(observed.fallback[inside].mean())
    for step in range(N):
        scores = observed.logits[:, step].astype(np.float32)
        candidate = np.isfinite(scores)
        if candidate.any():
            found[f"logit RMS {step + 1}"] = float(np.sqrt(np.square(scores[candidate]).mean()))
            found[f"mean logit {step + 1}"] = float(scores[candidate].mean())
        if not step:
            continue
        found[f"kept {step + 1}"] = float((depth > step).mean())
        if observed.top_k_depth is not None:
            chosen = observed.top_k_depth > step
            found[f"agrees with top-k {step + 1}"] = float(((observed.depth > step) == chosen)[inside].mean())
            found[f"AUROC {step + 1}"] = auroc(scores[candidate], chosen[candidate])
    full, nll, target = observed.full_nll, observed.nll, observed.is_target
    if full is not None and nll is not None and target is not None and target.any():
        found["regret"] = float(np.maximum(nll - full, 0)[target].mean())
    return {name: value for name, value in found.items() if not np.isnan(value)}


def variance_by_position(depth: np.ndarray) -> float:
    """The share of the variance of depths (S, T; 0 at padding) that their position alone explains, less what chance does.

    Positions have a mean each, which explains (positions - 1) / (tokens - 1) of any noise: epsilon squared takes that off.
    """
    inside = depth > 0
    place = np.nonzero(inside)[1]
    value = depth[inside].astype(np.float64)
    count = np.bincount(place)
    used = count > 0
    mean = np.bincount(place, weights=value)[used] / count[used]
    n, k, total = len(value), int(used.sum()), float(np.square(value - value.mean()).sum())
    if n <= k or not total:
        return 0.0
    within = float(np.square(value).sum() - (count[used] * np.square(mean)).sum())
    return 1 - within / (n - k) / (total / (n - 1))


def dead_positions(depth: np.ndarray, deepest: int) -> float:
    """The share of positions that no sequence of (S, T) takes to the deepest recursion; NaN where too few sequences have a
    position."""
    often = (depth > 0).sum(0) >= MIN_SEQUENCES
    if not often.any():
        return float("nan")
    return float(1 - (depth == deepest).any(0)[often].mean())


def transitions(depth: np.ndarray, recursions: int) -> np.ndarray:
    """(N_r, N_r): the share of tokens of depth i + 1 that one of depth j + 1 follows. Depths (S, T), 0 at padding."""
    now, then = depth[:, :-1].astype(np.int64), depth[:, 1:].astype(np.int64)
    both = (now > 0) & (then > 0)
    pairs = np.bincount((now[both] - 1) * recursions + then[both] - 1, minlength=recursions**2)
    counts = pairs.reshape(recursions, recursions).astype(np.float64)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


# --- limits -------------------------------------------------------------------------------------------


class Statistic(NamedTuple):
    """A statistic of health: when it raises an alert, and what that means."""

    side: int  # alerts only above its limits (1), only below (-1), or both (0)
    smallest: float  # a difference that is not worth an alert
    meaning: str  # a sentence for people
    least_of_all: float = 0.0
    most_of_all: float | None = 1.0  # None: the number of recursions

    def span(self, recursions: int) -> tuple[float, float]:
        """The values between which it always lies."""
        return self.least_of_all, float(recursions) if self.most_of_all is None else self.most_of_all


STATISTICS = {
    "mean depth": Statistic(0, 0.05, "tokens take {more} recursions than on validation text", 1.0, None),
    "entropy of depths": Statistic(-1, 0.03, "the depths collapse to a few"),
    "imbalance": Statistic(1, 0.05, "one depth takes most tokens", 0.0, None),
    "explained by position": Statistic(1, 0.03, "depth follows the position and not the text"),
    "dead positions": Statistic(1, 0.05, "some positions never reach the deepest recursion"),
    "PSI": Statistic(1, 0.02, "the depths are distributed differently than on validation text", 0.0, np.inf),
    "fallbacks": Statistic(1, 0.0, "the router returned NaN or infinity: these tokens ran at full depth"),
    "logit RMS": Statistic(0, 0.05, "the scores are {larger} than on validation text", 0.0, np.inf),
    "mean logit": Statistic(
        0, 0.05, "the scores are {higher} than on validation text on average", -np.inf, np.inf
    ),
    "kept": Statistic(0, 0.02, "a step keeps {more} tokens than on validation text"),
    "agrees with top-k": Statistic(-1, 0.02, "the router does not predict which tokens top-k chooses"),
    "AUROC": Statistic(-1, 0.02, "the scores do not separate the tokens that top-k chooses from the others"),
    "regret": Statistic(1, 0.01, "exiting early costs more than on validation text", 0.0, np.inf),
}
WORDS = {"more": ("more", "fewer"), "larger": ("larger", "smaller"), "higher": ("higher", "lower")}


def statistic(name: str) -> Statistic:
    """By its name, which may end in a step."""
    return STATISTICS[name.rstrip("0123456789 ")]


class Alert(NamedTuple):
    name: str
    value: float
    limit: float
    sentence: str


def alerts(found: Mapping[str, float], reference: Mapping[str, Any]) -> list[Alert]:
    """Statistics beyond their limits. reference: as returned by ``fit_reference``."""
    raised = []
    for name, value in found.items():
        low, high = reference["limits"].get(name, (None, None))
        for limit, side in ((high, 0), (low, 1)):
            if limit is not None and (value < limit if side else value > limit):
                words = {key: pair[side] for key, pair in WORDS.items()}
                raised.append(Alert(name, value, float(limit), statistic(name).meaning.format(**words)))
    return raised


def fit_reference(observed: RoutingSample) -> dict[str, Any]:
    """The reference: shares of the depths, and the limits and usual values of each statistic, over windows of clean text.

    tokens: of a window. limits: {name: (low or null, high or null)}. usual: {name: (5%, 50%, 95%)}. drift: the PSI
    that ``DRIFT`` tokens of any documents may have.
    """
    inside, N = observed.depth > 0, observed.logits.shape[1]
    length = inside.sum(1)
    load = np.bincount(observed.depth[inside].astype(np.int64), minlength=N + 1)[1:]
    shares = (load / max(load.sum(), 1)).tolist()
    rng = np.random.default_rng(0)
    size = min(WINDOW_TOKENS, int(length.sum()) // 2)
    windows = [observed.select(draw_windows(observed.case, length, size, rng)) for _ in range(DRAWS)]
    drawn = [health(w, shares) for w in windows]
    names = [n for n in drawn[0] if all(n in one for one in drawn)]
    values = np.array([[one[name] for name in names] for one in drawn])  # (windows, statistics)
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], axis=0)
    smallest = np.array([statistic(name).smallest for name in names])
    side = np.array([statistic(name).side for name in names])
    up, down = np.maximum(high - middle, smallest), np.maximum(middle - low, smallest)
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = np.where(values > middle, (values - middle) / up, (middle - values) / down)
    deviation = np.where(
        (side > 0) & (values < middle) | (side < 0) & (values > middle), 0.0, np.nan_to_num(deviation)
    )
    far = SLACK * max(1.0, float(np.quantile(deviation.max(1), CLEAN_SHARE)))
    limits = {}
    for name, m, u, d, s in zip(names, middle, up, down, side, strict=True):
        (bottom, top), one = statistic(name).span(N), far * np.array([d, u])
        low_at, high_at = float(m - one[0]), float(m + one[1])
        limits[name] = (  # a limit that no window can pass is left out
            low_at if s <= 0 and low_at > bottom else None,
            high_at if s >= 0 and high_at < top else None,
        )
    few = [
        observed.select(draw_windows(observed.case, length, min(DRIFT_TOKENS, size), rng)).depth
        for _ in range(DRAWS)
    ]
    drifts = [
        population_stability_index(np.bincount(d[d > 0].astype(np.int64), minlength=N + 1)[1:], shares)
        for d in few
    ]
    usual = {n: (float(a), float(b), float(c)) for n, a, b, c in zip(names, low, middle, high, strict=True)}
    return {
        "tokens": size, "shares": shares, "limits": limits, "usual": usual,
        "drift": SLACK * float(np.quantile(drifts, CLEAN_SHARE)),
    }  # fmt: skip
