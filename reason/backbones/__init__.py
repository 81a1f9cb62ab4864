"""Networks that methods work on, and what they share. Here stand only the cards: importing this is cheap."""

from reason.backbones.base import BackboneCard
from reason.backbones.config import Bert4recConfig, CausalConfig, RecursiveConfig, SasrecConfig, UnisrecConfig

sasrec = BackboneCard(
    name="sasrec",
    summary="Causal self-attention over the items of a history, tied item table, room for latent steps.",
    kind="sequence encoder",
    Config=SasrecConfig,
    target="reason.backbones.encoder:SequenceEncoder",
)

bert4rec = BackboneCard(
    name="bert4rec",
    summary="Self-attention both ways within each prefix of a history; latent steps see the prefix and each other.",
    kind="sequence encoder",
    Config=Bert4recConfig,
    target="reason.backbones.bidirectional:Bert4Rec",
)

unisrec = BackboneCard(
    name="unisrec",
    summary="Causal self-attention over item vectors made from frozen texts by whitening and a mixture of experts.",
    kind="sequence encoder",
    Config=UnisrecConfig,
    target="reason.backbones.adaptor:UniSRec",
)

recursive = BackboneCard(
    name="recursive",
    summary="Llama-style language model that applies a block of layers again and again; from scratch or opened.",
    kind="recursive decoder",
    Config=RecursiveConfig,
    target="reason.backbones.decoder:RecursiveDecoder",
)

causal_lm = BackboneCard(  # not "causal": that is the module, once it is imported
    name="causal",
    summary="Language model of transformers, unmodified: opened from any source, or a small Llama from scratch.",
    kind="causal lm",
    Config=CausalConfig,
    target="reason.backbones.causal:open_model",
    opened="reason.backbones.causal:opened",
)
