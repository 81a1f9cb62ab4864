"""The tokens that take a recursion, packed: sequence after sequence, each in the order of its text.

A batch of B sequences of T positions is one row of B T flat positions b T + t. Products over tokens
need nothing else; only attention has to know where a sequence begins.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from reason.backbones.decoder import causal


class Taken:
    """n tokens of a batch of B sequences of T positions.

    index: (n,) int64 flat positions, ascending.
    each: how many tokens every sequence has, where all have the same number; None where they differ.
    real: (B,) tokens of each sequence before anyone left; None: all T.
    """

    def __init__(
        self, index: Tensor, batch: int, length: int, each: int | None = None, real: Tensor | None = None
    ):
        self.index, self.batch, self.length, self.each, self.real = index, batch, length, each, real
        self._position: Tensor | None = None

    @classmethod
    def everything(cls, tokens: Tensor, real: Tensor | None = None) -> Taken:
        """All positions of tokens (B, T); of those, where sequences are padded on the right, the first real (B,)."""
        batch, length = tokens.shape
        index = torch.arange(batch * length, device=tokens.device)
        if real is None or bool((real == length).all()):
            return cls(index, batch, length, length)
        return cls(index[(index % length) < real[index // length]], batch, length, real=real)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def position(self) -> Tensor:
        """(n,) where in its sequence a token stands: what rotary positions and causal masks go by."""
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
        """(B,) tokens of each sequence."""
        return torch.bincount(self.row, minlength=self.batch)

    def pick(self, local: Tensor, each: int | None = None) -> Taken:
        """Those at places ``local`` (m,) int64, ascending."""
        return Taken(self.index.index_select(0, local), self.batch, self.length, each, self.real)

    @cached_property
    def grid(self) -> tuple[Tensor, Tensor]:
        """Places (B, k) of each sequence's tokens side by side, padded on the right, and (B, k) bool where real."""
        k = int(self.counts.max()) if len(self) else 0
        column = torch.arange(k, device=self.index.device)
        real = column < self.counts[:, None]
        place = (self.counts.cumsum(0) - self.counts)[:, None] + column
        return place.clamp_max(max(len(self) - 1, 0)), real

    def look_back(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention among these tokens alone, each seeing itself and those before it in its sequence.

        q: (n, h, d_h); k, v: (n, h_kv, d_h) -> (n, h, d_h). Padding stands on the right, where causality
        hides it from every real token.
        """
        if self.each is not None:
            q, k, v = (x.unflatten(0, (self.batch, self.each)) for x in (q, k, v))
            return causal(q, k, v).flatten(0, 1)
        if not len(self):
            return q
        place, real = self.grid
        return causal(q[place], k[place], v[place])[real]

    def look_at_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of these tokens to all earlier ones of their sequences, whether those took the step or not.

        q: (n, h, d_h); k, v: (B, T, h_kv, d_h) -> (n, h, d_h).
        """
        if not len(self):
            return q
        if self.each is not None:
            q, position = q.unflatten(0, (self.batch, self.each)), self.position.view(self.batch, self.each)
        else:
            place, _ = self.grid
            q, position = q[place], self.position[place]
        sees = torch.arange(self.length, device=q.device) <= position[:, None, :, None]  # (B, 1, k, T)
        grouped = q.shape[-2] != k.shape[-2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=grouped).transpose(1, 2)
        return mixed.flatten(0, 1) if self.each is not None else mixed[self.grid[1]]
