"""One request as figures: what was read, what each step changed, and what the answer rests on.

Each figure says one thing; the numbers are those of ``explain.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from reason.methods.base import Context
from reason.methods.figures import Figure, HeatMap, Table
from reason.methods.latent import candidates, objective
from reason.methods.latent.answer import Answerer
from reason.methods.latent.explain import Explainer, Trace, category_mass, nearest
from reason.metrics.association import spearman

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder

TOP = 10
SHOWN = 20  # items of the history that are listed, the last ones
NEAREST = 5
WIDEST, NARROW = 40, 22  # characters of a title; where it shares the line with more than three others
CATEGORIES = ("genres", "genre", "categories", "category")  # item fields that hold them, joined by |
SAYING = "Latent steps are numeric refinements of a state, not reasons in words."


@dataclass(frozen=True)
class Request:
    """All that the figures of one request draw on."""

    who: str
    items: Tensor  # (n,), what the encoder reads
    whole: int  # items of the whole history
    target: int
    titles: list[str]  # of every item
    depth: int  # the step that answered
    explainer: Explainer  # of the answer
    traced: Trace  # of all steps there could be
    order: list[list[int]]  # after each step the candidates, best first
    probability: Tensor  # (K + 1, N), 0 where an item is no candidate
    tau: list[float]  # the temperature it was computed at, step by step

    @property
    def named(self) -> list[str]:
        return [self.titles[i] for i in self.items.tolist()]

    @property
    def best(self) -> int:
        """The item recommended first."""
        return self.order[self.depth][0]

    def step(self, k: int) -> str:
        mark = " (answer)" if k == self.depth else " (not taken)" if k > self.depth else ""
        return f"step {k}{mark}"


def figures(
    config: Any,
    ctx: Context,
    model: SequenceEncoder,
    example: str,
    depth: int | None = None,
    stopped: str = "",
) -> list[Figure]:
    """What latent reasoning did for one test case.

    Args:
        example: id of a test case or user; '' takes a history of median length.
        depth: steps after which this request was answered; None: as the run's policy answers it. Where
            it is less than ``config.depth``, the top ten and the confidence show the steps that were
            not taken too.
        stopped: a sentence on why it stopped there; None in ``depth`` finds its own.

    Raises:
        DataError: there is no such user (the nearest is given).
    """
    cases = cast(Any, ctx.data.test)
    index = cases.find(example) if example else int(np.argsort(cases.history, kind="stable")[len(cases) // 2])
    if depth is None:
        depth, stopped = _decided(config, ctx, model, index)
    request = _request(config, ctx, model, index, depth)
    found: list[Figure] = [
        _history(request),
        _top(request, stopped),
        _confidence(request),
    ]
    if request.depth:
        found += [_contributions(request), _attention(request)]
    found.append(_nearest(request))
    if (categories := categories_of(ctx.dataset)) is not None:
        found.append(_categories(request, categories))
    return found


def categories_of(dataset: Any) -> list[list[str]] | None:
    """The categories of each item, or None where the dataset knows of none."""
    for name in CATEGORIES:
        if any(column := dataset.item_fields.get(name, [])):
            return [list(dict.fromkeys(c.strip() for c in text.split("|") if c.strip())) for text in column]
    return None


def _decided(config: Any, ctx: Context, model: SequenceEncoder, index: int) -> tuple[int, str]:
    """The steps that the run's policy takes for a test case, and a sentence on why no more ('' if it was fixed)."""
    answer, cases = Answerer(config, ctx, model), cast(Any, ctx.data.test)
    where = np.array([index])
    batch, seen = cases.batch(where), candidates.seen(config, cases, where)
    served = answer(batch["items"], batch["length"], config.depth, seen).served
    why = answer.reason(served, config.depth)
    return int(served.depth[0]), f"{why[:1].upper()}{why[1:]}." if why else ""


def _request(config: Any, ctx: Context, model: SequenceEncoder, index: int, depth: int) -> Request:
    from reason.methods.latent.method import titles_of

    cases = cast(Any, ctx.data.test)
    where = np.array([index])
    batch = cases.batch(where)
    target, items = int(batch["target"][0]), batch["items"][0].to(ctx.device)
    traced = Explainer(config, model, config.depth).trace(items)
    scores = traced.scores
    if (seen := candidates.seen(config, cases, where)) is not None:
        scores = scores.clone()
        scores[:, seen[1][seen[1] != target]] = -torch.inf
    ranked = int(scores[0].isfinite().sum())
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :ranked].tolist()
    fitted = (ctx.calibration or {}).get("temperatures")
    tau = (fitted or objective.temperatures(config.latent, model.steps))[: config.depth + 1]
    probability = (scores.double() / scores.new_tensor(tau)[:, None]).softmax(-1)
    titles = [_short(title, WIDEST) for title in titles_of(ctx.dataset)]
    return Request(
        str(cases.id[index]), items, int(cases.history[index]), target, titles, depth,
        Explainer(config, model, depth), traced, order, probability, tau,
    )  # fmt: skip


