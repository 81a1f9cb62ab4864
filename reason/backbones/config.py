"""The settings of the backbones, as plain dataclasses: importing this imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reason.errors import ConfigError


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
    text: Literal["none", "tfidf", "minilm"] = (
        "none"  # frozen vectors of the item texts, added to the item table
    )
    text_dim: int = 64  # components kept of the text vectors, when text is not none

    def __post_init__(self):
        for key in ("hidden", "layers", "heads", "ffn", "max_length", "text_dim"):
            if getattr(self, key) < 1:
                raise ConfigError(f"backbone.{key} is {getattr(self, key)}; it must be at least 1.")
        if self.hidden % self.heads:
            fit = [h for h in range(1, self.hidden + 1) if self.hidden % h == 0]
            raise ConfigError(
                f"backbone.heads={self.heads} does not divide backbone.hidden={self.hidden}.",
                f"The nearest that does: backbone.heads={min(fit, key=lambda h: abs(h - self.heads))}",
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"backbone.dropout is {self.dropout}; it must lie in [0, 1).")
