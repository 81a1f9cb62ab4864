"""Claim: a token costs the recursions that it takes, alone and among many, and its keys cost the memory they should.

Three things are measured, on one network whose weights are random and whose thresholds are calibrated for a mean
depth, so that depths really differ from token to token; nothing is claimed about the text.

- latency at batch 1: proportional to 2 + b d + h within 15 %. b layers in the block, d the mean depth that was
  realised, 2 the first and the last layer, h head, norms and the choice of the token, measured, in layers.
- throughput of many sequences: the scheduler reaches 85 % of the bound. The rival decodes as many rows in step:
  every row goes through the block until the last one leaves, what the others compute there is thrown away (their keys
  too). Its text is the same, and that is checked. The bound follows from the depths: for each batch of the rival
  rows times 2 + b (deepest of its rows) + h, over the sum of 2 + b d + h of all tokens.
- bytes of the cache, which both write as they go: within 1 % of (2 + b d) rows a token, or 2 + b where the
  first step's keys serve all.

    python benchmarks/mor_decode.py [--quick] [--rows 16] [--hidden 256] [--block 6]
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
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.cached_pass import Segment, begin, finish, recurse
from reason.methods.mor.config import MorConfig
from reason.methods.mor.decode import extend, prefill, step
from reason.methods.mor.generate import Generation, GenerationRequest
from reason.methods.mor.halting import HaltingRule, router_logits
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.scheduler import Scheduler
from reason.methods.mor.token_selection import AboveThreshold, KnownDepths
from reason.metrics.calibration import threshold_for_share

RECURSIONS, VOCAB = 3, 2048
LATENCY, SHARE, BYTES = 0.15, 0.85, 0.01  # targets
PROFILES = {"1.5": (1, 0.35, 0.15), "2.0": (1, 2 / 3, 1 / 3)}  # shares of tokens that reach each step


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under a minute")
    parser.add_argument("--rows", type=int, default=16, help="rows of a pass through the block")
    parser.add_argument("--hidden", type=int, default=256, help="width of the network")
    parser.add_argument("--block", type=int, default=6, help="b, layers of the block")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = network(args.hidden, args.block)
    print(
        f"D={args.hidden}, b={args.block}, {RECURSIONS} recursions, {VOCAB} tokens, keys of the recursion, fp32, "
        f"1 thread"
    )
    with torch.inference_mode():
        routes = {name: calibrated(model, shares) for name, shares in PROFILES.items()}
        latency = report_latency(model, routes, 3 if args.quick else 30)
        rounds, waves, most = (2, 3, 24) if args.quick else (12, 4, 64)
        shares = report_throughput(model, routes, args.rows, rounds, waves, most)
        kv_mode = report_memory(model, routes["2.0"])
    worst = max(abs(np.median(r) - 1) for r in latency.values())
    share = min(shares, key=lambda name: np.median(shares[name]))
    ratio = float(np.median(shares[share]))
    result = {
        "benchmark": "mor_decode",
        "ratio": round(ratio, 4),
        "target": SHARE,
        "off_latency": round(float(worst), 4),
        "target_latency": LATENCY,
        "off_bytes": round(kv_mode, 5),
        "target_bytes": BYTES,
        "holds": bool(ratio >= SHARE and worst <= LATENCY and kv_mode <= BYTES),
        "spread": [round(float(q), 4) for q in np.quantile(shares[share], [0.25, 0.75])],
        "latency": {name: round(float(np.median(r)), 4) for name, r in latency.items()},
        "shares": {name: round(float(np.median(s)), 4) for name, s in shares.items()},
    }
    print(json.dumps(result))
    return 0 if result["holds"] else 1


def network(hidden: int, block: int) -> MixtureOfRecursions:
    """Weights large enough that one text leads elsewhere than another."""
    config = RecursiveConfig(
        hidden=hidden, heads=4, kv_heads=2, ffn=hidden * 11 // 4, layers=2 + block * RECURSIONS,
        tied=False, init_std=2 * hidden**-0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = RecursiveDecoder(config, shape=config.shape(VOCAB), recursions=RECURSIONS)
    return MixtureOfRecursions(decoder, MorConfig(), 0.5).eval()


def calibrated(model: MixtureOfRecursions, shares: tuple[float, ...]) -> AboveThreshold:
    """Thresholds that let such shares of the tokens of a random text through, a step at a time."""
    tokens = torch.randint(VOCAB, (8, 256), generator=torch.Generator().manual_seed(1))
    thresholds: list[float] = []
    for r in range(1, len(shares)):
        routing = model(tokens, AboveThreshold([*thresholds, -1e30]), cap=r + 1).steps[r]
        thresholds.append(threshold_for_share(routing.logits.numpy(), shares[r] / shares[r - 1]))
    return AboveThreshold(thresholds)


def timed(call: Callable[[], object]) -> float:
    """CPU ms of the one thread: neighbours do not count."""
    begun = time.thread_time()
    call()
    return 1e3 * (time.thread_time() - begun)


# --- one sequence -------------------------------------------------------------------------------------


def report_latency(
    model: MixtureOfRecursions,
    routes: dict[str, AboveThreshold],
    rounds: int,
    context: int = 192,
    most: int = 48,
) -> dict[str, np.ndarray]:
    """Ratios (rounds,) of each route's time for a text, over that of full depth, to the ratio that is promised."""
    text = torch.randint(VOCAB, (context + most,), generator=torch.Generator().manual_seed(2)).tolist()
    rules = {"full": HaltingRule(model, KnownDepths(RECURSIONS)), "one": HaltingRule(model, KnownDepths(1))}
    rules |= {name: HaltingRule(model, route) for name, route in routes.items()}
    pasts = {name: MoRCache(model).open() for name in rules}
    for name, rule in rules.items():
        prefill(model, pasts[name], text[:context], rule)

    def write(name: str) -> None:
        past, rule = pasts[name], rules[name]
        past.truncate(context)
        for token in text[context:]:
            step(model, [past], [token], [rule])[0].argmax().item()

    times: dict[str, list[float]] = {name: [] for name in rules}
    layers, heads = [], []
    for turn in range(rounds + 1):
        found = {name: timed(lambda name=name: write(name)) / most for name in rules}
        layer, head = units(model, [pasts["full"]], most)
        if turn:
            layers.append(layer), heads.append(head)
            for name, t in found.items():
                times[name].append(t)
    ms = {name: np.array(t) for name, t in times.items()}
    layer, h = float(np.median(layers)), float(np.median(np.array(heads) / np.array(layers)))
    b = model.decoder.sharing.block
    depth = {name: float(past.depth[context:].mean()) for name, past in pasts.items()}
    cost = {name: 2 + b * d + h for name, d in depth.items()}
    ratios = {name: ms[name] / ms["full"] / (cost[name] / cost["full"]) for name in ms if name != "full"}
    print(
        f"\nbatch 1, {most} tokens after {context}: a layer {layer:.3f} ms, head and choice h = {h:.2f} layers; "
        f"CPU ms a token, median of {rounds} rounds"
    )
    print(f"{'':8}{'mean depth':>12}{'ms':>9}{'of full':>10}{'promised':>10}{'off':>8}")
    for name, t in ms.items():
        print(
            f"{name:8}{depth[name]:12.2f}{np.median(t):9.3f}{np.median(t / ms['full']):10.3f}"
            f"{cost[name] / cost['full']:10.3f}{np.median(ratios.get(name, np.ones(1))) - 1:+8.1%}"
        )
    return ratios


