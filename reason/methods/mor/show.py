"""One document as figures: where the router spent its depth, and whether it was right to. Then the router over
some test documents: its health, how depths follow each other, what other depths would have given, and its profiles.

What a token was given is compared with running everything to full depth: *under-computed* is a token whose
loss would have been much smaller there. Full depth is no oracle: later recursions can also hurt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from reason.backbones.tokens import END
from reason.datasets.packing import Cases
from reason.methods.base import Context
from reason.methods.figures import Figure, HeatMap, Lines, Table, Tokens
from reason.methods.mor import audit, judge
from reason.methods.mor.monitor import WINDOW, Watched, alerts, health, sample, transitions, watch
from reason.methods.mor.routes import Known, TopK

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions, Routed

SHOWN = 400  # tokens of the text
SURPRISES = 8  # tokens whose depth cost most
NOTABLE = 0.5  # nats, above which a token was given the wrong depth
CONTEXT = 8  # tokens shown before one
BINS = 24  # of a histogram


def figures(config: Any, ctx: Context, network: MixtureOfRecursions, example: str) -> list[Figure]:
    """Figures of a test document: ``example`` is its id; '' takes one of median length.

    Raises:
        DataError: no such document, with the nearest.
    """
    cases = cast(Cases, ctx.data.test)
    at = cases.find(example) if example else int(np.argsort(cases.tokens, kind="stable")[len(cases) // 2])
    batch = cases.batch(np.array([at]))
    tokens, targets, real = (batch[k].to(ctx.device) for k in ("tokens", "targets", "length"))
    cap, memory = min(config.depth, network.recursions), network.config.memory
    fitted = judge.thresholds_of(ctx.calibration, network.config.profile)
    route = judge.judging_route(network.config, network, tokens, fitted, config.seed)
    routed = network(tokens, route, real=real, cap=cap, memory=memory)
    told = judge.tell(network, routed, targets)
    full = judge.tell(network, network(tokens, Known(cap), real=real, cap=cap, memory=memory), targets)
    inside = told.depth > 0
    read = Read(
        ctx.data.tokens.pieces(batch["tokens"].numpy()[inside]),
        told.depth[inside], told.nll[inside], (told.nll - full.nll)[inside],
        batch["targets"].numpy()[inside] >= 0, batch["level"].numpy()[inside], told.hit[inside],
    )  # fmt: skip
    found: list[Figure] = [_text(f"{cases.id[at]}, {len(read.pieces):,} tokens", read, cap), _kinds(read)]
    if cap > 1:
        found.append(_surprises(read))
    if cap > 1 and network.by_step:
        ahead = network(
            tokens, TopK(network.config.shares(network.recursions)), real=real, cap=cap, memory=memory
        )
        found += [_capacity(ctx, network, routed, ahead, cap), _scores(routed)]
    if read.level.max(initial=0) > 0:
        found.append(_levels(read))
    if cap > 1 and not isinstance(route, Known):
        found += _router(config, ctx, network, cases, cap)
    return found


@dataclass(frozen=True)
class Read:
    """The tokens of a document in their order: what was read, the depth it was given, how its next token was foreseen."""

    pieces: list[str]
    depth: np.ndarray  # (n,) recursions
    nll: np.ndarray  # (n,) nats, of the token after it
    regret: np.ndarray  # (n,) nats more than at full depth
    asked: np.ndarray  # (n,) bool, the token after it is a target
    level: np.ndarray  # (n,) depth that the token after it is known to need; -1 where nothing is known
    hit: np.ndarray  # (n,) bool, the token after it was foreseen


def _text(title: str, read: Read, cap: int) -> Figure:
    note = "Each token in the colour of the recursions it was given."
    if len(read.pieces) > SHOWN:
        note += f" The first {SHOWN} are shown."
    depths = [float(d) for d in read.depth[:SHOWN]]
    return Tokens(title, read.pieces[:SHOWN], depths, 1.0, float(max(cap, 2)), "recursions", note)


def _kinds(read: Read) -> Figure:
    """Depth and loss by what kind of token was read."""
    kind = np.array([kind_of(piece) for piece in read.pieces])
    rows = []
    for name in KINDS:
        at = kind == name
        if at.any():
            asked = at & read.asked
            loss = f"{read.nll[asked].mean():.3f}" if asked.any() else ""
            rows.append([name, f"{int(at.sum()):,}", f"{read.depth[at].mean():.2f}", loss])
    note = "loss: nats, of the token that comes after one of this kind."
    return Table("Depth by kind of token", ["kind", "tokens", "mean depth", "loss after it"], rows, note)


def _surprises(read: Read) -> Figure:
    """Where routing cost most, and where it helped."""
    regret = np.where(read.asked, read.regret, 0.0)
    order = [
        *np.argsort(-regret, kind="stable")[:SURPRISES],
        *np.argsort(regret, kind="stable")[: SURPRISES // 2][::-1],
    ]
    rows = [
        [int(i), _around(read.pieces, int(i)), int(read.depth[i]), f"{read.nll[i]:.2f}", f"{regret[i]:+.2f}"]
        for i in dict.fromkeys(int(i) for i in order)
        if regret[i]
    ]
    asked = max(int(read.asked.sum()), 1)
    under, over = (int((side * regret > NOTABLE).sum()) for side in (1, -1))
    note = (
        f"Cost: the loss here less the one at full depth, in nats; over all targets {regret.sum() / asked:+.4f} on average. "
        f"{under / asked:.1%} of the targets lost more than {NOTABLE} nats by leaving early, {over / asked:.1%} won as much."
    )
    return Table("Where depth mattered", ["place", "text up to it", "depth", "loss", "cost"], rows, note)


def _capacity(ctx: Context, network: MixtureOfRecursions, routed: Routed, ahead: Routed, cap: int) -> Figure:
    """What each recursion kept, and how well it foresaw whom top-k would choose."""
    target = (ctx.calibration or {}).get("capacities") or network.config.shares(network.recursions)
    fitted = judge.thresholds_of(ctx.calibration, network.config.profile)
    inside, rows = (routed.depth > 0), []
    for r in range(1, cap + 1):
        took, chosen = (x.depth[inside] >= r for x in (routed, ahead))
        theta = fitted[r - 2] + network.config.shift if fitted and r > 1 else None
        rows.append([
            r, f"{target[r - 1]:.1%}", f"{took.float().mean():.1%}", "" if theta is None else f"{theta:.3f}",
            f"{(took == chosen).float().mean():.1%}",
        ])  # fmt: skip
    note = "agrees with top-k: share of the tokens for which looking at the whole text would decide the same."
    return Table("Capacity", ["recursion", "target", "kept", "threshold", "agrees with top-k"], rows, note)


def _scores(routed: Routed) -> Figure:
    """Histograms of the logits that each step's router gave its candidates."""
    heard = [s.logits if s.foreseen is None else s.foreseen for s in routed.scored if len(s.logits)]
    heard = [logits.detach().float().cpu() for logits in heard]
    low, high = (float(f(torch.stack([f(h) for h in heard]))) for f in (torch.min, torch.max))
    edges = torch.linspace(low, high if high > low else low + 1, BINS + 1)
    series = {}
    for r, h in enumerate(heard, 1):
        count = torch.histogram(h, edges).hist
        series[f"recursion {r}"] = (count / count.sum()).tolist()
    middle = ((edges[1:] + edges[:-1]) / 2).tolist()
    return Lines("Scores of the routers", middle, series, "logit", "share of the candidates")