def _short(title: str, most: int) -> str:
    return title if len(title) <= most else title[: most - 1].rstrip() + "…"


def _join(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


# --- what was read, and what the answer rests on -------------------------------------------------------


def _history(r: Request) -> Table:
    named, n = r.named, len(r.items)
    skip = max(n - SHOWN, 0)
    columns, notes = ["place", "item"], [f"The next item was {r.titles[r.target]}."]
    rows: list[list[Any]] = [[r.whole - n + i + 1, name] for i, name in enumerate(named)]
    if r.whole > SHOWN:
        reads = f"; the encoder reads the last {n}" if n < r.whole else ""
        notes.insert(0, f"The last {n - skip} of {r.whole} items{reads}.")
    seen = r.explainer.trace(r.items).looked if r.depth else None
    if seen is not None:
        _add(columns, rows, "attention", [f"{share:.1%}" for share in seen.tolist()])
        notes.append("Attention: the share given to an item by the latent steps.")
    if n == 1:
        notes.append("What the answer owes to an item cannot be tested where it is the only one.")
        return Table(f"History of user {r.who}", columns, rows, _join(*notes))
    effect = r.explainer.occlusion(r.items, r.best)
    cells = _signed(effect.tolist())
    _add(columns, rows, "effect", cells)
    notes.append(
        f"Effect: how far the score of the answer, {r.titles[r.best]}, falls when the item is removed "
        "and later ones move up."
    )
    usual = _signed([*effect.tolist(), float(effect.median())])[-1]
    notes.append(f"Median effect: {usual}, for a shorter history alone shifts the score.")
    if skip:
        far = int(effect[:skip].abs().argmax())
        notes.append(f"Largest effect of an older item: {named[far]}, {cells[far]}.")
    if seen is not None and (rho := spearman(seen.cpu().numpy(), effect.cpu().numpy())) is not None:
        notes.append(f"Rank correlation of attention and effect over the {n} items read: {rho:.2f}.")
    return Table(f"History of user {r.who}", columns, rows[skip:], _join(*notes))


def _signed(values: list[float]) -> list[str]:
    """All with as many decimals as show three digits of the largest."""
    largest = max(map(abs, values))
    places = 3 if largest == 0 else min(max(2 - math.floor(math.log10(largest)), 0), 8)
    return [f"{value:+.{places}f}" for value in values]


def _add(columns: list[str], rows: list[list[Any]], name: str, cells: list[str]) -> None:
    """One more column, its cells as wide as the widest."""
    width = max(map(len, cells))
    columns.append(name)
    for row, cell in zip(rows, cells, strict=True):
        row.append(cell.rjust(width))


def _attention(r: Request) -> HeatMap:
    """The ten items that are looked at most, in the order of the history, and the latent tokens."""
    n, (steps, layers, _) = len(r.items), r.traced.attention[: r.depth].shape
    weight = r.traced.attention[: r.depth].flatten(0, 1).T  # (n + K, steps * layers)
    most = sorted(weight[:n].mean(1).topk(min(TOP, n)).indices.tolist())
    rows, values = [r.named[i] for i in most], [weight[i] for i in most]
    note = "Attention, mean over heads."
    if n > len(most):
        rest = weight[:n].sum(0) - weight[most].sum(0)
        note += (
            f" The other {n - len(most)} items share what is missing to 1: "
            f"{float(rest.min()):.0%} to {float(rest.max()):.0%} of a column."
        )
    own = torch.stack([weight[n + k, k * layers : (k + 1) * layers] for k in range(steps)]).flatten()
    if steps > 1:
        rows.append("earlier latent tokens")
        values.append(weight[n:].sum(0) - own)
    rows.append("its own latent token")
    values.append(own)
    return HeatMap(
        "What each latent step looks at",
        torch.stack(values).tolist(),
        rows,
        [f"step {k + 1}\nlayer {layer + 1}" for k in range(steps) for layer in range(layers)],
        note,
    )


# --- what the steps changed -----------------------------------------------------------------------------


def _top(r: Request, stopped: str) -> Table:
    rows: list[list[Any]] = [[place + 1] for place in range(min(TOP, len(r.order[0])))]
    gone: list[list[str]] = []  # per step, what left its top ten
    for k, ranked in enumerate(r.order):
        before = {item: place for place, item in enumerate(r.order[k - 1][:TOP])} if k else {}
        for place, row in enumerate(rows):
            item = ranked[place]
            row.append(f"{_starred(r, item)}{_move(before.get(item), place) if k else ''}")
        left = [item for item in before if item not in ranked[:TOP]]
        gone.append([f"{_starred(r, item)} → {ranked.index(item) + 1}" for item in left])
    for i in range(max(map(len, gone))):
        rows.append(["left" if i == 0 else "", *(left[i] if i < len(left) else "" for left in gone)])
    where = ", ".join(f"{ranked.index(r.target) + 1:,} (step {k})" for k, ranked in enumerate(r.order))
    return Table(
        "Top ten if it stopped after each step",
        ["place", *(r.step(k) for k in range(len(r.order)))],
        rows,
        _join(
            SAYING * (len(r.order) > 1), stopped, "left: fell out of the ten at this step, → to which place." * any(gone),
            f"* the true next item, in place {where} of {len(r.order[0]):,}.",
        ),
    )  # fmt: skip


def _starred(r: Request, item: int) -> str:
    title = r.titles[item] if len(r.order) <= 3 else _short(r.titles[item], NARROW)
    return title + " *" * (item == r.target)


def _move(before: int | None, place: int) -> str:
    if before is None:
        return " (new)"
    return "" if before == place else f" ↑{before - place}" if before > place else f" ↓{place - before}"


def _confidence(r: Request) -> Table:
    p = r.probability
    best = p.topk(min(2, p.shape[1]), -1).values
    lead = best[:, 0] - best[:, -1]
    entropy = torch.special.entr(p).sum(-1) / math.log(max(len(r.order[0]), 2))
    columns = ["", "temperature", "top probability", "lead", "entropy"]
    rows: list[list[Any]] = [
        [r.step(k), f"{t:.3g}", f"{best[k, 0]:.2%}", f"{lead[k]:.2%}", f"{entropy[k]:.3f}"]
        for k, t in enumerate(r.tau)
    ]
    note = "Softmax over all candidates at the temperature of the step. Lead: over the second item. Entropy: 1 = uniform."
    if len(rows) > 1:
        turned = torch.cosine_similarity(r.traced.states[1:], r.traced.states[:-1])
        _add(columns, rows, "cosine", ["", *(f"{c:.3f}" for c in turned)])
        note += " Cosine: with the state one step before, 1 = the step changed nothing."
    return Table("Confidence after each step", columns, rows, note)


def _contributions(r: Request) -> HeatMap:
    best = r.order[r.depth][:TOP]
    scores = r.traced.scores[:, best]
    parts = torch.cat([scores[:1], r.traced.contributions[: r.depth, best], scores[r.depth, None]])
    return HeatMap(
        "Where the scores of the answer come from",
        parts.T.tolist(),
        [r.titles[i] for i in best],
        ["step 0", *(f"step {k}" for k in range(1, r.depth + 1)), "total"],
        "Dot products of state and item, before the temperature. Step 0 plus what each step added is the "
        "total, exactly.",
    )


def _nearest(r: Request) -> Table:
    cosine, items = nearest(r.traced.states[: r.depth + 1], r.explainer.vectors, NEAREST)
    return Table(
        "Items that the state looks like",
        ["", *(f"step {k}" for k in range(r.depth + 1))],
        [
            [place + 1, *(f"{c:.2f} {r.titles[i]}" for c, i in zip(cs, codes, strict=True))]
            for place, (cs, codes) in enumerate(zip(cosine.T.tolist(), items.T.tolist(), strict=True))
        ],
        "By cosine, for the state of that step alone. Unlike the scores it takes no account of the length "
        "of an item's vector, so these need not be the answers.",
    )


def _categories(r: Request, categories: list[list[str]]) -> HeatMap:
    mass = category_mass(r.probability[: r.depth + 1], categories)
    names = list(mass)
    rows, values = names[:TOP], [mass[name] for name in names[:TOP]]
    if rest := names[TOP:]:
        rows.append(f"{len(rest)} others")
        values.append([sum(mass[name][k] for name in rest) for k in range(r.depth + 1)])
    return HeatMap(
        "Probability of each category",
        values,
        rows,
        [f"step {k}" for k in range(r.depth + 1)],
        "The probabilities of all candidates, summed; an item of several categories shares its own equally.",
    )
