"""Figures of ``reason inspect``: where the router spent depth on one document, and whether it was right to. Then the
router over some test documents: its health, transitions between depths, the misrouting audit, and its profiles.

The depth of each token is compared with full depth: a token is *under-computed* if its loss would have been much
smaller there. Full depth is no oracle: later recursions can also hurt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reason.backbones.tokens import END
from reason.datasets.packing import Cases
from reason.methods.base import Context
from reason.methods.figures import Figure, HeatMap, Lines, Table, Tokens
from reason.methods.mor import audit
from reason.methods.mor.calibrate import profile_thresholds, require_thresholds
from reason.methods.mor.monitor import (
    WINDOW_TOKENS,
    RoutingSample,
    alerts,
    health,
    observe,
    sample,
    transitions,
)
from reason.methods.mor.network import MixtureOfRecursions, RoutedOutput
from reason.methods.mor.outcomes import RoutedOutcomes, routed_outcomes
from reason.methods.mor.token_selection import KnownDepths, TopK, evaluation_route

SHOWN = 400  # tokens of the text that are shown
EXAMPLES = 8  # tokens whose depth cost most, shown as examples
NOTABLE = 0.5  # nats, above which a token was given the wrong depth
CONTEXT = 8  # tokens shown before one
BINS = 24  # of a histogram


def figures(config: Any, ctx: Context, network: MixtureOfRecursions, example: str) -> list[Figure]:
    """Figures of a test document: ``example`` is its id; '' takes one of median length.

    Raises:
        DataError: no such document, with the nearest.
        RunError: the run is routed by thresholds, and its calibration is gone.
    """
    require_thresholds(network.config, network.recursions, ctx.calibration)
    cases = ctx.data.test
    at = cases.find(example) if example else int(np.argsort(cases.tokens, kind="stable")[len(cases) // 2])
    batch = cases.batch(np.array([at]))
    tokens, targets, lengths = (batch[k].to(ctx.device) for k in ("tokens", "targets", "length"))
    cap, kv_mode = min(config.depth, network.recursions), network.config.kv_mode
    fitted = profile_thresholds(ctx.calibration, network.config.profile)
    route = evaluation_route(network.config, network.recursions, tokens, fitted, config.seed)
    routed = network(tokens, route, lengths=lengths, cap=cap, kv_mode=kv_mode)
    routed_outcome = routed_outcomes(network, routed, targets)
    at_full_depth = routed_outcomes(
        network, network(tokens, KnownDepths(cap), lengths=lengths, cap=cap, kv_mode=kv_mode), targets
    )
    real = routed_outcome.depth > 0
    document = DocumentTokens(
        ctx.data.tokens.pieces(batch["tokens"].numpy()[real]),
        routed_outcome.depth[real], routed_outcome.nll[real], (routed_outcome.nll - at_full_depth.nll)[real],
        batch["targets"].numpy()[real] >= 0, batch["level"].numpy()[real], routed_outcome.correct[real],
    )  # fmt: skip
    found: list[Figure] = [
        _text(f"{cases.id[at]}, {len(document.pieces):,} tokens", document, cap),
        _kinds(document),
    ]
    if cap > 1:
        found.append(_misrouted(document))
    if cap > 1 and network.by_step:
        top_k = network(
            tokens, TopK(network.config.shares(network.recursions)), lengths=lengths, cap=cap, kv_mode=kv_mode
        )
        found += [_capacity(ctx, network, routed, top_k, cap), _scores(routed)]
    if document.level.max(initial=0) > 0:
        found.append(_levels(document))
    if cap > 1 and not isinstance(route, KnownDepths):
        found += _router(config, ctx, network, cases, cap)
    return found


@dataclass(frozen=True)
class DocumentTokens:
    """The tokens of a document in their order, their depths, and how well the next token was predicted."""

    pieces: list[str]
    depth: np.ndarray  # (n,) recursions
    nll: np.ndarray  # (n,) nats, of the next token
    regret: np.ndarray  # (n,) nats more than at full depth
    is_target: np.ndarray  # (n,) bool, the next token is a target
    level: np.ndarray  # (n,) depth that the next token is known to need; -1 where it is not known
    correct: np.ndarray  # (n,) bool, the next token was predicted


def _text(title: str, document: DocumentTokens, cap: int) -> Figure:
    note = "The colour of a token shows how many recursions it took."
    if len(document.pieces) > SHOWN:
        note += f" Only the first {SHOWN} are shown."
    depths = [float(d) for d in document.depth[:SHOWN]]
    return Tokens(title, document.pieces[:SHOWN], depths, 1.0, float(max(cap, 2)), "recursions", note)


def _kinds(document: DocumentTokens) -> Figure:
    """Depth and loss by kind of token."""
    kind = np.array([token_kind(piece) for piece in document.pieces])
    rows = []
    for name in TOKEN_KINDS:
        at = kind == name
        if at.any():
            is_target = at & document.is_target
            loss = f"{document.nll[is_target].mean():.3f}" if is_target.any() else ""
            rows.append([name, f"{int(at.sum()):,}", f"{document.depth[at].mean():.2f}", loss])
    note = "Loss: of the next token after one of this kind, in nats."
    return Table("Depth by kind of token", ["kind", "tokens", "mean depth", "loss of next token"], rows, note)


def _misrouted(document: DocumentTokens) -> Figure:
    """The tokens for which routing cost most, and those for which it helped."""
    regret = np.where(document.is_target, document.regret, 0.0)
    order = [
        *np.argsort(-regret, kind="stable")[:EXAMPLES],
        *np.argsort(regret, kind="stable")[: EXAMPLES // 2][::-1],
    ]
    rows = [
        [
            int(i),
            _around(document.pieces, int(i)),
            int(document.depth[i]),
            f"{document.nll[i]:.2f}",
            f"{regret[i]:+.2f}",
        ]
        for i in dict.fromkeys(int(i) for i in order)
        if regret[i]
    ]
    targets = max(int(document.is_target.sum()), 1)
    under, over = (int((side * regret > NOTABLE).sum()) for side in (1, -1))
    note = (
        f"Cost: loss minus loss at full depth, in nats; {regret.sum() / targets:+.4f} on average over all targets. "
        f"Exiting early cost {under / targets:.1%} of the targets more than {NOTABLE} nats, and gained {over / targets:.1%} as much."
    )
    return Table("Where depth mattered", ["position", "text up to it", "depth", "loss", "cost"], rows, note)


def _capacity(
    ctx: Context, network: MixtureOfRecursions, routed: RoutedOutput, top_k: RoutedOutput, cap: int
) -> Figure:
    """The share of tokens that each recursion kept, and how well it predicts which ones top-k would choose."""
    target = (ctx.calibration or {}).get("capacities") or network.config.shares(network.recursions)
    fitted = profile_thresholds(ctx.calibration, network.config.profile)
    real, rows = (routed.depth > 0), []
    for r in range(1, cap + 1):
        took, chosen = (x.depth[real] >= r for x in (routed, top_k))
        threshold = fitted[r - 2] + network.config.shift if fitted and r > 1 else None
        rows.append([
            r, f"{target[r - 1]:.1%}", f"{took.float().mean():.1%}", "" if threshold is None else f"{threshold:.3f}",
            f"{(took == chosen).float().mean():.1%}",
        ])  # fmt: skip
    note = "Agrees with top-k: share of the tokens for which top-k over the whole text decides the same."
    return Table("Capacity", ["recursion", "target", "kept", "threshold", "agrees with top-k"], rows, note)


def _scores(routed: RoutedOutput) -> Figure:
    """Histograms of the logits of each step's router."""
    logits = [step.deciding.detach().float().cpu() for step in routed.steps if len(step.logits)]
    low, high = (float(f(torch.stack([f(values) for values in logits]))) for f in (torch.min, torch.max))
    edges = torch.linspace(low, high if high > low else low + 1, BINS + 1)
    series = {}
    for r, values in enumerate(logits, 1):
        count = torch.histogram(values, edges).hist
        series[f"recursion {r}"] = (count / count.sum()).tolist()
    middle = ((edges[1:] + edges[:-1]) / 2).tolist()
    return Lines("Scores of the routers", middle, series, "logit", "share of candidates")