def _levels(read: Read) -> Figure:
    """Depth given against depth needed, where the data knows it."""
    rows = []
    for n in np.unique(read.level[read.asked]).tolist():
        at = read.asked & (read.level == n)
        rows.append([n, f"{int(at.sum()):,}", f"{read.depth[at].mean():.2f}", f"{read.hit[at].mean():.1%}"])
    return Table("Depth by difficulty", ["steps needed", "targets", "mean depth", "foreseen"], rows)


# --- the router over some documents -----------------------------------------------------------------------


def _router(config: Any, ctx: Context, network: MixtureOfRecursions, cases: Cases, cap: int) -> list[Figure]:
    reference = (ctx.calibration or {}).get("reference")
    order = np.random.default_rng(config.seed).permutation(len(cases))
    text = sample(cases, order, reference["tokens"] if reference else WINDOW)
    fitted = judge.thresholds_of(ctx.calibration, network.config.profile)

    def route(tokens: torch.Tensor) -> Any:
        return judge.judging_route(network.config, network, tokens, fitted, config.seed)

    size = config.eval.batch_size
    seen = watch(network, text, route, cap, size=size, device=ctx.device)
    assert seen.nll is not None and seen.asked is not None
    told = judge.Told(seen.nll, np.zeros_like(seen.asked), seen.depth.astype(np.int64), seen.broken)
    audited = audit.audit(network, text, told, cap, size=size, device=ctx.device, seed=config.seed)
    n = f"{int((seen.depth > 0).sum()):,} tokens of {len(np.unique(seen.case))} test documents"
    found = [_health(seen, reference, n), _transitions(seen, cap), _audit(audited, n)]
    profiles = (ctx.calibration or {}).get("profiles")
    return found + ([_profiles(profiles, network.config.profile)] if profiles else [])


