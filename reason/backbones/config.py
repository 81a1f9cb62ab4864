"""The settings of the backbones, as plain dataclasses: importing this imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from reason.backbones.shape import Shape
from reason.backbones.sharing import Scheme
from reason.backbones.source import settle
from reason.errors import ConfigError


def _sizes(config: Any) -> None:
    """Refuse a whole number below 1: each is a size."""
    for f in fields(config):
        value = getattr(config, f.name)
        if type(value) is int and value < 1:
            raise ConfigError(f"backbone.{f.name} is {value}; it must be at least 1.")


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
        _sizes(self)
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


@dataclass
class RecursiveConfig:
    """Of ``reason.backbones.decoder.RecursiveDecoder``. With a source, its sizes, its tokenizer and whether its
    embedding is tied are its own, and the keys that say so here go unread."""

    name: str = "recursive"  # a block of Llama-style layers, applied again and again (Bae, arXiv 2507.10524)
    source: str = field(
        default="", metadata={"path": "settled"}
    )  # weights to begin with: a folder, .gguf file, hub id, run:NAME or smollm2-135m; "" = from scratch
    hidden: int = 192  # width D of the residual stream
    heads: int = 6  # query heads h; they cut hidden into pieces of even width
    kv_heads: int = 2  # key and value heads h_kv; must divide heads (grouped-query attention)
    ffn: int = 512  # inner width F of the SwiGLU part
    layers: int = 8  # L, layers that a token runs through when it takes every recursion
    sharing: Scheme = "middle_cycle"  # which of them are one and the same (paper, table 5)
    context: int = 256  # tokens that a training window holds
    rope_theta: float = 10000.0  # base of the rotary frequencies
    tied: bool = True  # the embedding is the output head too
    init_std: float = 0.02  # standard deviation of weights at the start (reference code)
    tokenizer: Literal["auto", "bpe", "byte", "word"] = "auto"  # auto: word where the data says so, else bpe
    vocab: int = 4096  # tokens at most that a tokenizer is trained to; byte has 257, whatever stands here

    def __post_init__(self):
        self.source = settle(self.source)
        _sizes(self)
        if self.hidden % (2 * self.heads):
            fit = [h for h in range(1, self.hidden // 2 + 1) if self.hidden % (2 * h) == 0]
            raise ConfigError(
                f"backbone.heads={self.heads} does not cut backbone.hidden={self.hidden} into pieces of "
                "even width, which rotary positions need.",
                f"The nearest that does: backbone.heads={min(fit, key=lambda h: abs(h - self.heads))}"
                if fit
                else f"Use an even width: backbone.hidden={self.hidden + 1}",
            )
        if self.heads % self.kv_heads:
            fit = [h for h in range(1, self.heads + 1) if self.heads % h == 0]
            raise ConfigError(
                f"backbone.kv_heads={self.kv_heads} does not divide backbone.heads={self.heads}.",
                f"The nearest that does: backbone.kv_heads={min(fit, key=lambda h: abs(h - self.kv_heads))}",
            )
        for key in ("rope_theta", "init_std"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ConfigError(f"backbone.{key} is {getattr(self, key)}; it must be above 0 and finite.")
        if self.vocab < 257 and self.tokenizer in ("auto", "bpe"):
            raise ConfigError(
                f"backbone.vocab={self.vocab} is too few: 256 bytes and the end of a document are 257 tokens.",
                "Use backbone.vocab=257 or more, or backbone.tokenizer=word for data made of few symbols.",
            )

    def shape(self, vocab: int) -> Shape:
        """The sizes of a network from scratch whose tokenizer has ``vocab`` tokens."""
        return Shape(
            vocab=vocab, hidden=self.hidden, layers=self.layers, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads, ffn=self.ffn, tied=self.tied, rope_theta=self.rope_theta,
        )  # fmt: skip
