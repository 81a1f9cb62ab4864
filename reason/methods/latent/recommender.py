"""A trained encoder, the vectors of its items and its policy, ready to recommend to a batch of histories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reason.datasets.catalogue import Catalogue
from reason.datasets.requests import TOP
from reason.methods.base import Context
from reason.methods.latent.policy import DepthPolicy, PolicyTest, log_counts
from reason.methods.latent.reasoning import ItemEmbeddings, Reasoning, ReasoningOutput, run_steps
from reason.metrics.ranking import exclusion_mask

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder


@dataclass
class Recommendation:
    """The answer to a batch of B histories."""

    output: ReasoningOutput
    scores: Tensor  # (B, N), of the state that answers
    exclude: Tensor | None  # (B, N) bool, no candidates; None where all items are
    top: Tensor  # (B, k) int64, the best candidates, best first


class Recommender:
    """Encode, reason as far as the policy goes, score once, pick."""

    def __init__(self, config: Any, ctx: Context, model: SequenceEncoder, catalogue: Catalogue):
        self.config, self.ctx, self.model = config, ctx, model
        self.embeddings = ItemEmbeddings.of(model)
        fitted = ctx.calibration or {}
        self.policy = DepthPolicy.from_json(fitted["policy"]) if "policy" in fitted else None
        self.cap: int = fitted.get("depth", model.steps)
        self.times_ms: list[float] | None = fitted.get("times_ms")
        routed = self.policy is not None and self.policy.router is not None
        self.log_counts = log_counts(catalogue.train_counts, ctx.device) if routed else None

    def __call__(
        self, items: Tensor, length: Tensor, depth: int, excluded: tuple[Tensor, Tensor] | None = None, *,
        k: int = TOP, fixed: bool = False, began: float | None = None, with_cosine: bool = False,
    ) -> Recommendation:  # fmt: skip
        """items: (B, T) padded on the right; length: (B,); excluded: (rows, items) that are no candidates.

        Args:
            depth: the most steps; the policy and the deadline may take fewer.
            fixed: take them all, whatever the policy says.
            began: when the request came in (``ctx.meter.now()``); a deadline then counts from there.
            with_cosine: also give the cosine of the last two states of each row.
        """
        device = self.ctx.device
        exclude = exclusion_mask(excluded, len(items), len(self.embeddings))
        exclude = None if exclude is None else exclude.to(device)
        depth = depth if fixed else min(depth, self.cap)
        run = Reasoning(
            self.config.latent, self.model, self.embeddings, items.to(device), length.to(device), depth
        )
        test = PolicyTest(self.policy, self.log_counts, exclude) if self.policy and not fixed else None
        out_of_time = None if began is None or fixed else self._deadline(began)
        output = run_steps(run, test, out_of_time=out_of_time, with_cosine=with_cosine)
        scores = self.embeddings.scores(output.state)
        candidates = scores if exclude is None else scores.masked_fill(exclude, -torch.inf)
        return Recommendation(output, scores, exclude, candidates.topk(min(k, scores.shape[1])).indices)

    def _deadline(self, began: float) -> Callable[[int], bool] | None:
        """Whether one more step would end after the deadline, by the time that is gone and what a step took."""
        if self.times_ms is None:
            return None
        limit, times, now = self.config.latent.deadline_ms, self.times_ms, self.ctx.meter.now

        def out_of_time(k: int) -> bool:
            step = max(times[k + 1] - times[k], 0.0)
            return 1e3 * (now() - began) + step > limit

        return out_of_time

    def stopping_reason(self, output: ReasoningOutput, depth: int) -> str:
        """Why a single request took no more steps than it did, in words; '' where its depth was fixed."""
        if output.out_of_time:
            return f"the deadline of {self.config.latent.deadline_ms:g} ms left no time for another step"
        cap, used = min(depth, self.cap), int(output.depth[0])
        if used == cap < depth:
            return (
                f"the deadline allows {cap} of {depth} steps"
                if self.times_ms
                else f"the policy was fitted to at most {cap} of {depth} steps"
            )
        return self.policy.reason(used, cap) if self.policy else ""

    def flops(self, length: Tensor, depth: Tensor) -> Tensor:
        """(B,) float64: operations of answering one by one, the policy's own included. length, depth: (B,)."""
        total = torch.zeros(len(length), dtype=torch.float64)
        for k in depth.unique().tolist():
            rows = depth == k
            total[rows] = self.model.flops(length[rows], k)
        if self.policy and self.policy.needs_scores:
            N, d = self.embeddings.vectors.shape
            # After scoring the whole catalogue once, a stop test scores the shortlist once a step.
            tests = 0 if self.policy.router else depth
            total += 2.0 * d * (N + tests * min(self.policy.shortlist, N))
        return total
