"""One request as figures: what was read, what each step changed, and what the answer rests on.

Each figure says one thing; the numbers are those of ``explain.py``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from reason.datasets.catalogue import Catalogue
from reason.datasets.requests import TOP, read_history
from reason.datasets.sequences import SequenceCases
from reason.errors import DataError, nearest
from reason.methods.base import Context
from reason.methods.figures import Figure, HeatMap, Table
from reason.methods.latent import objective
from reason.methods.latent.explain import Explainer, Trace, category_mass, nearest_items
from reason.methods.latent.recommender import Recommender
from reason.metrics.association import spearman

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder

SHOWN = 20  # items of the history that are listed, the last ones
NEAREST = 5  # items that a state is compared with
WIDTH, NARROW_WIDTH = 40, 22  # characters of a title; where it shares the line with more than three others
DISCLAIMER = "Latent steps are numeric refinements of a state, not reasons in words."


@dataclass(frozen=True)
class Example:
    """What is inspected: a test case, or a history that was given."""

    who: str  # "user 12"
    items: Tensor  # (1, n) int64, what the encoder reads
    whole: int  # items of the whole history
    target: int | None  # the item that came next; None where it is not known
    excluded: tuple[Tensor, Tensor] | None  # (rows, items) that are no candidates
    unknown: tuple[str, ...] = ()  # ids of the history that are not in the catalogue


@dataclass(frozen=True)
class Explanation:
    """All that the figures of one example draw on."""

    example: Example
    items: Tensor  # (n,), what the encoder reads
    titles: list[str]  # of every item
    depth: int  # the step that answered
    explainer: Explainer  # of the answer
    trace: Trace  # of all steps there could be
    order: list[list[int]]  # after each step the candidates, best first
    probability: Tensor  # (K + 1, N), 0 where an item is no candidate
    temperature: list[float]  # it was computed at, step by step
    calibration_error: list[dict[str, dict[str, float]]] | None  # ECE by step, where it was measured

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
    catalogue: Catalogue,
    example: str,
    depth: int | None = None,
    stopped: str = "",
) -> list[Figure]:
    """What latent reasoning did for one test case, or for a history that is given.

    Args:
        example: id of a test case or user; ``{"history": [item ids]}``; '' takes a test case whose history is of
            median length.
        depth: steps after which this request was answered; None: as the run's policy answers it. Where
            it is less than ``config.depth``, the top ten and the confidence show the steps that were
            not taken too.
        stopped: a sentence on why it stopped there; None in ``depth`` finds its own.

    Raises:
        DataError: there is no such user (the nearest is given), or no item of the history is known.
    """
    if example.lstrip().startswith("{"):
        chosen = _given(config, catalogue, example, model.max_length)
    else:
        chosen = _case(cast(SequenceCases, ctx.data.test), example)
    if depth is None:
        depth, stopped = _decided(config, ctx, model, catalogue, chosen)
    explained = _explain(config, ctx, model, catalogue, chosen, depth)
    found: list[Figure] = [
        _history(explained),
        _top(explained, stopped),
        _confidence(explained),
    ]
    if explained.depth:
        found += [_contributions(explained), _attention(explained)]
    found.append(_nearest(explained))
    if (categories := catalogue.categories) is not None:
        found.append(_categories(explained, categories))
    return found


def _case(cases: SequenceCases, name: str) -> Example:
    """The test case called ``name``, or one whose history is of median length."""
    index = np.array(
        [cases.find(name) if name else np.argsort(cases.history, kind="stable")[len(cases) // 2]]
    )
    case, batch = int(index[0]), cases.batch(index)
    target = int(cases.target[case])
    excluded = cases.excluded(index)
    return Example(f"user {cases.id[case]}", batch["items"], int(cases.history[case]), target, excluded)


def _given(config: Any, catalogue: Catalogue, text: str, length: int) -> Example:
    """The history in ``text``, a JSON object, of which the last ``length`` items are read."""
    hint = 'Write it as {"history": ["id", "id"]}, oldest first.'
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"The example is no JSON object: {error}.", hint) from error
    if set(given) != {"history"}:
        raise DataError(f"The example has the keys {', '.join(map(json.dumps, given))}.", hint)
    codes, unknown = read_history(given["history"], catalogue)
    if not codes:
        close = nearest(unknown[0], catalogue.item_ids) if unknown else ""
        raise DataError(
            f"The catalogue holds none of the {len(unknown)} items of this history."
            if unknown
            else "The history is empty.",
            f"Did you mean {close!r}?" if close else f"Items are named such as {catalogue.item_ids[0]!r}.",
        )
    excluded = None
    if config.dataset.candidates != "all":
        excluded = torch.zeros(len(codes), dtype=torch.int64), torch.tensor(codes)
    items = torch.tensor([codes[-length:]])
    return Example("the given user", items, len(codes), None, excluded, tuple(unknown))


def _decided(
    config: Any, ctx: Context, model: SequenceEncoder, catalogue: Catalogue, example: Example
) -> tuple[int, str]:
    """The steps that the run's policy takes, and a sentence on why no more ('' if the depth was fixed)."""
    recommend = Recommender(config, ctx, model, catalogue)
    length = torch.tensor([example.items.shape[1]])
    output = recommend(example.items, length, config.depth, example.excluded).output
    why = recommend.stopping_reason(output, config.depth)
    return int(output.depth[0]), f"{why[:1].upper()}{why[1:]}." if why else ""