def _levels(document: DocumentTokens) -> Figure:
    """Depth given against depth needed, where the data knows it."""
    rows = []
    for n in np.unique(document.level[document.is_target]).tolist():
        at = document.is_target & (document.level == n)
        rows.append(
            [
                n,
                f"{int(at.sum()):,}",
                f"{document.depth[at].mean():.2f}",
                f"{document.correct[at].mean():.1%}",
            ]
        )
    return Table("Depth by difficulty", ["steps needed", "targets", "mean depth", "accuracy"], rows)


# --- the router over some documents -----------------------------------------------------------------------


def _router(config: Any, ctx: Context, network: MixtureOfRecursions, cases: Cases, cap: int) -> list[Figure]:
    reference = (ctx.calibration or {}).get("reference")
    order = np.random.default_rng(config.seed).permutation(len(cases))
    text = sample(cases, order, reference["tokens"] if reference else WINDOW_TOKENS)
    fitted = profile_thresholds(ctx.calibration, network.config.profile)

    def route(tokens: torch.Tensor) -> Any:
        return evaluation_route(network.config, network.recursions, tokens, fitted, config.seed)

    size = config.eval.batch_size
    observed = observe(network, text, route, cap, size=size, device=ctx.device)
    assert observed.nll is not None and observed.is_target is not None
    routed_outcome = RoutedOutcomes(
        observed.nll, np.zeros_like(observed.is_target), observed.depth.astype(np.int64), observed.fallback
    )
    audited = audit.audit(network, text, routed_outcome, cap, size=size, device=ctx.device, seed=config.seed)
    n = f"{int((observed.depth > 0).sum()):,} tokens of {len(np.unique(observed.case))} test documents"
    found = [_health(observed, reference, n), _transitions(observed, cap), _audit(audited, n)]
    profiles = (ctx.calibration or {}).get("profiles")
    return found + ([_profiles(profiles, network.config.profile)] if profiles else [])