def units(model: MixtureOfRecursions, pasts: list, repeats: int) -> tuple[float, float]:
    """CPU ms of a layer of the block, and of head and choice, for a further token of each of these sequences."""
    x = torch.randn(len(pasts), model.decoder.shape.hidden)
    for past in pasts:
        past.append(1)
        past.enter(0, [past.length - 1])
    segments = [Segment(past, np.array([past.length - 1])) for past in pasts]
    rope = model.decoder.rope(torch.tensor([past.length - 1 for past in pasts]))
    layer = timed(lambda: [recurse(model.decoder, segments, x, rope) for _ in range(repeats)])
    decoder = model.decoder
    head = timed(lambda: [decoder.logits(decoder.norm(x)).argmax(-1).tolist() for _ in range(repeats)])
    for past in pasts:
        past.truncate(past.length - 1)
    return layer / repeats / decoder.sharing.block, head / repeats


# --- many sequences -----------------------------------------------------------------------------------


def report_throughput(
    model: MixtureOfRecursions,
    routes: dict[str, AboveThreshold],
    rows: int,
    rounds: int,
    waves: int,
    most: int,
) -> dict[str, np.ndarray]:
    """Of the bound, the share (rounds,) that the scheduler reaches for each route."""
    shares = {}
    for name, route in routes.items():
        starts = torch.randint(VOCAB, (waves * rows,), generator=torch.Generator().manual_seed(3)).tolist()
        requests = [GenerationRequest([token], most, route) for token in starts]
        times: dict[str, list[float]] = {"in step": [], "scheduler": []}
        generated: dict[str, list[Generation]] = {}

        def ours(requests: list[GenerationRequest] = requests, generated: dict = generated) -> None:
            scheduler = Scheduler(model, MoRCache(model), rows=rows)
            generated["scheduler"] = scheduler.run(requests)

        def theirs(requests: list[GenerationRequest] = requests, generated: dict = generated) -> None:
            batches = [requests[a : a + rows] for a in range(0, len(requests), rows)]
            generated["in step"] = [done for batch in batches for done in in_step(model, batch)]

        pasts = [cache.open() for cache in [MoRCache(model)] * rows]
        extend(model, pasts, [starts[:1] * (most // 2)] * rows, [HaltingRule(model, route)] * rows)
        layers, heads = [], []
        for turn in range(rounds + 1):
            found = {"in step": timed(theirs), "scheduler": timed(ours)}
            layer, head = units(model, pasts, 4)
            if turn:
                layers.append(layer), heads.append(head)
                for key, t in found.items():
                    times[key].append(t)
        alike = sum(
            a.tokens == b.tokens for a, b in zip(generated["in step"], generated["scheduler"], strict=True)
        )
        assert alike >= 0.95 * len(requests), f"only {alike} of {len(requests)} texts are the same"
        b, h = model.decoder.sharing.block, float(np.median(np.array(heads) / np.array(layers)))
        depth = np.stack([done.depth for done in generated["scheduler"]])  # (sequences, most)
        deepest = np.stack([done.depth for done in generated["in step"]]).reshape(waves, rows, most).max(1)
        deepest, first = deepest[:, 1:], depth[:, 0]  # the first token is read by both as deep as it goes
        rival = rows * (2 + b * deepest + h).sum() + (2 + b * first + h).sum()
        bound = rival / (2 + b * depth + h).sum()
        ms = {key: np.array(t) for key, t in times.items()}
        speed = ms["in step"] / ms["scheduler"]
        shares[name] = speed / bound
        tokens = depth.size
        print(
            f"\nrows {rows}, {len(requests)} sequences of {most} tokens, depths 1 to {RECURSIONS} of "
            f"{np.bincount(depth.ravel(), minlength=RECURSIONS + 1)[1:].tolist()} tokens, mean {depth.mean():.2f}, mean "
            f"of the deepest in a batch {deepest.mean():.2f}; a layer {np.median(layers):.2f} ms, "
            f"h = {h:.2f}; {alike} texts the same; median of {rounds} rounds"
        )
        for key, t in ms.items():
            print(
                f"{key:12}{np.median(t) / tokens:9.3f} ms a token{1e3 * tokens / np.median(t):9.0f} tokens/s"
            )
        print(
            f"{'faster by':12}{np.median(speed):9.3f}, bound {bound:.3f}: {np.median(shares[name]):.1%} of it"
        )
    return shares


def in_step(model: MixtureOfRecursions, requests: list[GenerationRequest]) -> list[Generation]:
    """The rival: one batch, every row in the loop until the last one leaves."""
    cache = MoRCache(model)
    pasts, rules = [cache.open() for _ in requests], [HaltingRule(model, r.route) for r in requests]
    logits = extend(model, pasts, [r.prompt for r in requests], rules)
    written: list[list[int]] = [[] for _ in requests]
    thresholds = np.array([rule.thresholds for rule in rules])  # (B, N_r)
    while True:
        for one, token in zip(written, logits.argmax(-1).tolist(), strict=True):
            one.append(token)
        if len(written[0]) == requests[0].max_tokens:
            return [
                Generation(one, False, past.depth.copy()) for one, past in zip(written, pasts, strict=True)
            ]
        at = pasts[0].length
        for past in pasts:
            past.append(1)
        segments = [Segment(past, np.array([at])) for past in pasts]
        rope = model.decoder.rope(torch.full((len(pasts),), at))
        u = h = begin(model.decoder, segments, torch.tensor([one[-1] for one in written]), rope)
        inside, depths = np.ones(len(pasts), bool), np.zeros(len(pasts), int)
        for r in range(model.recursions):
            scores, deciding = router_logits(model, r, u)
            inside &= (deciding > thresholds[:, r]) | (r == 0)
            if not inside.any():
                break
            for past in pasts:
                past.enter(r, [at])
            segments = [segment._replace(step=r) for segment in segments]
            u = model.combine(u, recurse(model.decoder, segments, u, rope), scores)
            h = torch.where(torch.from_numpy(inside)[:, None], u, h)
            depths[inside] = r + 1
            for past, stays in zip(pasts, inside, strict=True):
                past.spans[r].count -= not stays  # what it wrote there is nobody's key
        for past, depth in zip(pasts, depths, strict=True):
            past.depth[at] = depth
        logits = model.decoder.logits(finish(model.decoder, segments, h, rope))


# --- bytes --------------------------------------------------------------------------------------------


def report_memory(model: MixtureOfRecursions, route: AboveThreshold, length: int = 2048) -> float:
    """The largest part by which what is allocated differs from the formula."""
    text = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(4))
    b, worst = model.decoder.sharing.block, 0.0
    print(f"\nthe cache of {length} tokens, pages of 16")
    for kind in ("recursion", "sharing"):
        cache = MoRCache(model, kind)
        past = cache.open()
        prefill(model, past, text, route, chunk=512, read="none")
        rows = 2 + b * (1 if kind == "sharing" else past.depth.mean())
        whole = 2 + b * RECURSIONS
        formula = rows * length * cache.row_bytes
        worst = max(worst, abs(cache.bytes() / formula - 1))
        print(
            f"{kind:12}{rows:7.2f} rows a token of {whole}{cache.bytes() / 2**20:9.2f} MiB, formula "
            f"{formula / 2**20:.2f} MiB: {cache.bytes() / formula - 1:+.2%}"
        )
    return worst


if __name__ == "__main__":
    sys.exit(main())
