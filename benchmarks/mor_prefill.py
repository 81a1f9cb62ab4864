"""Claim: leaving tokens out of a recursion saves the time that its multiply-adds say, to a tenth.

Packed top-k, as trained, and packed thresholds, calibrated to the same mean depth, against the plain recursive model
of equal depth: one class, one set of layers, whole sequences, random weights. For each the speed-up that is measured
over the one that ``flops.executed`` promises, head, attention and router included. Judged: a forward pass to the
logits by both routes, and a training step (losses of the text and of the routers, backward; no optimiser) by top-k.

A step backward is counted as two forward, but for attention: it forms its scores anew, five products to two. What no
count holds (norms, rotations, activations, choosing, gathering) is inside the times. ``choosing`` is the model
without its layers: routers, top-k, sorting, gathering, gates, scattering, and the embedding.

Not judged: the masked model, where every step computes every token and throws away what was not chosen, and the
plain model of two recursions, which gives every token the mean depth. That one is as fast and chooses nothing: what
routing has to beat in quality.

    python benchmarks/mor_prefill.py [--quick] [--length 512] [--hidden 384] [--block 2]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reason.backbones.config import RecursiveConfig
from reason.backbones.decoder import RecursiveDecoder
from reason.methods.base import Step
from reason.methods.mor.active import ActiveTokens
from reason.methods.mor.config import MorConfig
from reason.methods.mor.flops import balanced
from reason.methods.mor.network import MixtureOfRecursions, RoutedOutput, StepRouting
from reason.methods.mor.objective import losses, router_losses, training_route
from reason.methods.mor.outcomes import decoder_flops, forward_flops
from reason.methods.mor.token_selection import AboveThreshold, Route, TopK
from reason.metrics.calibration import threshold_for_share

RECURSIONS, BATCH, VOCAB = 3, 2, 4096
TARGET = 0.9
PLAIN, SHORT = "plain recursive", "plain, 2 recursions"


class Masked(MixtureOfRecursions):
    """All tokens take all steps; who was not chosen is not seen, and keeps its state."""

    def forward(self, tokens: Tensor, route: Route | None = None, **_: Any) -> RoutedOutput:
        B, T = tokens.shape
        assert route is not None
        rope = self.decoder.rope(torch.arange(T))
        x, active = self.decoder.begin(tokens, rope), ActiveTokens.all_of(tokens)
        depth, steps = torch.zeros(B * T, dtype=torch.int64), []
        earlier, itself = torch.ones(T, T, dtype=torch.bool).tril(), torch.eye(T, dtype=torch.bool)
        for step, router in enumerate(self.by_step):
            logits = router(x).flatten()
            deciding = logits.index_select(0, active.index)
            chosen, per_sequence = route(step, deciding.detach(), active)
            steps.append(StepRouting(active, deciding, None, chosen))
            active = active if chosen is None else active.select(chosen, per_sequence)
            depth = depth.index_fill(0, active.index, step + 1)
            mask = (depth == step + 1).view(B, 1, 1, T)
            sees = earlier & mask | itself  # themselves: a row of nothing but hidden keys has no softmax

            def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor = sees) -> Tensor:
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True).transpose(
                    1, 2
                )

            f = self.decoder.recurse(x, rope, attend)
            f = self.combine(x.flatten(0, 1), f.flatten(0, 1), logits).view_as(x)
            x = torch.where(mask.view(B, T, 1), f, x)
        return RoutedOutput(x, depth.view(B, T), None, steps)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under a minute")
    parser.add_argument("--length", type=int, default=512, help="T, tokens of a sequence")
    parser.add_argument("--hidden", type=int, default=384, help="D, width of the network: a multiple of 192")
    parser.add_argument("--block", type=int, default=2, help="b, layers of the block")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = networks(args.hidden, args.block)
    text = torch.randint(VOCAB, (BATCH, args.length + 1), generator=torch.Generator().manual_seed(1))
    packed, tokens = models["packed, top-k"], text[:, :-1]
    capacities = balanced(RECURSIONS)
    routes: dict[str, Route | None] = {
        "packed, top-k": TopK(capacities),
        "packed, thresholds": calibrated(packed, tokens, capacities),
        "masked, top-k": TopK(capacities),
        "choosing": TopK(capacities),
    }
    _agree(models, tokens, TopK(capacities))
    shape, rounds = packed.decoder.shape, 2 if args.quick else 20
    print(
        f"D={shape.hidden}, {shape.heads} heads, {shape.kv_heads} of keys, ffn {shape.ffn}, L = 2 + {args.block} x "
        f"{RECURSIONS}, V={VOCAB}, {BATCH} x {args.length} tokens, fp32, 1 thread, CPU ms, median of {rounds} rounds"
    )
    print(f"{'':11}{'':22}{'ms':>9}{'faster by':>11}{'promised':>10}{'share':>8}{'choosing':>10}")
    shares: dict[str, np.ndarray] = {}
    speeds: dict[str, float] = {}
    for phase in ("forward", "training"):

        def call(name: str, phase: str = phase) -> None:
            if phase == "forward":
                forward(models[name], tokens, routes.get(name))
            else:
                train(models[name], text)

        names = [name for name in models if phase == "forward" or name != "packed, thresholds"]
        ms = compare(call, names, rounds)
        count = {
            name: operations(models[name], tokens, routes.get(name), phase == "training") for name in names
        }
        for name in names[:-1]:
            speed, promised = ms[PLAIN] / ms[name], count[PLAIN] / count[name]
            shares[f"{phase}, {name}"] = speed / promised
            speeds[f"{phase}, {name}"] = round(float(np.median(speed)), 3)
            chosen = f"{np.median(ms['choosing'] / ms[name]):10.1%}" if name == "packed, top-k" else ""
            print(
                f"{phase:11}{name:22}{np.median(ms[name]):9.1f}{np.median(speed):11.3f}{promised:10.3f}"
                f"{np.median(speed / promised):8.1%}{chosen}"
            )
    judged = ["forward, packed, top-k", "forward, packed, thresholds", "training, packed, top-k"]
    worst = min(judged, key=lambda name: np.median(shares[name]))
    ratio = float(np.median(shares[worst]))
    result = {
        "benchmark": "mor_prefill",
        "ratio": round(ratio, 4),
        "target": TARGET,
        "holds": ratio >= TARGET,
        "spread": [round(float(q), 4) for q in np.quantile(shares[worst], [0.25, 0.75])],
        "shares": {name: round(float(np.median(shares[name])), 4) for name in judged},
        "speeds": speeds,
    }
    print(json.dumps(result))
    return 0 if result["holds"] else 1


def networks(hidden: int, block: int) -> dict[str, MixtureOfRecursions]:
    """All of the same layers, but the short one, whose own are of the same sizes; ``choosing`` has none left."""

    def decoder(recursions: int) -> RecursiveDecoder:
        config = RecursiveConfig(
            hidden=hidden, heads=hidden // 64, kv_heads=hidden // 192, ffn=hidden * 8 // 3,
            layers=2 + block * recursions, tied=False,
        )  # fmt: skip
        return RecursiveDecoder(config, shape=config.shape(VOCAB), recursions=recursions)

    torch.manual_seed(0)
    whole, none = decoder(RECURSIONS), MorConfig(routing="none")
    packed, masked = (cls(whole, MorConfig(), 0.5) for cls in (MixtureOfRecursions, Masked))
    masked.by_step = packed.by_step
    bare = copy.deepcopy(packed)
    bare.decoder.first = bare.decoder.last = None
    bare.decoder.block = cast(Any, nn.ModuleList())
    return {
        PLAIN: MixtureOfRecursions(whole, none, 0.5),
        "packed, top-k": packed,
        "packed, thresholds": packed,
        "masked, top-k": masked,
        SHORT: MixtureOfRecursions(decoder(2), none, 0.5),
        "choosing": bare,
    }


@torch.no_grad()
def calibrated(model: MixtureOfRecursions, tokens: Tensor, capacities: list[float]) -> AboveThreshold:
    """Thresholds that let as many of these tokens through as top-k does."""
    thresholds: list[float] = []
    for r in range(1, len(capacities)):
        logits = model(tokens, AboveThreshold([*thresholds, -1e30]), cap=r + 1).steps[r].logits
        thresholds.append(threshold_for_share(logits.numpy(), capacities[r] / capacities[r - 1]))
    return AboveThreshold(thresholds)


@torch.inference_mode()
def forward(model: MixtureOfRecursions, tokens: Tensor, route: Route | None) -> Tensor:
    """Logits (B, T, V); of a model without layers, states."""
    states = model(tokens, route).states
    return model.decoder.logits(model.read(states)) if len(model.decoder.block) else states


def train(model: MixtureOfRecursions, text: Tensor) -> None:
    """A step of training up to the gradients; of a model without layers, all but what follows the loop."""
    model.zero_grad(set_to_none=True)
    tokens, length = text[:, :-1], torch.full((len(text),), text.shape[1] - 1)
    batch = {"tokens": tokens, "targets": text[:, 1:], "length": length}
    step = Step(epoch=0, step=0, progress=0.0, generator=torch.Generator())
    if len(model.decoder.block):
        found = losses(model.config, model, batch, step)
    else:
        routed = model(tokens, training_route(model.config, RECURSIONS, step), lengths=length)
        found = {"sum": (routed.states.sum(), 1.0), **router_losses(model.config, model, routed)}
    total = sum(s / n for s, n in found.values())
    total.backward()  # type: ignore[union-attr]


def compare(call: Callable[[str], None], names: list[str], rounds: int) -> dict[str, np.ndarray]:
    """CPU ms (rounds,) of each, in turn; the first round is not counted."""
    ms: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names:
            # The one thread's own time: neighbours on the machine do not count.
            begun = time.thread_time()
            call(name)
            if turn:
                ms[name].append(1e3 * (time.thread_time() - begun))
    return {name: np.array(t) for name, t in ms.items()}


@torch.no_grad()
def operations(model: MixtureOfRecursions, tokens: Tensor, route: Route | None, backward: bool) -> float:
    """Multiply-adds, twice, as the plain or the packed model executes them."""
    shape, depth = decoder_flops(model), model(tokens, route).depth
    forward = forward_flops(model, shape, depth.cpu().numpy())
    if not backward:
        return forward
    T, pairs = depth.shape[1], 0.0
    for row in depth:
        counts = [int((row > r).sum()) for r in range(model.recursions)]
        pairs += shape.ends * T * (T + 1) / 2 + shape.block * sum(k * (k + 1) / 2 for k in counts)
    return 3 * forward + 0.5 * shape.pair * pairs


@torch.no_grad()
def _agree(models: dict[str, MixtureOfRecursions], tokens: Tensor, route: Route) -> None:
    """Packed and masked say the same; else the comparison would be void."""
    a, b = (forward(models[name], tokens, route) for name in ("packed, top-k", "masked, top-k"))
    gap = float((a - b).abs().max())
    assert gap < 1e-4, f"packed and masked disagree by {gap}"


if __name__ == "__main__":
    sys.exit(main())
