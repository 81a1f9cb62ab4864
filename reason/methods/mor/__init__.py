"""Mixture-of-Recursions: the card. Importing this is cheap."""

from reason.methods.base import DepthAxis, MethodCard, Units
from reason.methods.mor.config import MorConfig

card = MethodCard(
    name="mor",
    summary="Writes text with one block of layers, applied to each token as often as a router finds worth it "
    "(Mixture-of-Recursions).",
    paper="Bae et al., Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level "
    "Computation, arXiv 2507.10524",
    Config=MorConfig,
    depth=DepthAxis(unit="recursions", least=1, default=3, zero="the block is applied once"),
    view="text",
    units=Units(
        example="document", accuracy="next-token accuracy", latency="one decoded token", throughput="tokens/s"
    ),
    beside=("bits per byte",),
    target="reason.methods.mor.method:Mor",
    language_model="reason.methods.mor.policy:open_source",
    backbone="recursive",
    dataset="stdlib-text",
    preset={
        "backbone.hidden": 128,
        "backbone.heads": 4,
        "backbone.ffn": 352,
        "backbone.init_std": 0.06,  # 0.02 suits widths of 500 and more
        "train.batch_size": 8,
        "train.steps": 500,
        "train.lr": 3e-3,
        "train.weight_decay": 0.1,
        "train.beta2": 0.95,
        "train.schedule": "trapezoid",
        "train.warmup": 0.05,
        "eval.batch_size": 16,
    },
)
