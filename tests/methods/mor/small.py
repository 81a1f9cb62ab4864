"""Networks and texts that are small enough to be decoded in every way there is."""

from __future__ import annotations

import torch

from reason.backbones.config import RecursiveConfig
from reason.backbones.decoder import RecursiveDecoder
from reason.methods.mor.config import MorConfig
from reason.methods.mor.network import MixtureOfRecursions

VOCAB = 23


def network(recursions=3, sharing="middle_cycle", block=2, seed=0, kv_heads=2, **keys) -> MixtureOfRecursions:
    ends = 2 if sharing.startswith("middle") else 0
    config = RecursiveConfig(
        hidden=16, heads=4, kv_heads=kv_heads, ffn=24, layers=ends + block * recursions, sharing=sharing, init_std=0.3
    )  # fmt: skip
    torch.manual_seed(seed)
    decoder = RecursiveDecoder(config, shape=config.shape(VOCAB), recursions=recursions)
    return MixtureOfRecursions(decoder, MorConfig(**keys), 0.5).eval()


def text(length, seed=1) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def at_once(model, tokens, route=None, **how):
    """Logits (T, V) and depths (T,) of one text, by the network that sees all of it at a time."""
    with torch.no_grad():
        routed = model(torch.tensor([tokens]), route, **how)
        return model.decoder.logits(model.read(routed.states))[0], routed.depth[0].numpy()
