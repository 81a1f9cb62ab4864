"""The health of a router: numbers of a window of text, and how far they may lie from what validation text shows.

A limit is no matter of taste. Windows of the same size are drawn from validation text, document by document, and
each statistic may differ from its median there as far as ``CLEAN`` of all windows do in their most unusual one, and
as far again because other documents differ more. So clean text alarms rarely, over all statistics together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reason.datasets.packing import Cases
from reason.methods.mor import judge
from reason.methods.mor.router import max_violation, normalised_entropy
from reason.methods.mor.routes import Known, Route, TopK
from reason.methods.mor.trace import RoutingTrace, trace

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions

WINDOW = 4096  # tokens of a window
DRAWS = 300  # windows that limits are found with
CLEAN, SLACK = 0.99, 2.0
EACH = 4  # sequences at most of a document, so that a window holds several
OFTEN = 8  # sequences that must have a position before it can be called dead
SHARE = 1e-3  # a depth rarer than this counts as this rare in the PSI
DRIFT = 512  # tokens of requests over which drift is judged


@dataclass
class Watched:
    """S sequences of T positions, N_r recursions: what was decided, and what would have been."""

    depth: np.ndarray  # (S, T) int8, 0 at padding
    logits: np.ndarray  # (S, N_r, T) float16, NaN where a token was no candidate
    broken: np.ndarray  # (S, T) bool
    case: np.ndarray  # (S,) document of each
    ahead: np.ndarray | None = None  # (S, T) depth that top-k would give
    asked: np.ndarray | None = None  # (S, T) bool, a loss is taken here
    nll: np.ndarray | None = None  # (S, T) nats, 0 where not asked
    full: np.ndarray | None = None  # (S, T) nats at full depth

    @classmethod
    def of(cls, traces: Sequence[RoutingTrace], case: np.ndarray) -> Watched:
        """Of traces of equally long sequences."""
        depth, logits, broken = (
            np.concatenate([getattr(t, name).cpu().numpy() for t in traces])
            for name in ("depth", "logits", "broken")
        )
        return cls(depth, logits, broken, case)

    def pick(self, rows: np.ndarray) -> Watched:
        """These sequences."""
        return replace(self, **{k: v[rows] for k, v in vars(self).items() if v is not None})


@torch.no_grad()
def watch(
    model: MixtureOfRecursions, windows: Mapping[str, Tensor], route: Callable[[Tensor], Route | None], cap: int,
    *, size: int, device: torch.device, whole: bool = True,
) -> Watched:  # fmt: skip
    """Run windows (``Cases.batch``), ``size`` at a time: under ``route(tokens)``, and where ``whole`` says so under
    top-k and at full depth too."""
    memory, expert = model.config.memory, bool(model.by_step) and cap > 1
    traces, told, full, ahead, asked = [], [], [], [], []
    for a in range(0, len(windows["tokens"]), size):
        tokens, targets, real = (windows[k][a : a + size].to(device) for k in ("tokens", "targets", "length"))
        way = route(tokens)
        routed = model(tokens, way, real=real, cap=cap, memory=memory)
        traces.append(trace(model, routed, way))
        told.append(judge.tell(model, routed, targets).nll)
        asked.append((targets >= 0).cpu().numpy())
        if whole:
            deepest = model(tokens, Known(cap), real=real, cap=cap, memory=memory)
            full.append(judge.tell(model, deepest, targets).nll)
        if whole and expert:
            top = TopK(model.config.shares(model.recursions))
            ahead.append(model(tokens, top, real=real, cap=cap, memory=memory).depth.cpu().numpy())
    seen = Watched.of(traces, windows["case"].numpy())
    seen.nll, seen.asked = np.concatenate(told), np.concatenate(asked)
    seen.full = np.concatenate(full) if full else None
    seen.ahead = np.concatenate(ahead) if ahead else None
    return seen


def sample(cases: Cases, order: np.ndarray, tokens: int) -> dict[str, Tensor]:
    """``Cases.batch`` of documents in this ``order``, ``EACH`` sequences spread over each, until they hold ``tokens``."""
    some = np.minimum(cases.tokens, EACH * cases.context)[order]
    batch = cases.batch(order[: int(np.searchsorted(np.cumsum(some), tokens)) + 1])
    case = batch["case"].numpy()
    rows = []
    for document in range(int(case[-1]) + 1):
        of = np.flatnonzero(case == document)
        rows.append(of[np.unique(np.linspace(0, len(of) - 1, min(EACH, len(of))).round().astype(np.int64))])
    return {name: column[torch.from_numpy(np.concatenate(rows))] for name, column in batch.items()}


def windows_of(case: np.ndarray, length: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Sequences of documents drawn at random, as many as hold ``tokens``; all of them where there are fewer."""
    rows, total = [], 0
    for document in rng.permutation(np.unique(case)):
        for row in np.flatnonzero(case == document):
            if total >= tokens:
                return np.array(rows)
            rows.append(row)
            total += int(length[row])
    return np.array(rows)


