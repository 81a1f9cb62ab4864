"""The settings of the backbones, as plain dataclasses: importing this imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from reason.backbones.shape import Shape
from reason.backbones.sharing import Scheme
from reason.backbones.source import settle
from reason.errors import ConfigError
from reason.keys import key

NAME = "name of the backbone"


def _sizes(config: Any) -> None:
    """Refuse a whole number below 1: each is a size."""
    for f in fields(config):
        value = getattr(config, f.name)
        if type(value) is int and value < 1:
            raise ConfigError(f"backbone.{f.name} is {value}; it must be at least 1.")


def _divides(config: Any, part: str, whole: str) -> None:
    """Refuse a ``part`` that does not divide ``whole``, naming the nearest that does."""
    n, of = getattr(config, part), getattr(config, whole)
    if of % n:
        fit = min((k for k in range(1, of + 1) if of % k == 0), key=lambda k: abs(k - n))
        raise ConfigError(
            f"backbone.{part}={n} does not divide backbone.{whole}={of}.",
            f"The nearest that does: backbone.{part}={fit}",
        )


@dataclass
class EncoderConfig:
    """Sizes that every sequence encoder has. A whole number in it is a size and at least 1."""

    name: str = key("", NAME)
    hidden: int = key(64, "width d of states and item embeddings (ReaRec: 256; 64 suits small catalogs)")
    layers: int = key(2, "transformer layers (ReaRec's code: 2)")
    heads: int = key(2, "attention heads; must divide hidden (ReaRec's code: 2)")
    ffn: int = key(128, "inner width of the feed-forward network (ReaRec's code: 300 with hidden=256)")
    dropout: float = key(0.2, "dropout probability of hidden activations; attention weights have no dropout")
    max_length: int = key(50, "number of most recent items of the history to read (ReaRec, section 4.1: 50)")

    def __post_init__(self):
        _sizes(self)
        _divides(self, "heads", "hidden")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"backbone.dropout is {self.dropout}; it must lie in [0, 1).")


@dataclass
class SasrecConfig(EncoderConfig):
    """Of ``reason.backbones.encoder.SequenceEncoder``."""

    name: str = key("sasrec", f"{NAME}; sasrec attends to earlier items only (arXiv 1808.09781)")
    text: Literal["none", "tfidf", "minilm"] = key("none", "frozen text vectors added to the item embeddings")
    text_dim: int = key(64, "dimensions that the text vectors are reduced to; unused with text=none")


@dataclass
class Bert4recConfig(SasrecConfig):
    """Of ``reason.backbones.bidirectional.Bert4Rec``. The keys are those of sasrec."""

    name: str = key("bert4rec", f"{NAME}; bert4rec attends in both directions (arXiv 1904.06690)")


@dataclass
class UnisrecConfig(EncoderConfig):
    """Of ``reason.backbones.adaptor.UniSRec``."""

    name: str = key("unisrec", f"{NAME}; unisrec embeds items by their texts (arXiv 2206.05941)")
    text: Literal["tfidf", "minilm"] = key("tfidf", "frozen vectors of item texts; tfidf needs no download")
    text_dim: int = key(64, "dimensions of the reduced text vectors (ReaRec: 768, by a language model)")
    experts: int = key(8, "parametric whitening experts that a gate mixes, at least 2 (UniSRec's code: 8)")
    ids: bool = key(False, "add item embeddings: UniSRec's transductive setting (ReaRec does not say)")

    def __post_init__(self):
        super().__post_init__()
        if self.experts < 2:
            raise ConfigError(
                f"backbone.experts is {self.experts}; a gate needs at least 2 to choose from.",
                "UniSRec uses backbone.experts=8.",
            )


@dataclass
class DecoderConfig:
    """Sizes that every language model from scratch has. With a source, its sizes, its tokenizer and whether its
    embedding is tied are its own, and the keys that say so here go unread."""

    name: str = key("", NAME)
    source: str = key(
        "", "initial weights: folder, .gguf, hub id, run:NAME or smollm2-135m; empty = random", path="settled"
    )
    hidden: int = key(192, "width D of the residual stream")
    heads: int = key(6, "query heads; hidden divided by heads must be an even whole number")
    kv_heads: int = key(2, "key and value heads (grouped-query attention); must divide heads")
    ffn: int = key(512, "inner width F of the SwiGLU feed-forward network")
    layers: int = key(8, "layers that a token passes through")
    context: int = key(256, "context length in training, in tokens")
    rope_theta: float = key(10000.0, "base of the rotary position embedding frequencies")
    tied: bool = key(True, "use the token embedding as the output layer too")
    init_std: float = key(0.02, "standard deviation of the weights at initialization (reference code)")
    tokenizer: Literal["auto", "bpe", "byte", "word"] = key("auto", "auto = bpe; word for data that need it")
    vocab: int = key(4096, "maximum vocabulary size of a trained tokenizer; byte always has 257 tokens")

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
        _divides(self, "kv_heads", "heads")
        for name in ("rope_theta", "init_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"backbone.{name} is {getattr(self, name)}; it must be above 0 and finite.")
        if self.vocab < 257 and self.tokenizer in ("auto", "bpe"):
            raise ConfigError(
                f"backbone.vocab={self.vocab} is too few: 256 bytes and the end of a document are 257 tokens.",
                "Use backbone.vocab=257 or more, or backbone.tokenizer=word for data made of few symbols.",
            )


@dataclass
class RecursiveConfig(DecoderConfig):
    """Of ``reason.backbones.decoder.RecursiveDecoder``."""

    name: str = key(
        "recursive", f"{NAME}; recursive applies a block of Llama-style layers repeatedly (arXiv 2507.10524)"
    )
    layers: int = key(8, "layers that a token passes through when it takes every recursion")
    sharing: Scheme = key("middle_cycle", "which layers share their weights (arXiv 2507.10524, table 5)")

    def shape(self, vocab: int) -> Shape:
        """The sizes of a network from scratch whose tokenizer has ``vocab`` tokens."""
        return Shape(
            vocab=vocab, hidden=self.hidden, layers=self.layers, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads, ffn=self.ffn, tied=self.tied, rope_theta=self.rope_theta,
        )  # fmt: skip


@dataclass
class CausalConfig(DecoderConfig):
    """Of ``reason.backbones.causal.Causal``. The context of a model with a source is its own too."""

    name: str = key("causal", f"{NAME}; causal is a language model of transformers, unmodified")
    hidden: int = key(128, "width D of the residual stream")
    heads: int = key(4, "query heads; hidden divided by heads must be an even whole number")
    ffn: int = key(352, "inner width F of the SwiGLU feed-forward network")
    layers: int = key(4, "layers that a token passes through")
    context: int = key(256, "tokens that a text can have, its prompt among them")
    dtype: Literal["float32", "bfloat16"] = key("float32", "number format of the weights")
