"""Do the attributions of ``explain.py`` tell what the model does? Three tests over many requests.

- *Agreement*: does an attribution rank the items of a history as leaving them out one by one does?
- *Deletion*: does the score of the recommended item fall further without the three items that an
  attribution names first than without three drawn at random? (DeYoung et al., arXiv 1911.03429, call
  this comprehensiveness.)
- *Scrambled weights*: an attribution that stays the same when all that was learned is destroyed tells
  of the architecture, not of the model (Adebayo et al., arXiv 1810.03292). Expect more than 0 where
  histories are short: the last item outweighs the others by its place alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reason.errors import DataError
from reason.methods.latent.explain import Explainer
from reason.metrics.association import spearman
from reason.metrics.statistics import (
    Difference,
    ExampleScores,
    Interval,
    bootstrap_interval,
    paired_difference,
)

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder

REMOVED = 3  # items that the deletion test takes away
MIN_HISTORY = 2 * REMOVED  # items of a history that is long enough to choose among
DRAWS = 10  # random choices that a deletion is compared with


@dataclass(frozen=True)
class Faithfulness:
    """One number per attribution: "attention" (where a step was taken), "gradient", "occlusion"."""

    requests: int
    depth: int
    agreement: dict[str, Interval]  # mean Spearman correlation with occlusion
    deletion: dict[str, Difference]  # fall of the score, first three of the attribution less random three
    scrambled: dict[str, Interval]  # mean Spearman correlation with itself under scrambled weights

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""

        def plain(kept: dict[str, Any]) -> dict[str, Any]:
            return {name: x._asdict() if isinstance(x, Interval) else vars(x) for name, x in kept.items()}

        return {
            "requests": self.requests,
            "depth": self.depth,
            "agreement": plain(self.agreement),
            "deletion": plain(self.deletion),
            "scrambled": plain(self.scrambled),
        }


@torch.no_grad()
def faithfulness(
    config: Any, model: SequenceEncoder, cases: Any, depth: int, n: int = 200, seed: int = 0
) -> Faithfulness:
    """Judge the attributions of the item recommended first, on ``n`` random ``cases`` of 6 items or more.

    A function of its arguments: the same seed draws the same cases, deletions and scrambled weights.

    Raises:
        DataError: fewer than two cases are long enough.
    """
    rng = np.random.default_rng(seed)
    long = np.flatnonzero((cases.length >= MIN_HISTORY) & (cases.length <= model.num_items))
    if len(long) < 2:
        raise DataError(
            f"{len(long)} cases have a history of {MIN_HISTORY} items or more; faithfulness needs two.",
            "Raise backbone.max_length, or take data with longer histories.",
        )
    chosen = np.sort(rng.permutation(long)[:n])
    trained = Explainer(config, model, depth)
    shuffled = Explainer(config, scrambled(model, seed), depth)
    agreement: dict[str, list[float]] = {}
    same: dict[str, list[float]] = {}
    falls: dict[str, list[float]] = {}
    for i in chosen:
        index = np.array([i])
        items = cases.batch(index)["items"][0].to(trained.vectors.device)
        scores = trained.trace(items).scores[-1]
        if (excluded := cases.excluded(index)) is not None:
            scores[excluded[1]] = -torch.inf
        best = int(scores.argmax())
        learned, unlearned = attributions(trained, items, best), attributions(shuffled, items, best)
        drawn = [torch.as_tensor(rng.choice(len(items), REMOVED, replace=False)) for _ in range(DRAWS)]
        first = [values.topk(REMOVED).indices.cpu() for values in learned.values()]
        fall = _fall(trained, items, best, [*first, *drawn])
        falls.setdefault("random", []).append(float(fall[len(first) :].mean()))
        for (name, values), lost in zip(learned.items(), fall.tolist(), strict=False):
            falls.setdefault(name, []).append(lost)
            for kept, other in ((agreement, learned["occlusion"]), (same, unlearned[name])):
                if (rho := spearman(values.cpu().numpy(), other.cpu().numpy())) is not None:
                    kept.setdefault(name, []).append(rho)
    del agreement["occlusion"]  # with itself
    ids = chosen.astype(str)
    chance = {0: ExampleScores(ids, np.array(falls.pop("random")))}
    return Faithfulness(
        len(chosen),
        depth,
        {name: _mean(values) for name, values in agreement.items()},
        {name: paired_difference({0: ExampleScores(ids, np.array(v))}, chance) for name, v in falls.items()},
        {name: _mean(values) for name, values in same.items()},
    )


def attributions(explainer: Explainer, items: Tensor, item: int) -> dict[str, Tensor]:
    """Every attribution of the score of ``item`` to a history (n,), each (n,); no attention at depth 0."""
    attention = {"attention": explainer.trace(items).item_attention} if explainer.depth else {}
    return attention | {
        "gradient": explainer.gradient(items, item),
        "occlusion": explainer.occlusion(items, item),
    }


def scrambled(model: SequenceEncoder, seed: int) -> SequenceEncoder:
    """A copy whose every parameter has its entries shuffled: the same sizes of numbers, nothing learned."""
    shuffled, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return shuffled


def _fall(explainer: Explainer, items: Tensor, item: int, removed: list[Tensor]) -> Tensor:
    """How far the score of ``item`` falls without each of these sets of places; one entry each."""
    keep = torch.ones(len(removed), len(items), dtype=torch.bool)
    keep.scatter_(1, torch.stack(removed), False)
    rest = items.expand(len(removed), -1)[keep.to(items.device)].view(len(removed), -1)
    return explainer.score(items[None], item) - explainer.score(rest, item)


def _mean(values: list[float]) -> Interval:
    column = np.array(values)
    return Interval(float(column.mean()), *bootstrap_interval(column), len(column))
