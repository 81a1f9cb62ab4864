"""Claim: keeping what the router decided costs less than 3 % of a forward pass.

A trace (depths, scores, gates, counts, broken answers) is read off what a pass returns, so the rival is the same
pass without it: a prefill of some windows, packed, with head and thresholds that give a mean depth of 2. Both in
turn, CPU time of the one thread; the ratio is the median over pairs.

    python benchmarks/mor_trace.py [--quick] [--hidden 192] [--batch 4] [--length 256]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from reason.backbones.config import RecursiveConfig
from reason.backbones.decoder import RecursiveDecoder
from reason.methods.mor.config import MorConfig
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.token_selection import AboveThreshold
from reason.methods.mor.trace import RoutingTrace, trace
from reason.metrics.calibration import threshold_for_share

TARGET = 1.03
RECURSIONS, VOCAB = 3, 4096


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer pairs, under a minute")
    parser.add_argument("--hidden", type=int, default=192, help="width of the network")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = RecursiveConfig(
        hidden=args.hidden, heads=6, kv_heads=2, ffn=args.hidden * 8 // 3, layers=2 + 2 * RECURSIONS
    )
    decoder = RecursiveDecoder(config, shape=config.shape(VOCAB), recursions=RECURSIONS)
    model = MixtureOfRecursions(decoder, MorConfig(), 0.5).eval()
    tokens = torch.randint(VOCAB, (args.batch, args.length))
    thresholds: list[float] = []
    with torch.inference_mode():
        for r in range(1, RECURSIONS):
            routing = model(tokens, AboveThreshold([*thresholds, -1e30]), cap=r + 1).steps[r]
            thresholds.append(
                threshold_for_share(routing.logits.numpy(), (RECURSIONS - r) / (RECURSIONS - r + 1))
            )
        route = AboveThreshold(thresholds)

        def forward() -> float:
            routed = model(tokens, route)
            model.decoder.logits(model.read(routed.states))
            return float(routed.depth.double().mean())

        def traced() -> RoutingTrace:
            routed = model(tokens, route)
            model.decoder.logits(model.read(routed.states))
            return trace(model, routed, route)

        def alone(routed=model(tokens, route)) -> RoutingTrace:
            return trace(model, routed, route)

        calls: dict[str, Callable[[], object]] = {
            "forward": forward,
            "with a trace": traced,
            "trace alone": alone,
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range((20 if args.quick else 100) + 2):
            for name, call in list(calls.items())[:: 1 if turn % 2 else -1]:
                begun = time.thread_time()
                call()
                if turn > 1:  # the first ones warm up
                    times[name].append(1e3 * (time.thread_time() - begun))
        depth = forward()
    ms = {name: np.array(t) for name, t in times.items()}
    ratios = ms["with a trace"] / ms["forward"]
    print(
        f"B={args.batch}, T={args.length}, D={args.hidden}, {RECURSIONS} recursions of 2 layers, mean depth {depth:.2f}, "
        f"fp32, 1 thread, median of {len(ratios)} pairs"
    )
    print(f"{'':14}{'CPU ms':>10}{'of a forward':>15}")
    for name, t in ms.items():
        print(f"{name:14}{np.median(t):10.3f}{np.median(t / ms['forward']):15.2%}")
    ratio = float(np.median(ratios))
    result = {
        "benchmark": "mor_trace",
        "ratio": round(ratio, 4),
        "target": TARGET,
        "holds": ratio < TARGET,
        "spread": [round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.75])],
        "alone": round(float(np.median(ms["trace alone"] / ms["forward"])), 4),
    }
    print(json.dumps(result))
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