def _explain(
    config: Any, ctx: Context, model: SequenceEncoder, catalogue: Catalogue, example: Example, depth: int
) -> Explanation:
    items = example.items[0].to(ctx.device)
    trace = Explainer(config, model, config.depth).trace(items)
    scores = trace.scores
    if example.excluded is not None:
        seen = example.excluded[1]
        scores = scores.clone()
        scores[:, seen if example.target is None else seen[seen != example.target]] = -torch.inf
    ranked = int(scores[0].isfinite().sum())
    if not ranked:
        raise DataError(
            "The history holds every item, and dataset.candidates=unseen leaves none to recommend.",
            "Inspect a shorter history.",
        )
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :ranked].tolist()
    fitted = ctx.calibration or {}
    tau = fitted.get("temperatures") or objective.temperatures(config.latent, model.steps)
    tau = tau[: config.depth + 1]
    probability = (scores.double() / scores.new_tensor(tau)[:, None]).softmax(-1)
    return Explanation(
        example, items, [_short(title, WIDTH) for title in catalogue.titles], depth,
        Explainer(config, model, depth), trace, order, probability, tau, fitted.get("ece"),
    )  # fmt: skip


def _short(title: str, width: int) -> str:
    return title if len(title) <= width else title[: width - 1].rstrip() + "…"


