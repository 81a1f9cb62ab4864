"""The settings of the backbones, as plain dataclasses: importing this imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SasrecConfig:
    """Sizes of ``reason.backbones.encoder.SequenceEncoder``."""

    name: str = "sasrec"
    hidden: int = (
        64  # width d of states and item vectors; 256 in ReaRec's code, 64 suits catalogues of ML-100K size
    )
    layers: int = 2  # blocks (ReaRec's code: 2)
    heads: int = 2  # attention heads; must divide hidden (ReaRec's code: 2)
    ffn: int = 128  # inner width of the feed-forward part (ReaRec's code: 300 at hidden=256)
    dropout: float = 0.2  # probability on hidden activations; attention weights are never dropped
    max_length: int = 50  # items of history that are read, the last ones (ReaRec, section 4.1: 50)
    text: str = "none"  # none | tfidf | minilm: frozen vectors of the item texts, added to the item table
    text_dim: int = 64  # components kept of the text vectors, when text is not none
