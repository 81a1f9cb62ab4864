"""Networks that methods work on, and what they share. Here stand only the cards: importing this is cheap."""

from reason.backbones.base import BackboneCard
from reason.backbones.config import SasrecConfig

sasrec = BackboneCard(
    name="sasrec",
    summary="Causal self-attention over the items of a history, tied item table, room for latent steps.",
    kind="sequence encoder",
    Config=SasrecConfig,
    target="reason.backbones.encoder:SequenceEncoder",
)
