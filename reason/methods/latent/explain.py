"""What each latent step did to one answer, as figures.

Nothing here is a reason in words: the steps are numeric refinements of a vector, and the figures show
what they change. The change of a score is exact: ``z_k = E r_k`` is linear in the state, so an item's
score after K steps is its score before any step plus one contribution ``(r_k - r_{k-1}) . e_i`` a step.

Knows the encoder and the readout; knows nothing of training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from reason.methods.base import Context
from reason.methods.figures import Figure, HeatMap, Lines, Table
from reason.methods.latent import objective

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder

TOP = 10
SHOWN = 20  # items of the history that figures name, the last ones
SAYING = "Latent steps are numeric refinements of a state, not reasons in words."


@dataclass(frozen=True)
class Trace:
    """One request followed step by step. K is the number of steps taken, n the items read."""

    states: Tensor  # (K + 1, d), r_0..r_K
    scores: Tensor  # (K + 1, N), z_k = E r_k, before any temperature
    answers: Tensor  # (K + 1, N), the scores that would answer if it stopped after step k
    attention: Tensor  # (K, n + K), of each step over items, then latent tokens; mean over layers and heads

    @property
    def contributions(self) -> Tensor:
        """(K, N): what each step added to each item's score. Sums over steps to z_K - z_0."""
        return self.scores[1:] - self.scores[:-1]


def trace(config: Any, model: SequenceEncoder, items: Tensor, depth: int) -> Trace:
    """Follow one history (n,) of item codes through ``depth`` steps."""
    thought = model.start(items[None], torch.tensor([len(items)], device=items.device), depth)
    states, rows = [thought.state], []
    for _ in range(depth):
        weights: list[Tensor] = []
        states.append(model.advance(thought, weights))
        seen = torch.stack(weights).mean((0, 2))[0]  # (n + k,)
        rows.append(torch.nn.functional.pad(seen, (0, len(items) + depth - len(seen))))
    run = torch.cat(states)  # (K + 1, d)
    read = torch.stack([objective.read(config.latent, run[: k + 1]) for k in range(depth + 1)])
    vectors = model.item_vectors()
    attention = torch.stack(rows) if rows else run.new_zeros(0, len(items))
    return Trace(run, run @ vectors.T, read @ vectors.T, attention)