def _health(seen: Watched, reference: Any, n: str) -> Figure:
    """Every statistic, what is usual and what is allowed; alerts first."""
    values = health(seen, reference and reference["shares"])
    odd = {alert.name: alert for alert in (alerts(values, reference) if reference else [])}
    limits, usual = (reference[k] if reference else {} for k in ("limits", "usual"))
    rows = []
    for name in sorted(values, key=lambda name: name not in odd):
        low, high = limits.get(name, (None, None))
        common = usual.get(name)
        rows.append([
            name, f"{values[name]:.3f}", "ALERT" if name in odd else "fine" if (low, high) != (None, None) else "",
            f"{common[0]:.3f} to {common[2]:.3f}" if common else "",
            "" if low is None else f"{low:.3f}", "" if high is None else f"{high:.3f}",
        ])  # fmt: skip
    said = "; ".join(f"{alert.name}: {alert.sentence}" for alert in odd.values()) or "no alert"
    note = (
        f"Over {n}. {said[0].upper()}{said[1:]}. "
        if reference
        else f"Over {n}; no reference was calibrated. "
    )
    note += "usual: 90% of clean windows of validation text; limits: so that clean text seldom passes any of them."
    columns = ["statistic", "here", "verdict", "usual", "at least", "at most"]
    return Table("Health of the router", columns, rows, note)


def _transitions(seen: Watched, cap: int) -> Figure:
    share = transitions(seen.depth, cap)
    depths = [str(r) for r in range(1, cap + 1)]
    load = np.bincount(seen.depth[seen.depth > 0].astype(np.int64), minlength=cap + 1)[1:]
    note = "Row: recursions of a token; column: of the one after it; in each row the shares sum to 1. Rows that are alike "
    note += f"mean that the last depth says nothing of the next. Shares of all tokens: {', '.join(f'{s:.2f}' for s in load / load.sum())}."
    return HeatMap(
        "How depths follow each other", share.tolist(), [f"after {d}" for d in depths], depths, note
    )


def _audit(found: dict[str, np.ndarray], n: str) -> Figure:
    """What the depths cost, beside the same depths at random."""
    of = audit.overall(lambda name: float(found[name].sum()))
    rows = [
        ["loss more than at full depth", f"{of['audit cost']:+.4f}", f"{of['audit cost at random']:+.4f}"],
        ["regret: where it was more", f"{of['audit regret']:.4f}", f"{of['audit regret at random']:.4f}"],
        ["rank correlation with the best depth", f"{of['audit rank correlation']:+.3f}",
         f"{of['audit rank correlation at random']:+.3f}"],
        ["under-computed", f"{of['audit under-computed']:.1%}", ""],
        ["over-computed", f"{of['audit over-computed']:.1%}", ""],
        ["wasted recursions a token", f"{of['audit wasted recursions']:.3f}", ""],
    ]  # fmt: skip
    note = (
        f"Over {n}, in nats a target. at random: the same depths dealt out at random within each document. best: the depth of least loss, "
        f"had all tokens left there; full depth is no oracle. under-computed: left early and lost more than "
        f"{audit.NOTABLE} nats; over-computed: one recursion less would have cost at most {audit.ALIKE}; wasted: beyond the best depth."
    )
    return Table("Misrouting audit", ["", "router", "at random"], rows, note)


def _profiles(profiles: dict[str, Any], used: str) -> Figure:
    rows = [
        [name + (" (in use)" if name == used else ""), f"{p['mean_depth']:.2f}", f"{p['nll']:.4f}",
         " ".join("all" if t < -1e29 else f"{t:.3f}" for t in p["thresholds"])]
        for name, p in profiles.items()
    ]  # fmt: skip
    note = "On validation text; loss in nats a token. Pick one with mor.profile, or by a request's profile."
    return Table("Profiles", ["profile", "mean depth", "loss", "thresholds"], rows, note)


# --- kinds of token -----------------------------------------------------------------------------------

KINDS = (
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


def kind_of(piece: str) -> str:
    """One of ``KINDS``: of the first visible character; a continuation is a letter that nothing stands before."""
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
