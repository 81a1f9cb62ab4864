"""Claim: depth on demand saves the time that it promises: at least 80 % of it at batch 1, 60 % at batch 256.

A policy that spends c of K latent steps on average promises the time of a fixed depth c. Both are measured,
the fixed depths 0..K and every policy, over the same requests: encoder, steps and the policy's own
tests (with the shortlist that some of them draw up at step 0), without the final ranking. What is encoded
is the same for all and cancels; it is encoded once and its time is printed.

    share = (time at fixed K - time of the policy) / (time at fixed K - time at fixed c)

with the time at a c between two depths on the line between them. The model is one whose steps matter
(d = 256, 4 layers, K = 6), its weights random and its thresholds solved for c = 2 on the timed requests themselves:
nothing is claimed about accuracy. The rival is the rule as it is usually shown, which runs
all K steps and only then selects one: it saves nothing, by construction.

    python benchmarks/latent_policy.py [--quick] [--items 3416] [--compact 0.75]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from reason.backbones.config import SasrecConfig
from reason.backbones.encoder import SequenceEncoder
from reason.methods.latent.calibrate import fit_router
from reason.methods.latent.config import FEATURES, LatentConfig
from reason.methods.latent.policy import DepthPolicy, Measure, PolicyTest, features, rising
from reason.methods.latent.reasoning import ItemEmbeddings, Reasoning, run_steps
from reason.metrics.calibration import threshold_for_mean_steps

TARGETS = {1: 0.8, 256: 0.6}
STEPS, LAYERS, LENGTH, MEAN = 6, 4, 50, 2.0
FIXED = (0, 1, 2, 3, STEPS)  # depths that are timed: the ends, and those that the policies' means lie between
TESTS = ("cos", "kl", "margin", "overlap", "entropy")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under a minute")
    parser.add_argument("--items", type=int, default=3416, help="size of the catalogue")
    parser.add_argument(
        "--compact", type=float, default=0.75, help="share of held rows at which they are moved"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = SasrecConfig(hidden=256, layers=LAYERS, heads=2, ffn=1024, max_length=LENGTH)
    model = SequenceEncoder(sizes, num_items=args.items, steps=STEPS).eval()
    with torch.no_grad():  # weights that turn the state about, so that requests differ
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)
    items = torch.randint(0, args.items, (256, LENGTH))
    length = torch.full((256,), LENGTH)
    config = LatentConfig()
    print(
        f"d=256, ffn 1024, {LAYERS} layers, L={LENGTH}, K={STEPS}, {args.items} items, fp32, 1 thread; "
        f"mean depth {MEAN:g} wanted"
    )
    held: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        embeddings = ItemEmbeddings.of(model)

        def start(rows: slice, depth: int) -> Reasoning:
            return Reasoning(config, model, embeddings, items[rows], length[rows], depth)

        policies = {name: fit(name, lambda: start(slice(0, 256), STEPS)) for name in (*TESTS, "router")}
        log_counts = torch.zeros(args.items)
        for batch, singles, repeats in ((256, 1, 6 if args.quick else 40), (1, 32, 3 if args.quick else 15)):
            began = time.thread_time()
            encoded = [start(slice(a, a + batch), STEPS) for a in range(0, batch * singles, batch)]
            encoder_ms = 1e3 * (time.thread_time() - began) / singles
            used: dict[str, float] = {}

            kept = [[(k.clone(), v.clone()) for k, v in run.thought.items] for run in encoded]

            def answer(
                policy: DepthPolicy | None,
                depth: int,
                encoded: list[Reasoning] = encoded,
                kept: list[list[tuple[Tensor, Tensor]]] = kept,
            ) -> tuple[float, float]:
                """Steps taken by all requests, and the seconds it took."""
                spent = took = 0.0
                for first, whole in zip(encoded, kept, strict=True):
                    if len(first.items) > 1:  # rows that leave a batch are written over
                        for now, then in zip(first.thought.items, whole, strict=True):
                            now[0].copy_(then[0])
                            now[1].copy_(then[1])
                    run = copy.copy(first)
                    run.thought, run.depth = replace(first.thought), depth
                    begin = time.thread_time()  # the one thread's own time: neighbours do not count
                    test = PolicyTest(policy, log_counts) if policy else None
                    output = run_steps(run, test, compact=args.compact)
                    took += time.thread_time() - begin
                    spent += float(output.depth.sum())
                return spent, took

            calls: dict[str, Callable[[], tuple[float, float]]] = {
                f"fixed {k}": lambda k=k: answer(None, k) for k in FIXED
            }
            calls |= {name: lambda policy=policy: answer(policy, STEPS) for name, policy in policies.items()}
            times: dict[str, list[float]] = {name: [] for name in calls}
            for turn in range(repeats + 1):
                for name, call in calls.items():
                    spent, took = call()
                    if turn:
                        times[name].append(1e3 * took / singles)
                        used[name] = spent / (singles * batch)
            held[str(batch)] = report(batch, encoder_ms, times, used)
    worst = {b: min(shares.values()) for b, shares in held.items()}
    result = {
        "benchmark": "latent_policy",
        "ratio": round(worst["256"], 4),
        "target": TARGETS[256],
        "ratio_batch_1": round(worst["1"], 4),
        "target_batch_1": TARGETS[1],
        "holds": all(worst[str(b)] >= target for b, target in TARGETS.items()),
        "spread": [round(min(held["256"].values()), 4), round(max(held["256"].values()), 4)],
        "shares": {b: {name: round(s, 3) for name, s in shares.items()} for b, shares in held.items()},
    }
    print(json.dumps(result))
    return 0 if result["holds"] else 1


def fit(name: str, start: Callable[[], Reasoning]) -> DepthPolicy:
    """The policy whose requests take ``MEAN`` steps on average, on the very requests that are timed."""
    policy = DepthPolicy(name, 0.0, 0 if name == "router" else 1, [1.0] * (STEPS + 1), 200)
    run = start()
    if name == "router":
        measure = Measure(policy, torch.zeros(len(run.embeddings)))
        x = features(list(FEATURES), measure, run).double().numpy()
        gain = np.random.default_rng(0).normal(size=len(x)) + (x[:, 4] - x[:, 4].mean()) / (
            x[:, 4].std() + 1e-9
        )
        router = fit_router(list(FEATURES), x, gain)
        score = (x - router.mean) / router.scale @ np.array(router.weight)
        threshold = threshold_for_mean_steps(torch.from_numpy(-score - router.bias)[:, None], MEAN / STEPS, 0)
        return replace(policy, threshold=threshold, router=router)
    measure = Measure(policy)
    columns = [torch.full((len(run.items),), -torch.inf)]
    for _ in range(1, STEPS):
        run.step()
        columns.append(measure(run))
    threshold = threshold_for_mean_steps(torch.stack(columns, 1), MEAN, 1)
    return replace(policy, threshold=rising(name, threshold))


def report(
    batch: int, encoder_ms: float, times: dict[str, list[float]], used: dict[str, float]
) -> dict[str, float]:
    """Print one batch size; the share of the promised saving that each policy reaches."""
    ms = {name: np.array(t) for name, t in times.items()}
    fixed = {k: ms[f"fixed {k}"] for k in FIXED}  # (rounds,) each
    whole = encoder_ms + float(np.median(fixed[STEPS]))
    print(
        f"\nbatch {batch}: CPU ms per batch after the encoder's {encoder_ms:.1f}, median of {len(fixed[0])} rounds"
    )
    print(f"{'':12}{'mean depth':>12}{'ms':>10}{'fixed, same':>14}{'saved of all':>14}{'of promised':>13}")
    for k in FIXED:
        print(f"{f'fixed {k}':12}{k:12.2f}{np.median(fixed[k]):10.3f}")
    shares = {}
    for name in (n for n in ms if not n.startswith("fixed")):
        low = min(int(used[name]), 2)
        assert low <= used[name] <= low + 1, (
            f"{name} spends {used[name]} steps: no two timed depths enclose that"
        )
        line = fixed[low] + (used[name] - low) * (fixed[low + 1] - fixed[low])
        saved = float(np.median(fixed[STEPS] - ms[name]))
        shares[name] = saved / float(np.median(fixed[STEPS] - line))
        print(
            f"{name:12}{used[name]:12.2f}{np.median(ms[name]):10.3f}{np.median(line):14.3f}"
            f"{saved / whole:14.1%}{shares[name]:13.1%}"
        )
    return shares


if __name__ == "__main__":
    sys.exit(main())
