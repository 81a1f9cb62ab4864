"""Claim: a pretrained model that is made recursive is itself wherever nothing was given up.

Three cases are to give the source's logits within 1e-4: one recursion; N_r = 2 with corrections of full rank; the
same behind a router whose capacities are 1. Where shared layers begin as the mean of those they stand for, the
corrections are smallest, and so is rounding. Beside them: how far the source in float32 is from itself in float64,
and what cannot be given back, the loss of each way to begin, without corrections and with corrections of low rank.

    python benchmarks/mor_convert.py [--quick] [--source smollm2-135m] [--text FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from reason.backbones.config import RecursiveConfig
from reason.backbones.decoder import RecursiveDecoder
from reason.backbones.pretrained import Pretrained, open_pretrained
from reason.backbones.source import settle
from reason.methods.mor.config import Init, MorConfig
from reason.methods.mor.convert import Layout, Teacher, convert
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.token_selection import TopK

TARGET, ALL = 1e-4, 10**6  # ALL: a rank beyond every matrix
LENGTHS = {"logits": 64, "loss": 256}  # tokens


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="the three cases only, without the table of losses"
    )
    parser.add_argument(
        "--source", default="smollm2-135m", help="a source of weights, as backbone.source takes it"
    )
    parser.add_argument("--text", default=statistics.__file__, help="a file of text; Python's own by default")
    args = parser.parse_args()
    causal = open_pretrained(settle(args.source))
    read = Path(args.text).read_text(encoding="utf-8")
    ids = torch.tensor([causal.tokens.encode([read])[0][0][: LENGTHS["loss"] + 1]])
    tokens = ids[:, : LENGTHS["logits"]]
    with torch.inference_mode():
        original = decoder(causal, 1).eval()
        want = original.logits(original(tokens))
        print(
            f"{causal.where}; {tokens.shape[1]} tokens of {Path(args.text).name}; largest logit {want.abs().max():.1f}"
        )
        double = original.double()
        exact = double.logits(double(tokens))
        print(f"the source in float32 beside itself in float64: {gap(want, exact):.1e}\n")
        del original, double
        gaps: dict[str, float] = {"one recursion": gap(logits(network(causal, 1, "none"), tokens), want)}
        for init in ("average", "stepwise"):
            for routing in ("none", "expert"):
                name = f"two, full rank, {init}" + (", router" if routing == "expert" else "")
                gaps[name] = gap(logits(network(causal, 2, routing, init, ALL), tokens), want)
        for name, value in gaps.items():
            print(f"{name:40}{value:10.1e}", flush=True)
        losses: dict[str, float] = {}
        if not args.quick:
            losses["source"] = loss(network(causal, 1, "none"), ids)
            for init in ("stepwise", "average", "upper", "lower"):
                for rank in (0, 64, 128) if init in ("stepwise", "average") else (0,):
                    losses[f"{init}, rank {rank}"] = loss(network(causal, 2, "none", init, rank), ids)
            print(f"\nnats a token, {ids.shape[1] - 1} tokens")
            for name, value in losses.items():
                print(f"{name:40}{value:10.3f}")
    worst = max(value for name, value in gaps.items() if "stepwise" not in name)
    result = {
        "benchmark": "mor_convert",
        "ratio": worst,
        "target": TARGET,
        "holds": worst <= TARGET,
        "gaps": gaps,
        "losses": {name: round(value, 3) for name, value in losses.items()},
    }
    print(json.dumps(result))
    return 0 if result["holds"] else 1


def decoder(causal: Pretrained, recursions: int, init: Init = "stepwise", lora: int = 0) -> RecursiveDecoder:
    layout = Layout.of(causal.shape.layers, "middle_cycle", recursions, init)
    return convert(causal, layout, partial(RecursiveDecoder, RecursiveConfig()), lora)


def network(
    causal: Pretrained, recursions: int, routing: str, init: Init = "stepwise", lora: int = 0
) -> MixtureOfRecursions:
    config = MorConfig(routing=routing)  # pyright: ignore[reportArgumentType]
    return MixtureOfRecursions(decoder(causal, recursions, init, lora), config, 0.02, Teacher(causal)).eval()


def logits(model: MixtureOfRecursions, tokens: Tensor) -> Tensor:
    routed = model(tokens, TopK([1.0] * model.recursions) if model.config.routing == "expert" else None)
    return model.decoder.logits(model.read(routed.states))


def loss(model: MixtureOfRecursions, ids: Tensor) -> float:
    return float(F.cross_entropy(logits(model, ids[:, :-1])[0], ids[0, 1:]))


def gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


if __name__ == "__main__":
    sys.exit(main())