def figures(config: Any, ctx: Context, model: SequenceEncoder, example: str) -> list[Figure]:
    """History, top ten per step, score contributions, attention and confidence for one test case.

    Args:
        example: id of a test case or user; '' takes a history of median length.

    Raises:
        DataError: there is no such user (the nearest is given).
    """
    from reason.methods.latent.method import titles_of

    cases, depth = cast(Any, ctx.data.test), config.depth
    index = cases.find(example) if example else int(np.argsort(cases.history, kind="stable")[len(cases) // 2])
    batch = cases.batch(np.array([index]))
    items, target = batch["items"][0], int(batch["target"][0])
    titles = titles_of(ctx.dataset)
    seen: set[int] = set()
    if config.dataset.candidates != "all":
        seen = set(cases.seen(np.array([index]))[1].tolist()) - {target}
    traced = trace(config, model, items.to(ctx.device), depth)
    who = str(cases.id[index])
    named = [titles[i] for i in items.tolist()]
    order = _orders(traced.answers, seen)
    found: list[Figure] = [
        _history(who, named, int(cases.history[index]), titles[target]),
        _top(order, titles, target),
    ]
    if depth:
        best = order[-1][:TOP]
        found += [*_contributions(traced, best, titles), _attention(traced, named)]
    found.append(_confidence(traced, objective.temperatures(config.latent, model.steps)))
    return found


def _orders(answers: Tensor, seen: set[int]) -> list[list[int]]:
    """For each step the candidates, best first."""
    if seen:
        answers = answers.clone()
        answers[:, sorted(seen)] = -torch.inf
    keep = answers.shape[1] - len(seen)
    return [row[:keep].tolist() for row in answers.argsort(dim=-1, descending=True, stable=True)]


def _history(who: str, named: list[str], whole: int, target: str) -> Table:
    last = list(enumerate(named, whole - len(named) + 1))[-SHOWN:]
    note = f"The next item was {target}."
    if whole > len(last):
        note = f"The last {len(last)} of {whole} items; the encoder reads {len(named)}. {note}"
    return Table(f"History of user {who}", ["place", "item"], [[place, name] for place, name in last], note)


def _top(order: list[list[int]], titles: list[str], target: int) -> Table:
    columns = ["place"]
    rows: list[list[Any]] = [[place + 1] for place in range(min(TOP, len(order[0])))]
    for k, ranked in enumerate(order):
        columns.append(f"step {k}")
        before = {item: place for place, item in enumerate(order[k - 1][:TOP])} if k else {}
        for place, row in enumerate(rows):
            item = ranked[place]
            mark = " *" if item == target else ""
            row.append(f"{titles[item]}{mark}{_move(before.get(item), place) if k else ''}")
    where = ", ".join(f"{ranked.index(target) + 1} (step {k})" for k, ranked in enumerate(order))
    return Table(
        "Top ten if it stopped after each step",
        columns,
        rows,
        f"* the true next item; its place among all candidates: {where}. {SAYING}",
    )


def _move(before: int | None, place: int) -> str:
    if before is None:
        return " (new)"
    return "" if before == place else f" ↑{before - place}" if before > place else f" ↓{place - before}"


def _contributions(traced: Trace, best: list[int], titles: list[str]) -> list[Figure]:
    steps = [f"step {k + 1}" for k in range(len(traced.contributions))]
    parts = traced.contributions[:, best].T  # (10, K)
    first, final = traced.scores[0, best], traced.scores[-1, best]
    table = Table(
        "Where the scores come from",
        ["item", "step 0", *steps, "total"],
        [
            [titles[item], *(round(x, 3) for x in (float(a), *part.tolist(), float(z)))]
            for item, a, part, z in zip(best, first, parts, final, strict=True)
        ],
        "Dot products of state and item, before the temperature. Step 0 plus the steps is the total, exactly.",
    )
    heat = HeatMap(
        "What each step added to the score",
        parts.tolist(),
        [titles[i] for i in best],
        steps,
        "(r_k - r_(k-1)) . e_i for the items of the final answer.",
    )
    return [table, heat]


def _attention(traced: Trace, named: list[str]) -> HeatMap:
    n, depth = len(named), len(traced.attention)
    skip = max(n - SHOWN, 0)
    shown = traced.attention[:, skip:]
    columns = [*named[skip:], *(f"latent {k + 1}" for k in range(depth))]
    note = "Softmax weights, mean over layers and heads; the last are the latent tokens themselves."
    if skip:
        note += f" {skip} older items are not shown: " + ", ".join(
            f"{w:.0%} of step {k + 1}" for k, w in enumerate(traced.attention[:, :skip].sum(1).tolist())
        )
    rows = [f"step {k + 1}" for k in range(depth)]
    return HeatMap("What each latent step attends to", shown.tolist(), rows, columns, note)


def _confidence(traced: Trace, tau: list[float]) -> Lines:
    steps = range(len(traced.answers))
    p = torch.stack([(traced.answers[k].double() / tau[k]).softmax(-1) for k in steps])  # (K + 1, N)
    best = p.topk(min(2, p.shape[1]), -1).values
    entropy = torch.special.entr(p).sum(-1) / math.log(max(p.shape[1], 2))
    return Lines(
        "Confidence after each step",
        [float(k) for k in steps],
        {
            "top probability": best[:, 0].tolist(),
            "lead over the second": (best[:, 0] - best[:, -1]).tolist(),
            "entropy (1 = uniform)": entropy.tolist(),
        },
        "latent step",
        "share",
        "Softmax over the catalogue at the temperature that each step is trained with: "
        + ", ".join(f"{t:.3g}" for t in tau[: len(steps)])
        + ".",
    )
