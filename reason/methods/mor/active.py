"""The active tokens of a recursion, packed: sequence after sequence, each in the order of its text.

A batch of B sequences of T positions is one row of B T flat positions b T + t. Products over tokens
need nothing else; only attention has to know where a sequence begins.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from reason.backbones.decoder import causal


class ActiveTokens:
    """n tokens of a batch of B sequences of T positions.

    index: (n,) int64 flat positions, ascending.
    per_sequence: number of active tokens of every sequence, where all have the same; None where they differ.
    lengths: (B,) tokens of each sequence before any exited; None: all T.
    """

    def __init__(
        self,
        index: Tensor,
        batch: int,
        length: int,
        per_sequence: int | None = None,
        lengths: Tensor | None = None,
    ):
        self.index, self.batch, self.length = index, batch, length
        self.per_sequence, self.lengths = per_sequence, lengths
        self._position: Tensor | None = None

    @classmethod
    def all_of(cls, tokens: Tensor, lengths: Tensor | None = None) -> ActiveTokens:
        """All positions of tokens (B, T), or the first ``lengths`` (B,) of sequences that are padded on the right."""
        batch, length = tokens.shape
        index = torch.arange(batch * length, device=tokens.device)
        if lengths is None or bool((lengths == length).all()):
            return cls(index, batch, length, length)
        real = (index % length) < lengths[index // length]
        return cls(index[real], batch, length, lengths=lengths)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def position(self) -> Tensor:
        """(n,) position of each token in its sequence: what rotary embeddings and causal masks go by."""
        # By hand: a compiler stops at the lock that Python 3.11 puts around cached properties.
        if self._position is None:
            self._position = self.index % self.length
        return self._position

    @cached_property
    def row(self) -> Tensor:
        """(n,) the sequence of each token."""
        return self.index // self.length

    @cached_property
    def counts(self) -> Tensor:
        """(B,) active tokens of each sequence."""
        return torch.bincount(self.row, minlength=self.batch)

    def select(self, chosen: Tensor, per_sequence: int | None = None) -> ActiveTokens:
        """A subset. chosen: (m,) int64 indices into these n tokens, ascending."""
        return ActiveTokens(
            self.index.index_select(0, chosen), self.batch, self.length, per_sequence, self.lengths
        )

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """(B, k) indices of each sequence's tokens, padded on the right, and the (B, k) bool mask of real ones."""
        k = int(self.counts.max()) if len(self) else 0
        column = torch.arange(k, device=self.index.device)
        mask = column < self.counts[:, None]
        index = (self.counts.cumsum(0) - self.counts)[:, None] + column
        return index.clamp_max(max(len(self) - 1, 0)), mask

    def attend_active(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention among the active tokens alone.

        q: (n, h, d_h); k, v: (n, h_kv, d_h) -> (n, h, d_h). Padding stands on the right, where causality
        hides it from every real token.
        """
        if self.per_sequence is not None:
            q, k, v = (x.unflatten(0, (self.batch, self.per_sequence)) for x in (q, k, v))
            return causal(q, k, v).flatten(0, 1)
        if not len(self):
            return q
        index, mask = self.padded
        return causal(q[index], k[index], v[index])[mask]

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of the active tokens to all tokens of their sequences, active or not.

        q: (n, h, d_h); k, v: (B, T, h_kv, d_h) -> (n, h, d_h).
        """
        if not len(self):
            return q
        if self.per_sequence is not None:
            q = q.unflatten(0, (self.batch, self.per_sequence))
            position = self.position.view(self.batch, self.per_sequence)
        else:
            index, _ = self.padded
            q, position = q[index], self.position[index]
        mask = torch.arange(self.length, device=q.device) <= position[:, None, :, None]  # (B, 1, k, T)
        grouped = q.shape[-2] != k.shape[-2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)
        return mixed.flatten(0, 1) if self.per_sequence is not None else mixed[self.padded[1]]
