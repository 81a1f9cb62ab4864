"""Was each token given the right depth? Some documents are judged again, with every token at every depth.

One further pass at full depth says what every token's loss would be had all tokens left after 1, 2, ... recursions.
Full depth is no oracle, later recursions may hurt: the *best* depth of a token is where its loss is least. Beside
everything stands the trivial control, the same depths dealt out at random within the document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reason.methods.mor import judge
from reason.methods.mor.monitor import ranks
from reason.methods.mor.routes import Known

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions

NOTABLE = 0.5  # nats, above which a token left too early
ALIKE = 0.02  # nats, within which a recursion less would have done
SUMS = ("targets", "cost", "regret", "under", "over", "wasted", "random_cost", "random_regret")
COLUMNS = ("audited", *(f"audit_{name}" for name in (*SUMS, "rank", "random_rank")))


def sampled(chosen: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Of these documents the ones that are audited: a share of them, at least one, the same on every rank."""
    if not share or not len(chosen):
        return chosen[:0]
    order = np.random.default_rng(seed).permutation(len(chosen))
    return chosen[np.sort(order[: max(1, round(share * len(chosen)))])]


@torch.no_grad()
def audit(
    model: MixtureOfRecursions, batch: Mapping[str, Tensor], told: judge.Told, cap: int, *,
    size: int, device: torch.device, seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Sums over each document of a batch (``Cases.batch``), ``COLUMNS`` by name, each (documents,).

    targets: tokens whose loss is taken. cost, regret: nats more than at full depth, and the sum of those above 0.
    under: targets that left early and lost more than ``NOTABLE`` by it. over: those whose loss one recursion earlier
    would have been no more than ``ALIKE`` above theirs. wasted: recursions beyond the best depth. rank: Spearman
    correlation of depth and best depth within the document. random_*: of depths dealt out at random.

    told: the batch, as it was routed.
    """
    case = batch["case"].numpy()
    dealt = deal(told.depth, case, np.random.default_rng(seed))
    uniform, random = [], []
    for a in range(0, len(case), size):
        tokens, targets, real = (batch[k][a : a + size].to(device) for k in ("tokens", "targets", "length"))
        memory = model.config.memory
        whole = model(tokens, Known(cap), real=real, cap=cap, memory=memory, exits=True)
        states = [*whole.exits, whole.states]
        uniform.append(np.stack([judge.nll_of(model, s, targets) for s in states]))  # (cap, b, T)
        depth = torch.from_numpy(dealt[a : a + size]).to(device).flatten()
        other = model(tokens, Known(depth), real=real, cap=cap, memory=memory)
        random.append(judge.nll_of(model, other.states, targets))
    at_depth, chance = np.concatenate(uniform, 1), np.concatenate(random)
    return sums(told.depth, told.nll, at_depth, dealt, chance, batch["targets"].numpy() >= 0, case)


def sums(
    depth: np.ndarray, nll: np.ndarray, at_depth: np.ndarray, dealt: np.ndarray, chance: np.ndarray,
    asked: np.ndarray, case: np.ndarray,
) -> dict[str, np.ndarray]:  # fmt: skip
    """``audit`` of what was found. depth, nll: (B, T), as routed; at_depth: (cap, B, T), nats had all tokens left
    after 1, 2, ... recursions; dealt, chance: as depth and nll, of the control; asked: (B, T) bool; case: (B,)."""
    documents = int(case.max(initial=-1)) + 1
    best = at_depth.argmin(0) + 1
    full, cap = at_depth[-1], len(at_depth)
    earlier = np.take_along_axis(at_depth, np.maximum(depth - 2, 0)[None], 0)[0]

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(case, weights=(values * asked).sum(1).astype(np.float64), minlength=documents)

    def rank(given: np.ndarray) -> np.ndarray:
        of = [asked & (case == i)[:, None] for i in range(documents)]
        return np.array([spearman(given[on], best[on]) for on in of])

    found = {
        "audited": np.ones(documents),
        "audit_targets": summed(np.ones_like(nll)),
        "audit_cost": summed(nll - full),
        "audit_regret": summed(np.maximum(nll - full, 0)),
        "audit_under": summed((depth < cap) & (nll - full > NOTABLE)),
        "audit_over": summed((depth > 1) & (earlier <= nll + ALIKE)),
        "audit_wasted": summed(np.maximum(depth - best, 0)),
        "audit_random_cost": summed(chance - full),
        "audit_random_regret": summed(np.maximum(chance - full, 0)),
        "audit_rank": rank(depth),
        "audit_random_rank": rank(dealt),
    }
    assert set(found) == set(COLUMNS)
    return found


def deal(depth: np.ndarray, case: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Depths (B, T; 0 at padding) in another order within each document."""
    dealt = depth.copy()
    for document in np.unique(case):
        on = (case == document)[:, None] & (depth > 0)
        dealt[on] = rng.permutation(depth[on])
    return dealt


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks, ties at their mean; 0 where one of the two does not vary."""
    if len(a) < 2:
        return 0.0
    x, y = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    size = np.sqrt(np.square(x).sum() * np.square(y).sum())
    return float((x * y).sum() / size) if size else 0.0


def overall(column: Callable[[str], float]) -> dict[str, float]:
    """Ratios of the audit. column: the sum of one over all documents. Empty where nothing was audited."""
    targets, documents = column("audit_targets"), column("audited")
    if not targets:
        return {}
    names = {
        "audit cost": "cost", "audit regret": "regret", "audit under-computed": "under",
        "audit over-computed": "over", "audit wasted recursions": "wasted",
        "audit cost at random": "random_cost", "audit regret at random": "random_regret",
    }  # fmt: skip
    found = {name: column(f"audit_{key}") / targets for name, key in names.items()}
    found["audit rank correlation"] = column("audit_rank") / documents
    found["audit rank correlation at random"] = column("audit_random_rank") / documents
    return found | {"audited": documents}