# --- numbers ------------------------------------------------------------------------------------------


def health(seen: Watched, shares: Sequence[float] | None = None) -> dict[str, float]:
    """Numbers of a window by name; those that cannot be had are absent.

    shares: of tokens that leave after 1, 2, ... recursions on validation text: what the PSI compares with.
    """
    N = seen.logits.shape[1]
    inside = seen.depth > 0
    depth = seen.depth[inside].astype(np.int64)
    load = np.bincount(depth, minlength=N + 1)[1:]
    found = {"mean depth": float(depth.mean())}
    if N > 1:
        found["entropy of depths"] = normalised_entropy(load.tolist())
        found["imbalance"] = max_violation(load.tolist())
        found["explained by position"] = by_position(seen.depth)
        usual = (
            0 if shares is None else int(np.flatnonzero(shares)[-1]) + 1
        )  # a depth that nobody takes any more counts
        found["dead positions"] = dead(seen.depth, max(usual, int(depth.max())))
    if shares is not None:
        found["PSI"] = psi(load, shares)
    found["fallbacks"] = float(seen.broken[inside].mean())
    for step in range(N):
        scores = seen.logits[:, step].astype(np.float32)
        candidate = np.isfinite(scores)
        if candidate.any():
            found[f"logit RMS {step + 1}"] = float(np.sqrt(np.square(scores[candidate]).mean()))
            found[f"mean logit {step + 1}"] = float(scores[candidate].mean())
        if not step:
            continue
        found[f"kept {step + 1}"] = float((depth > step).mean())
        if seen.ahead is not None:
            chosen = seen.ahead > step
            found[f"agrees with top-k {step + 1}"] = float(((seen.depth > step) == chosen)[inside].mean())
            found[f"AUROC {step + 1}"] = auroc(scores[candidate], chosen[candidate])
    if seen.full is not None and seen.nll is not None and seen.asked is not None:
        found["regret"] = float(np.maximum(seen.nll - seen.full, 0)[seen.asked].mean())
    return {name: value for name, value in found.items() if not np.isnan(value)}


def auroc(scores: np.ndarray, chosen: np.ndarray) -> float:
    """How often one of those chosen scores above one of the others, ties half; NaN where either are none."""
    p, n = int(chosen.sum()), int((~chosen).sum())
    if not p or not n:
        return float("nan")
    return float((ranks(scores)[chosen].sum() - p * (p + 1) / 2) / (p * n))


