"""An encoder that knows items by their texts: UniSRec's adaptor in front of the causal encoder.

Hou et al., "Towards Universal Sequence Representation Learning for Recommender Systems", KDD 2022,
arXiv 2206.05941, and the authors' code (3359a72) where the text leaves a choice.

Two things differ. The frozen vectors are whitened before anything is learned: their components are those
of a PCA, whose variances span orders of magnitude, and the learned whitening of the experts, a shift and a
matrix, would first have to undo that. And there is no pre-training on other domains: adaptor and encoder
are trained together on the data at hand.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reason.backbones.config import UnisrecConfig
from reason.backbones.encoder import SequenceEncoder
from reason.errors import ConfigError

LEAST = 1e-6  # variance of a component, as a share of the largest, below which it is rounding or chance
NOISE = 0.01  # least standard deviation of the gate's noise while training, as in the authors' code


def whiten(text: Tensor) -> Tensor:
    """Zero mean and unit covariance over the items that have a text: (N, m) -> (N, m), main axis first.

    Components that hardly vary are left out; the columns that this frees at the end are zeros. An item
    without text (a zero vector) stays at zero, which now is the mean of the others: where nothing is known
    of an item it counts as an average one.

    Raises:
        ConfigError: the texts do not tell items apart.
    """
    known = text.any(1)
    x = text[known].double()
    x = x - x.mean(0) if len(x) else x
    variance, axes = torch.linalg.eigh(x.T @ x / max(len(x), 1))
    variance, axes = variance.flip(0), axes.flip(1)
    if variance[0] <= LEAST:  # of unit vectors; all texts are one and the same, or none has a known word
        raise ConfigError(
            "The texts of the items do not tell them apart, so there is nothing to make item vectors of.",
            "Set dataset.text to the columns that describe an item, or use backbone=sasrec.",
        )
    kept = variance > LEAST * variance[0]
    axes = axes[:, kept]
    heaviest = axes.gather(0, axes.abs().argmax(0, keepdim=True))  # (1, kept)
    axes = axes * heaviest.sign()  # an axis has no direction of its own: one that all machines agree on
    white = torch.zeros_like(text)
    white[known, : axes.shape[1]] = (x @ axes * variance[kept].rsqrt()).to(text.dtype)
    return white


class TextTable(nn.Module):
    """Vectors of all items, made from frozen text vectors x by a mixture of E experts:

        v = sum over e of g_e * (drop(x) - b_e) W_e,    g = softmax(x G + noise)

    The noise is normal with the learned deviation softplus(x S) + ``NOISE``, drawn while training only.
    With ``ids`` a learned vector of the item itself is added. In the end all are brought to the length
    1/sqrt(d): see ``UniSRec``.

    Args:
        text: (N, m). width: d. experts: E, at least 2. dropout: probability on components of x.
    """

    text: Tensor

    def __init__(self, text: Tensor, width: int, experts: int, ids: bool, dropout: float):
        super().__init__()
        self.embedding_dim = width
        m = text.shape[1]
        self.register_buffer("text", whiten(text))
        self.gate = nn.Linear(m, experts, bias=False)  # G
        self.spread = nn.Linear(m, experts, bias=False)  # S
        self.shift = nn.Parameter(torch.zeros(experts, m))  # b
        self.weight = nn.Parameter(torch.empty(experts, m, width).normal_(std=0.02))  # W
        self.drop = nn.Dropout(dropout)
        self.ids = nn.Embedding(len(text), width) if ids else None

    def gates(self) -> Tensor:
        """(N, E): each expert's share in each item; rows sum to 1."""
        score = self.gate(self.text)
        if self.training:
            score = score + torch.randn_like(score) * (F.softplus(self.spread(self.text)) + NOISE)
        return score.softmax(-1)

    def forward(self) -> Tensor:
        """(N, d)."""
        offset = torch.einsum("em,emd->ed", self.shift, self.weight)
        said = torch.einsum("nm,emd->ned", self.drop(self.text), self.weight) - offset  # by each expert
        vectors = torch.einsum("ne,ned->nd", self.gates(), said)
        vectors = vectors if self.ids is None else vectors + self.ids.weight
        # Not F.normalize: an item without text begins at zero, where that has a gradient without bound.
        return F.rms_norm(vectors, vectors.shape[1:], eps=1e-6) / self.embedding_dim


class UniSRec(SequenceEncoder):
    """``SequenceEncoder`` whose ``table`` is made from texts. See the module.

    The vectors that go in are those that are scored. While training they carry the noise of one draw, so
    a loss computes them once (``item_vectors``) and passes them on to ``reason``; for answering they are
    computed once and kept.

    UniSRec scores by cosine, over a temperature of 0.07. Whoever reads this encoder takes the dot product
    with a state, and states come out of a LayerNorm with a length near sqrt(d): with item vectors of length
    1/sqrt(d) that is the cosine, up to the LayerNorm's gain, which is learned.

    Args:
        text: (N, m) frozen text vectors; see ``whiten`` for items without one.

    Raises:
        ConfigError: sizes that do not fit, or texts that do not tell items apart.
    """

    def __init__(self, config: UnisrecConfig, *, num_items: int, steps: int, text: Tensor):
        assert len(text) == num_items, f"{len(text)} text vectors for {num_items} items"
        table = TextTable(text, config.hidden, config.experts, config.ids, config.dropout)
        super().__init__(config, num_items=num_items, steps=steps, table=table)

    def item_vectors(self) -> Tensor:
        return cast(TextTable, self.table)()
