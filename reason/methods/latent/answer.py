"""Serving: a trained encoder, its catalogue and its policy, ready to rank for a batch of histories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reason.methods.base import Context
from reason.methods.latent.calibrate import log_counts
from reason.methods.latent.candidates import Catalogue, excluded
from reason.methods.latent.policy import Policy, Stop
from reason.methods.latent.serve import Reasoning, Served, serve

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder

TOP = 10  # items of an answer


@dataclass
class Answer:
    """What a batch of B histories is told."""

    served: Served
    scores: Tensor  # (B, N), of the state that answers
    exclude: Tensor | None  # (B, N) bool, no candidates; None where all items are
    top: Tensor  # (B, k) int64, the best candidates, best first


class Answerer:
    """Encode, reason as far as the policy goes, score once, pick."""

    def __init__(self, config: Any, ctx: Context, model: SequenceEncoder):
        self.config, self.ctx, self.model = config, ctx, model
        self.catalogue = Catalogue.of(model)
        fitted = ctx.calibration or {}
        self.policy = Policy.from_json(fitted["policy"]) if "policy" in fitted else None
        self.cap: int = fitted.get("depth", model.steps)
        self.times_ms: list[float] | None = fitted.get("times_ms")
        self.log_counts = log_counts(ctx) if self.policy and self.policy.router else None

    def __call__(
        self, items: Tensor, length: Tensor, depth: int, seen: tuple[Tensor, Tensor] | None = None, *,
        k: int = TOP, fixed: bool = False, began: float | None = None, watch: bool = False,
    ) -> Answer:  # fmt: skip
        """items: (B, T) padded on the right; length: (B,); seen: (rows, items) that are no candidates.

        Args:
            depth: the most steps; the policy and the deadline may take fewer.
            fixed: take them all, whatever the policy says.
            began: when the request came in (``ctx.meter.now()``); a deadline then counts from there.
            watch: also say how far the last step moved each row.
        """
        device = self.ctx.device
        exclude = excluded(seen, len(items), len(self.catalogue))
        exclude = None if exclude is None else exclude.to(device)
        depth = depth if fixed else min(depth, self.cap)
        run = Reasoning(
            self.config.latent, self.model, self.catalogue, items.to(device), length.to(device), depth
        )
        test = Stop(self.policy, self.log_counts, exclude) if self.policy and not fixed else None
        late = None if began is None or fixed else self._deadline(began)
        served = serve(run, test, late=late, watch=watch)
        scores = self.catalogue.scores(served.state)
        candidates = scores if exclude is None else scores.masked_fill(exclude, -torch.inf)
        return Answer(served, scores, exclude, candidates.topk(min(k, scores.shape[1])).indices)

    def _deadline(self, began: float) -> Callable[[int], bool] | None:
        """Whether one more step would end after the deadline, by the time that is gone and what a step took."""
        if self.times_ms is None:
            return None
        limit, times, now = self.config.latent.deadline_ms, self.times_ms, self.ctx.meter.now

        def late(k: int) -> bool:
            step = max(times[k + 1] - times[k], 0.0)
            return 1e3 * (now() - began) + step > limit

        return late

    def reason(self, served: Served, depth: int) -> str:
        """Why a single request took no more steps than it did, in words; '' where its depth was fixed."""
        if served.late:
            return f"the deadline of {self.config.latent.deadline_ms:g} ms left no time for another step"
        cap, used = min(depth, self.cap), int(served.depth[0])
        if used == cap < depth:
            return f"{'the deadline affords' if self.times_ms else 'the policy was fitted to'} {cap} of {depth} steps"
        return self.policy.reason(used, cap) if self.policy else ""

    def flops(self, length: Tensor, depth: Tensor) -> Tensor:
        """(B,) float64: operations of answering one by one, with what the policy looks at. length, depth: (B,)."""
        total = torch.zeros(len(length), dtype=torch.float64)
        for k in depth.unique().tolist():
            rows = depth == k
            total[rows] = self.model.flops(length[rows], k)
        if self.policy and self.policy.needs_scores:
            N, d = self.catalogue.vectors.shape
            # After the look at the whole catalogue, a stop test looks at the shortlist once a step.
            looks = 0 if self.policy.router else depth
            total += 2.0 * d * (N + looks * min(self.policy.shortlist, N))
        return total