def _health(observed: RoutingSample, reference: Any, n: str) -> Figure:
    """Every statistic with its usual range and its limits; alerts first."""
    values = health(observed, reference and reference["shares"])
    raised = {alert.name: alert for alert in (alerts(values, reference) if reference else [])}
    limits, usual = (reference[k] if reference else {} for k in ("limits", "usual"))
    rows = []
    for name in sorted(values, key=lambda name: name not in raised):
        low, high = limits.get(name, (None, None))
        common = usual.get(name)
        rows.append([
            name, f"{values[name]:.3f}", "ALERT" if name in raised else "fine" if (low, high) != (None, None) else "",
            f"{common[0]:.3f} to {common[2]:.3f}" if common else "",
            "" if low is None else f"{low:.3f}", "" if high is None else f"{high:.3f}",
        ])  # fmt: skip
    message = "; ".join(f"{alert.name}: {alert.sentence}" for alert in raised.values()) or "no alert"
    note = (
        f"Over {n}. {message[0].upper()}{message[1:]}. "
        if reference
        else f"Over {n}; there is no calibrated reference to compare with. "
    )
    note += "Usual: the middle 90% of windows of validation text. Limits are set so that clean text seldom exceeds any of them."
    columns = ["statistic", "here", "verdict", "usual", "at least", "at most"]
    return Table("Health of the router", columns, rows, note)


def _transitions(observed: RoutingSample, cap: int) -> Figure:
    share = transitions(observed.depth, cap)
    depths = [str(r) for r in range(1, cap + 1)]
    load = np.bincount(observed.depth[observed.depth > 0].astype(np.int64), minlength=cap + 1)[1:]
    note = "Row: recursions of a token; column: of the next token; each row sums to 1. Equal rows mean that one depth "
    note += f"does not predict the next. Shares of all tokens: {', '.join(f'{s:.2f}' for s in load / load.sum())}."
    return HeatMap("Transitions between depths", share.tolist(), [f"after {d}" for d in depths], depths, note)


def _audit(found: dict[str, np.ndarray], n: str) -> Figure:
    """What the depths cost, beside the same depths shuffled."""
    of = audit.overall(lambda name: float(found[name].sum()))
    rows = [
        ["loss above full depth", f"{of['audit cost']:+.4f}", f"{of['audit cost at random']:+.4f}"],
        ["regret (loss above full depth where positive)", f"{of['audit regret']:.4f}", f"{of['audit regret at random']:.4f}"],
        ["rank correlation with the best depth", f"{of['audit rank correlation']:+.3f}",
         f"{of['audit rank correlation at random']:+.3f}"],
        ["under-computed", f"{of['audit under-computed']:.1%}", ""],
        ["over-computed", f"{of['audit over-computed']:.1%}", ""],
        ["wasted recursions per token", f"{of['audit wasted recursions']:.3f}", ""],
    ]  # fmt: skip
    note = (
        f"Over {n}, in nats per target. Shuffled: the same depths, shuffled within each document. Best depth: that of least "
        f"loss if all tokens exit there; full depth is not always best. Under-computed: exited early and lost more than "
        f"{audit.NOTABLE} nats. Over-computed: one recursion less would have cost at most {audit.ALIKE}. Wasted: beyond the best depth."
    )
    return Table("Misrouting audit", ["", "router", "shuffled"], rows, note)


def _profiles(profiles: dict[str, Any], used: str) -> Figure:
    rows = [
        [name + (" (in use)" if name == used else ""), f"{p['mean_depth']:.2f}", f"{p['nll']:.4f}",
         " ".join("all" if t < -1e29 else f"{t:.3f}" for t in p["thresholds"])]
        for name, p in profiles.items()
    ]  # fmt: skip
    note = "On validation text; loss in nats per token. Choose one with mor.profile, or with the profile of a request."
    return Table("Profiles", ["profile", "mean depth", "loss", "thresholds"], rows, note)


# --- kinds of token -----------------------------------------------------------------------------------

TOKEN_KINDS = (
    "end of document",
    "space",
    "digit",
    "opening",
    "closing",
    "other mark",
    "capital",
    "word start",
    "continuation",
)


def token_kind(piece: str) -> str:
    """One of ``KINDS``: of the first visible character; a continuation is a letter without a space before it."""
    if piece == END:
        return "end of document"
    bare = piece.lstrip()
    if not bare:
        return "space"
    first = bare[0]
    if first.isdigit():
        return "digit"
    if not (first.isalpha() or first == "_"):
        return "opening" if first in "([{<" else "closing" if first in ")]}>" else "other mark"
    if first.isupper():
        return "capital"
    return "word start" if len(bare) < len(piece) else "continuation"


def _around(pieces: list[str], i: int) -> str:
    return " ".join("".join(pieces[max(0, i - CONTEXT) : i + 1]).split())[-40:]