def _join(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


# --- what was read, and what the answer rests on -------------------------------------------------------


def _history(r: Explanation) -> Table:
    named, n, whole = r.named, len(r.items), r.example.whole
    skip = max(n - SHOWN, 0)
    title, columns, notes = f"History of {r.example.who}", ["place", "item"], []
    rows: list[list[Any]] = [[whole - n + i + 1, name] for i, name in enumerate(named)]
    if whole > SHOWN:
        reads = f"; the encoder reads the last {n}" if n < whole else ""
        notes.append(f"The last {n - skip} of {whole} items{reads}.")
    if r.example.unknown:
        notes.append(f"Not in the catalogue, so left out: {', '.join(r.example.unknown)}.")
    if r.example.target is not None:
        notes.append(f"The next item was {r.titles[r.example.target]}.")
    attention = r.explainer.trace(r.items).item_attention if r.depth else None
    if attention is not None:
        _add(columns, rows, "attention", [f"{share:.1%}" for share in attention.tolist()])
        notes.append("Attention: the share that the latent steps give to an item.")
    if n == 1:
        notes.append("The effect of an item cannot be tested where it is the only one.")
        return Table(title, columns, rows, _join(*notes))
    effect = r.explainer.occlusion(r.items, r.best)
    cells = _signed(effect.tolist())
    _add(columns, rows, "effect", cells)
    notes.append(
        f"Effect: how far the score of the answer, {r.titles[r.best]}, falls when the item is removed "
        "and later ones move up."
    )
    median = _signed([*effect.tolist(), float(effect.median())])[-1]
    notes.append(f"Median effect: {median}, as a shorter history alone shifts the score.")
    if skip:
        far = int(effect[:skip].abs().argmax())
        notes.append(f"Largest effect of an older item: {named[far]}, {cells[far]}.")
    if attention is not None and (rho := spearman(attention.cpu().numpy(), effect.cpu().numpy())) is not None:
        notes.append(f"Rank correlation of attention and effect over the {n} items read: {rho:.2f}.")
    return Table(title, columns, rows[skip:], _join(*notes))


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


def _attention(r: Explanation) -> HeatMap:
    """The ten items with the most attention, in the order of the history, and the latent tokens."""
    n, (steps, layers, _) = len(r.items), r.trace.attention[: r.depth].shape
    weight = r.trace.attention[: r.depth].flatten(0, 1).T  # (n + K, steps * layers)
    top = sorted(weight[:n].mean(1).topk(min(TOP, n)).indices.tolist())
    rows, values = [r.named[i] for i in top], [weight[i] for i in top]
    note = "Attention, mean over heads."
    if n > len(top):
        rest = weight[:n].sum(0) - weight[top].sum(0)
        note += (
            f" The other {n - len(top)} items share the rest, "
            f"{float(rest.min()):.0%} to {float(rest.max()):.0%} of each column."
        )
    own = torch.stack([weight[n + k, k * layers : (k + 1) * layers] for k in range(steps)]).flatten()
    if steps > 1:
        rows.append("earlier latent tokens")
        values.append(weight[n:].sum(0) - own)
    rows.append("its own latent token")
    values.append(own)
    return HeatMap(
        "Attention of each latent step",
        torch.stack(values).tolist(),
        rows,
        [f"step {k + 1}\nlayer {layer + 1}" for k in range(steps) for layer in range(layers)],
        note,
    )


# --- what the steps changed -----------------------------------------------------------------------------


def _top(r: Explanation, stopped: str) -> Table:
    rows: list[list[Any]] = [[place + 1] for place in range(min(TOP, len(r.order[0])))]
    dropped: list[list[str]] = []  # per step, what left its top ten
    for k, ranked in enumerate(r.order):
        before = {item: place for place, item in enumerate(r.order[k - 1][:TOP])} if k else {}
        for place, row in enumerate(rows):
            item = ranked[place]
            row.append(f"{_starred(r, item)}{_move(before.get(item), place) if k else ''}")
        left = [item for item in before if item not in ranked[:TOP]]
        dropped.append([f"{_starred(r, item)} → {ranked.index(item) + 1}" for item in left])
    for i in range(max(map(len, dropped))):
        rows.append(["left" if i == 0 else "", *(left[i] if i < len(left) else "" for left in dropped)])
    notes = [DISCLAIMER * (len(r.order) > 1), stopped]
    notes.append("left: no longer among the ten at this step, and its new place." * any(dropped))
    if (target := r.example.target) is not None:
        where = ", ".join(f"{ranked.index(target) + 1:,} (step {k})" for k, ranked in enumerate(r.order))
        notes.append(f"* the true next item, in place {where} of {len(r.order[0]):,}.")
    return Table(
        "Top ten if it stopped after each step",
        ["place", *(r.step(k) for k in range(len(r.order)))],
        rows,
        _join(*notes),
    )


def _starred(r: Explanation, item: int) -> str:
    title = r.titles[item] if len(r.order) <= 3 else _short(r.titles[item], NARROW_WIDTH)
    return title + " *" * (item == r.example.target)


def _move(before: int | None, place: int) -> str:
    if before is None:
        return " (new)"
    return "" if before == place else f" ↑{before - place}" if before > place else f" ↓{place - before}"


def _confidence(r: Explanation) -> Table:
    p = r.probability
    best = p.topk(min(2, p.shape[1]), -1).values
    margin = best[:, 0] - best[:, -1]
    entropy = torch.special.entr(p).sum(-1) / math.log(max(len(r.order[0]), 2))
    columns = ["", "temperature", "top probability", "margin", "entropy"]
    rows: list[list[Any]] = [
        [r.step(k), f"{t:.3g}", f"{best[k, 0]:.2%}", f"{margin[k]:.2%}", f"{entropy[k]:.3f}"]
        for k, t in enumerate(r.temperature)
    ]
    notes = [
        "Softmax over all candidates at the temperature of the step. Margin: probability of the first item "
        "less that of the second. Entropy: 1 = uniform."
    ]
    if len(rows) > 1:
        cosine = torch.cosine_similarity(r.trace.states[1:], r.trace.states[:-1])
        _add(columns, rows, "cosine", ["", *(f"{c:.3f}" for c in cosine)])
        notes.append("Cosine: with the state one step before, 1 = the step changed nothing.")
    if r.calibration_error is not None:
        before, after = (
            [error[kind]["equal_mass"] for error in r.calibration_error[: len(rows)]]
            for kind in ("uncalibrated", "calibrated")
        )
        _add(columns, rows, "ECE", [f"{e:.3f}" for e in after])
        _add(columns, rows, "ECE uncalibrated", [f"{e:.3f}" for e in before])
        notes.append(
            "ECE: expected calibration error of the top probability, over 15 bins of equal mass, on the cases "
            "that the temperature was fitted to; uncalibrated: at the temperature of training."
        )
    return Table("Confidence after each step", columns, rows, _join(*notes))


def _contributions(r: Explanation) -> HeatMap:
    best = r.order[r.depth][:TOP]
    scores = r.trace.scores[:, best]
    parts = torch.cat([scores[:1], r.trace.contributions[: r.depth, best], scores[r.depth, None]])
    return HeatMap(
        "Where the scores of the answer come from",
        parts.T.tolist(),
        [r.titles[i] for i in best],
        ["step 0", *(f"step {k}" for k in range(1, r.depth + 1)), "total"],
        "Dot products of state and item, before the temperature. Step 0 plus what each step adds is exactly the "
        "total.",
    )


def _nearest(r: Explanation) -> Table:
    cosine, items = nearest_items(r.trace.states[: r.depth + 1], r.explainer.vectors, NEAREST)
    return Table(
        "Items nearest to the state",
        ["", *(f"step {k}" for k in range(r.depth + 1))],
        [
            [place + 1, *(f"{c:.2f} {r.titles[i]}" for c, i in zip(cs, codes, strict=True))]
            for place, (cs, codes) in enumerate(zip(cosine.T.tolist(), items.T.tolist(), strict=True))
        ],
        "By cosine with the state of that step alone. Unlike the score, the cosine ignores the length of an item's "
        "vector, so these need not be the answers.",
    )


def _categories(r: Explanation, categories: list[list[str]]) -> HeatMap:
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
        "The probabilities of all candidates, summed; an item of several categories divides its own equally among them.",
    )