def ranks(values: np.ndarray) -> np.ndarray:
    """(n,) ranks from 1, those of equal values their mean."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def psi(counts: np.ndarray | Sequence[float], shares: Sequence[float]) -> float:
    """Population stability index of a histogram against reference shares: sum of (p - q) ln(p / q)."""
    p = np.maximum(np.asarray(counts, np.float64) / max(float(np.sum(counts)), 1), SHARE)
    q = np.maximum(np.asarray(shares, np.float64), SHARE)
    return float(((p - q) * np.log(p / q)).sum())


def by_position(depth: np.ndarray) -> float:
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


def dead(depth: np.ndarray, deepest: int) -> float:
    """The share of positions that no sequence of (S, T) takes to the deepest recursion; NaN where too few have a position."""
    often = (depth > 0).sum(0) >= OFTEN
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


class Kind(NamedTuple):
    side: int  # alarms only above (1), only below (-1), or both (0)
    least: float  # a difference that is worth no alarm
    saying: str  # what it means, where it is above and below
    least_of_all: float = 0.0
    most_of_all: float | None = 1.0  # None: the number of recursions

    def span(self, recursions: int) -> tuple[float, float]:
        """Between which values it lies, whatever happens."""
        return self.least_of_all, float(recursions) if self.most_of_all is None else self.most_of_all


KINDS = {
    "mean depth": Kind(0, 0.05, "tokens take {more} recursions than on validation text", 1.0, None),
    "entropy of depths": Kind(-1, 0.03, "the depths collapse to few"),
    "imbalance": Kind(1, 0.05, "one depth takes most tokens", 0.0, None),
    "explained by position": Kind(1, 0.03, "depth follows the position and not the text"),
    "dead positions": Kind(1, 0.05, "some positions never go deepest"),
    "PSI": Kind(1, 0.02, "the depths are spread otherwise than on validation text", 0.0, np.inf),
    "fallbacks": Kind(1, 0.0, "the router says what is no number: these tokens go all the way"),
    "logit RMS": Kind(0, 0.05, "the scores are {larger} than on validation text", 0.0, np.inf),
    "mean logit": Kind(0, 0.05, "the scores lie {higher} than on validation text", -np.inf, np.inf),
    "kept": Kind(0, 0.02, "a step keeps {more} tokens than on validation text"),
    "agrees with top-k": Kind(-1, 0.02, "the router does not foresee whom top-k chooses"),
    "AUROC": Kind(-1, 0.02, "scores do not part those whom top-k chooses from the others"),
    "regret": Kind(1, 0.01, "leaving early costs more than on validation text", 0.0, np.inf),
}
WORDS = {"more": ("more", "fewer"), "larger": ("larger", "smaller"), "higher": ("higher", "lower")}


def kind(name: str) -> Kind:
    """Of a statistic, whose name may end in a step."""
    return KINDS[name.rstrip("0123456789 ")]


class Alert(NamedTuple):
    name: str
    value: float
    limit: float
    sentence: str


def alerts(found: Mapping[str, float], reference: Mapping[str, Any]) -> list[Alert]:
    """What lies beyond its limit. reference: as ``refer`` gives it."""
    told = []
    for name, value in found.items():
        low, high = reference["limits"].get(name, (None, None))
        for limit, side in ((high, 0), (low, 1)):
            if limit is not None and (value < limit if side else value > limit):
                words = {key: pair[side] for key, pair in WORDS.items()}
                told.append(Alert(name, value, float(limit), kind(name).saying.format(**words)))
    return told


def refer(seen: Watched) -> dict[str, Any]:
    """The reference: shares of the depths, and of each statistic its limits and what is usual, over windows of clean text.

    tokens: of a window. limits: {name: (low or null, high or null)}. usual: {name: (5%, 50%, 95%)}. drift: the PSI
    that ``DRIFT`` tokens of any documents may have.
    """
    inside, N = seen.depth > 0, seen.logits.shape[1]
    length = inside.sum(1)
    load = np.bincount(seen.depth[inside].astype(np.int64), minlength=N + 1)[1:]
    shares = (load / max(load.sum(), 1)).tolist()
    rng = np.random.default_rng(0)
    size = min(WINDOW, int(length.sum()) // 2)
    windows = [seen.pick(windows_of(seen.case, length, size, rng)) for _ in range(DRAWS)]
    drawn = [health(w, shares) for w in windows]
    names = [n for n in drawn[0] if all(n in one for one in drawn)]
    values = np.array([[one[name] for name in names] for one in drawn])  # (windows, statistics)
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], axis=0)
    least = np.array([kind(name).least for name in names])
    side = np.array([kind(name).side for name in names])
    up, down = np.maximum(high - middle, least), np.maximum(middle - low, least)
    with np.errstate(divide="ignore", invalid="ignore"):
        odd = np.where(values > middle, (values - middle) / up, (middle - values) / down)
    odd = np.where((side > 0) & (values < middle) | (side < 0) & (values > middle), 0.0, np.nan_to_num(odd))
    far = SLACK * max(1.0, float(np.quantile(odd.max(1), CLEAN)))
    limits = {}
    for name, m, u, d, s in zip(names, middle, up, down, side, strict=True):
        (bottom, top), one = kind(name).span(N), far * np.array([d, u])
        low_at, high_at = float(m - one[0]), float(m + one[1])
        limits[name] = (  # what no window can pass is no limit
            low_at if s <= 0 and low_at > bottom else None,
            high_at if s >= 0 and high_at < top else None,
        )
    few = [seen.pick(windows_of(seen.case, length, min(DRIFT, size), rng)).depth for _ in range(DRAWS)]
    drifts = [psi(np.bincount(d[d > 0].astype(np.int64), minlength=N + 1)[1:], shares) for d in few]
    usual = {n: (float(a), float(b), float(c)) for n, a, b, c in zip(names, low, middle, high, strict=True)}
    return {
        "tokens": size, "shares": shares, "limits": limits, "usual": usual,
        "drift": SLACK * float(np.quantile(drifts, CLEAN)),
    }  # fmt: skip
