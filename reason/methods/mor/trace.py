"""The trace of a forward pass: depths, the logits of each router, and where they were not finite.

Nothing is recorded while the network runs; a trace is read off what the pass returns anyway. ``benchmarks/mor_trace.py``
watches what that costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reason.methods.mor.network import MixtureOfRecursions, RoutedOutput
from reason.methods.mor.router import CERTAIN
from reason.methods.mor.token_selection import AboveThreshold, Route


@dataclass
class RoutingTrace:
    """Of B sequences of T positions and N_r recursions."""

    depth: Tensor  # (B, T) int8, recursions taken; 0 at padding
    logits: Tensor  # (B, N_r, T) float16, the logits that decided; NaN where a token was not a candidate
    gate: Tensor  # (B, N_r, T) float16, the weight of a step's output in the state; 0 where it was not taken
    counts: Tensor  # (B, N_r) int32, tokens that took each step
    fallback: Tensor  # (B, T) bool, an output of a router was not finite: the token went on
    thresholds: tuple[float, ...] | None  # of steps 2, 3, ...; None where no threshold decided


@torch.no_grad()
def trace(model: MixtureOfRecursions, routed: RoutedOutput, route: Route | None = None) -> RoutingTrace:
    """The trace of a forward pass under ``route``."""
    B, T = routed.depth.shape
    N, depth = model.recursions, routed.depth
    took = depth[:, None] > torch.arange(N, device=depth.device)[:, None]  # (B, N_r, T)
    logits = torch.full((N, B * T), torch.nan, dtype=torch.float16, device=depth.device)
    gate = torch.zeros_like(logits)
    if routed.entry is not None:
        index = routed.steps[0].candidates.index
        logits[:, index] = routed.entry.T.half()
        gate[:, index] = model.gates(routed.entry).T.half()
    elif model.by_step:
        for step, routing in enumerate(routed.steps):
            logits[step, routing.candidates.index] = routing.deciding.half()
            gate[step, routing.candidates.index] = model.gates(routing.logits).half()
    if model.config.combine == "replace" or not (model.by_step or model.by_token):
        gate.fill_(1)
    logits, gate = (x.view(N, B, T).transpose(0, 1) for x in (logits, gate))
    if routed.entry is not None:  # a token's choice enters once, where it exits
        took = took & (depth[:, None] == torch.arange(1, N + 1, device=depth.device)[:, None])
    counts = torch.stack([(depth > step).sum(1) for step in range(N)], 1)
    thresholds = tuple(route.thresholds) if isinstance(route, AboveThreshold) else None
    return RoutingTrace(
        depth.to(torch.int8), logits, gate * took, counts.to(torch.int32), fallback_tokens(routed), thresholds
    )


@torch.no_grad()
def fallback_tokens(routed: RoutedOutput) -> Tensor:
    """(B, T) bool: tokens for which an output of a router was not finite, known by what ``deepest_if_nonfinite`` put in its
    place."""
    fallback = torch.zeros_like(routed.depth, dtype=torch.bool).flatten()
    if routed.entry is not None:
        fallback[routed.steps[0].candidates.index] = routed.entry[:, -1] == CERTAIN
        return fallback.view_as(routed.depth)
    for routing in routed.steps:
        replaced = routing.logits == CERTAIN
        if routing.aux_logits is not None:
            replaced = replaced | (routing.aux_logits == CERTAIN)
        fallback[routing.candidates.index] |= replaced
    return fallback.view_as(routed.depth)
