"""What a forward pass decided, kept: depths, what each router said, and where it said nothing.

Nothing is noted while the network runs; a trace is read off what the pass returns anyway. ``benchmarks/mor_trace.py``
watches what that costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reason.methods.mor.network import CERTAIN
from reason.methods.mor.routes import Above, Route

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions, Routed


@dataclass
class RoutingTrace:
    """Of B sequences of T positions and N_r recursions."""

    depth: Tensor  # (B, T) int8, recursions taken; 0 at padding
    logits: Tensor  # (B, N_r, T) float16, what decided; NaN where a token was no candidate
    gate: Tensor  # (B, N_r, T) float16, how strongly a step entered the state; 0 where it did not
    counts: Tensor  # (B, N_r) int32, tokens that took each step
    broken: Tensor  # (B, T) bool, a router's answer was no number: the token was sent on
    thresholds: tuple[float, ...] | None  # of steps 2, 3, ...; None where none decided


@torch.no_grad()
def trace(model: MixtureOfRecursions, routed: Routed, route: Route | None = None) -> RoutingTrace:
    """The trace of a forward pass under ``route``."""
    B, T = routed.depth.shape
    N, depth = model.recursions, routed.depth
    took = depth[:, None] > torch.arange(N, device=depth.device)[:, None]  # (B, N_r, T)
    logits = torch.full((N, B * T), torch.nan, dtype=torch.float16, device=depth.device)
    gate = torch.zeros_like(logits)
    if routed.entry is not None:
        index = routed.scored[0].among.index
        logits[:, index] = routed.entry.T.half()
        gate[:, index] = model.gates(routed.entry).T.half()
    elif model.by_step:
        for step, scored in enumerate(routed.scored):
            heard = scored.logits if scored.foreseen is None else scored.foreseen
            logits[step, scored.among.index] = heard.half()
            gate[step, scored.among.index] = model.gates(scored.logits).half()
    if model.config.combine == "replace" or not (model.by_step or model.by_token):
        gate.fill_(1)
    logits, gate = (x.view(N, B, T).transpose(0, 1) for x in (logits, gate))
    if routed.entry is not None:  # a token's choice enters once, where it leaves
        took = took & (depth[:, None] == torch.arange(1, N + 1, device=depth.device)[:, None])
    counts = torch.stack([(depth > step).sum(1) for step in range(N)], 1)
    thresholds = tuple(route.thresholds) if isinstance(route, Above) else None
    return RoutingTrace(
        depth.to(torch.int8), logits, gate * took, counts.to(torch.int32), fallen(routed), thresholds
    )


@torch.no_grad()
def fallen(routed: Routed) -> Tensor:
    """(B, T) bool: tokens of which a router said no number, known by what ``deepest_where_broken`` put in its place."""
    broken = torch.zeros_like(routed.depth, dtype=torch.bool).flatten()
    if routed.entry is not None:
        broken[routed.scored[0].among.index] = routed.entry[:, -1] == CERTAIN
        return broken.view_as(routed.depth)
    for scored in routed.scored:
        bad = scored.logits == CERTAIN
        if scored.foreseen is not None:
            bad = bad | (scored.foreseen == CERTAIN)
        broken[scored.among.index] |= bad
    return broken.view_as(routed.depth)
