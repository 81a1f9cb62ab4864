"""The settings of the backbones, as plain dataclasses: importing this imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from reason.errors import ConfigError


@dataclass
class EncoderConfig:
    """Sizes that every sequence encoder has. A whole number in it is a size and at least 1."""

    name: str = ""  # of the card
    hidden: int = (
        64  # width d of states and item vectors; 256 in ReaRec's code, 64 suits catalogues of ML-100K size
    )
    layers: int = 2  # blocks (ReaRec's code: 2)
    heads: int = 2  # attention heads; must divide hidden (ReaRec's code: 2)
    ffn: int = 128  # inner width of the feed-forward part (ReaRec's code: 300 at hidden=256)
    dropout: float = 0.2  # probability on hidden activations; attention weights are never dropped
    max_length: int = 50  # items of history that are read, the last ones (ReaRec, section 4.1: 50)

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise ConfigError(f"backbone.{field.name} is {value}; it must be at least 1.")
        if self.hidden % self.heads:
            fit = [h for h in range(1, self.hidden + 1) if self.hidden % h == 0]
            raise ConfigError(
                f"backbone.heads={self.heads} does not divide backbone.hidden={self.hidden}.",
                f"The nearest that does: backbone.heads={min(fit, key=lambda h: abs(h - self.heads))}",
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"backbone.dropout is {self.dropout}; it must lie in [0, 1).")


@dataclass
class SasrecConfig(EncoderConfig):
    """Of ``reason.backbones.encoder.SequenceEncoder``."""

    name: str = "sasrec"  # causal: an item sees those before it (Kang and McAuley, arXiv 1808.09781)
    text: Literal["none", "tfidf", "minilm"] = (
        "none"  # frozen vectors of the item texts, added to the item table
    )
    text_dim: int = 64  # components kept of the text vectors, when text is not none


@dataclass
class Bert4recConfig(SasrecConfig):
    """Of ``reason.backbones.bidirectional.Bert4Rec``. The keys are those of sasrec."""

    name: str = "bert4rec"  # bidirectional: an item sees the whole prefix (Sun et al., arXiv 1904.06690)


@dataclass
class UnisrecConfig(EncoderConfig):
    """Of ``reason.backbones.adaptor.UniSRec``."""

    name: str = "unisrec"  # item vectors made from texts (Hou et al., arXiv 2206.05941)
    text: Literal["tfidf", "minilm"] = "tfidf"  # frozen vectors of the item texts; tfidf fetches nothing
    text_dim: int = 64  # components kept of the text vectors (ReaRec: 768 of a large language model)
    experts: int = 8  # parametric whitenings that a gate mixes, at least 2 (UniSRec's code: 8)
    ids: bool = False  # add an item table too, UniSRec's transductive setting; ReaRec does not say which

    def __post_init__(self):
        super().__post_init__()
        if self.experts < 2:
            raise ConfigError(
                f"backbone.experts is {self.experts}; a gate needs at least 2 to choose from.",
                "UniSRec uses backbone.experts=8.",
            )
