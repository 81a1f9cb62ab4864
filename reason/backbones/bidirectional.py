"""An encoder whose items see each other both ways: BERT4Rec as ReaRec reasons on it.

Sun et al., "BERT4Rec", arXiv 1904.06690, gives the attention; Tang et al., arXiv 2503.22675, the "prefix
masking": all items of a prefix see each other, a latent token sees all of them and the latent tokens before
it, and no item sees a latent token. So what is cached of the items stays valid while the encoder reasons,
and answering (``start``, ``advance``) is that of the causal encoder.

Training is not. The state of an item depends on how long the prefix is, so prefixes share nothing and each
is a row of its own (``reason.backbones.prefixes``). It is trained on the next item like the others, without
masked items: the state of the last item answers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from reason.backbones.encoder import SequenceEncoder, Trunk
from reason.backbones.prefixes import reason_by_prefix


class Bert4Rec(SequenceEncoder):
    """``SequenceEncoder`` with bidirectional items. See the module."""

    def encode(self, items: Tensor, vectors: Tensor | None = None) -> Trunk:
        raise TypeError("Prefixes share no trunk where items see later ones: use `reason` or `encode_last`.")

    def reason(
        self,
        items: Tensor,
        steps: int | None = None,
        noise: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        steps = self.steps if steps is None else steps
        self._check(steps)
        return reason_by_prefix(self, items, steps, noise, vectors)

    def _among_items(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=hidden)

    def _pairs(self, n: Tensor) -> Tensor:
        return n * n
