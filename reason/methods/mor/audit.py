"""Was each token given the right depth? Some documents are evaluated again, with every token at every depth.

One further pass at full depth says what every token's loss would be if all tokens exited after 1, 2, ... recursions.
Full depth is no oracle, later recursions may hurt: the *best* depth of a token is where its loss is least. The control
beside everything is the same depths, shuffled within the document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.outcomes import RoutedOutcomes, token_nll
from reason.methods.mor.token_selection import KnownDepths
from reason.metrics.association import spearman
from reason.metrics.language import sum_by_document

NOTABLE = 0.5  # nats, above which a token exited too early
ALIKE = 0.02  # nats, within which one recursion less would have been enough
SUMS = ("targets", "cost", "regret", "under", "over", "wasted", "random_cost", "random_regret")
COLUMNS = ("audited", *(f"audit_{name}" for name in (*SUMS, "rank", "random_rank")))


def sample_documents(chosen: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The documents to audit: a share of these, at least one, the same on every rank."""
    if not share or not len(chosen):
        return chosen[:0]
    order = np.random.default_rng(seed).permutation(len(chosen))
    return chosen[np.sort(order[: max(1, round(share * len(chosen)))])]


@torch.no_grad()
def audit(
    model: MixtureOfRecursions, batch: Mapping[str, Tensor], routed: RoutedOutcomes, cap: int, *,
    size: int, device: torch.device, seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Sums over each document of a batch (``Cases.batch``), ``COLUMNS`` by name, each (documents,).

    targets: tokens whose loss is taken. cost, regret: nats more than at full depth, and the sum of those above 0.
    under: targets that exited early and lost more than ``NOTABLE`` by it. over: those whose loss one recursion earlier
    would have been at most ``ALIKE`` larger. wasted: recursions beyond the best depth. rank: Spearman
    correlation of depth and best depth within the document. random_*: of shuffled depths.

    routed: outcomes of the batch, as it was routed.
    """
    case = batch["case"].numpy()
    shuffled = shuffle_depths(routed.depth, case, np.random.default_rng(seed))
    uniform, random_nll = [], []
    for a in range(0, len(case), size):
        tokens, targets, lengths = (
            batch[k][a : a + size].to(device) for k in ("tokens", "targets", "length")
        )
        kv_mode = model.config.kv_mode
        full = model(tokens, KnownDepths(cap), lengths=lengths, cap=cap, kv_mode=kv_mode, exits=True)
        states = [*full.exits, full.states]
        uniform.append(np.stack([token_nll(model, s, targets) for s in states]))  # (cap, b, T)
        depth = torch.from_numpy(shuffled[a : a + size]).to(device).flatten()
        other = model(tokens, KnownDepths(depth), lengths=lengths, cap=cap, kv_mode=kv_mode)
        random_nll.append(token_nll(model, other.states, targets))
    at_depth, shuffled_nll = np.concatenate(uniform, 1), np.concatenate(random_nll)
    return sums(
        routed.depth, routed.nll, at_depth, shuffled, shuffled_nll, batch["targets"].numpy() >= 0, case
    )


def sums(
    depth: np.ndarray, nll: np.ndarray, at_depth: np.ndarray, shuffled: np.ndarray, shuffled_nll: np.ndarray,
    is_target: np.ndarray, case: np.ndarray,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The sums of ``audit``. depth, nll: (B, T), as routed; at_depth: (cap, B, T), nats if all tokens exited after
    1, 2, ... recursions; shuffled, shuffled_nll: as depth and nll, of the control; is_target: (B, T) bool; case: (B,)."""
    documents = int(case.max(initial=-1)) + 1
    best = at_depth.argmin(0) + 1
    full_nll, cap = at_depth[-1], len(at_depth)
    earlier = np.take_along_axis(at_depth, np.maximum(depth - 2, 0)[None], 0)[0]

    def summed(values: np.ndarray) -> np.ndarray:
        return sum_by_document(values * is_target, case, documents)

    def rank(given: np.ndarray) -> np.ndarray:
        of = [is_target & (case == i)[:, None] for i in range(documents)]
        return np.array([spearman(given[on], best[on]) or 0.0 for on in of])

    found = {
        "audited": np.ones(documents),
        "audit_targets": summed(np.ones_like(nll)),
        "audit_cost": summed(nll - full_nll),
        "audit_regret": summed(np.maximum(nll - full_nll, 0)),
        "audit_under": summed((depth < cap) & (nll - full_nll > NOTABLE)),
        "audit_over": summed((depth > 1) & (earlier <= nll + ALIKE)),
        "audit_wasted": summed(np.maximum(depth - best, 0)),
        "audit_random_cost": summed(shuffled_nll - full_nll),
        "audit_random_regret": summed(np.maximum(shuffled_nll - full_nll, 0)),
        "audit_rank": rank(depth),
        "audit_random_rank": rank(shuffled),
    }
    assert set(found) == set(COLUMNS)
    return found


def shuffle_depths(depth: np.ndarray, case: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Depths (B, T; 0 at padding) in another order within each document."""
    shuffled = depth.copy()
    for document in np.unique(case):
        on = (case == document)[:, None] & (depth > 0)
        shuffled[on] = rng.permutation(depth[on])
    return shuffled


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
