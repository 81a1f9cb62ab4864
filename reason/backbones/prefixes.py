"""Every prefix of a batch of histories as a row of its own: the plain way to the states of all of them.

Where items see later items, each prefix has item states of its own and nothing can be shared between
prefixes: this is how such an encoder trains. A causal encoder gives the same numbers here as over a trie
(``SequenceEncoder.reason``), only later.

A window of T items costs T(T + 1)/2 item tokens instead of T. Two things keep that in bounds:

- Only real prefixes become rows, and rows of like length run together, in ``GROUPS`` widths at most: about
  a tenth of the tokens is padding.
- The backward pass needs the activations of every token: in each block some 25 d floats. They are held for
  ``HELD`` tokens (0.6 GB at d = 64 and two blocks); what goes beyond is computed anew in the backward pass,
  ``ROOM`` tokens at a time. So memory hardly grows with the batch, and only what is beyond pays for it, with
  one more forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder

GROUPS = 8  # widths that rows are padded to
ROOM = 2**13  # item tokens that run together, padding included
HELD = 2**16  # item tokens whose activations wait for the backward pass


def reason_by_prefix(
    model: SequenceEncoder,
    items: Tensor,
    steps: int,
    noise: Tensor | None = None,
    vectors: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As ``SequenceEncoder.reason``, prefix by prefix. States at padded places are zeros."""
    vectors = model.item_vectors() if vectors is None else vectors

    def run(rows: Tensor, length: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        """(R, n) prefixes -> (R, steps + 1, d) and, with noise (steps, R, d), (R, steps, d)."""
        trunk = model.encode_last(rows, length, vectors)
        clean, noisy = model.think(trunk, steps, noise, partial(row_attention, hidden=trunk.hidden))
        return (clean,) if noisy is None else (clean, noisy)

    width, tokens = items.shape[1], 0
    places, found = [], []
    for place, longest in _alike(items, model.num_items):
        length = place % width + 1
        padding = torch.arange(longest, device=items.device) >= length[:, None]
        rows = items[place // width, :longest].masked_fill(padding, model.num_items)  # (R, n)
        loud = None if noise is None else noise.flatten(1, 2)[:, place]
        tokens += rows.numel()
        if tokens > HELD and torch.is_grad_enabled():
            found.append(checkpoint(run, rows, length, loud, use_reentrant=False))
        else:
            found.append(run(rows, length, loud))
        places.append(place)
    where = torch.cat(places)

    def together(parts: Sequence[Tensor]) -> Tensor:
        """(R, k, d) of each part -> (B, T, k, d)."""
        states = torch.cat(list(parts))
        whole = states.new_zeros(items.numel(), *states.shape[1:])
        return whole.index_copy(0, where, states).unflatten(0, items.shape)

    clean, *noisy = map(together, zip(*found, strict=True))
    return clean, noisy[0] if noisy else None


def _alike(items: Tensor, pad: int) -> Iterator[tuple[Tensor, int]]:
    """The real prefixes in parts of like length: places b * T + t, (R,), and what none of them is longer than."""
    width = items.shape[1]
    place = (items != pad).flatten().nonzero().squeeze(1)
    span = -(-width // GROUPS)
    for least in range(0, width, span):
        longest = min(least + span, width)
        chosen = (place % width >= least) & (place % width < longest)
        for part in place[chosen].split(max(1, ROOM // longest)):
            if len(part):
                yield part, longest


def row_attention(
    query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, *, hidden: Tensor | None
) -> Tensor:
    """The newest latent token of each row sees the row's items and the latent tokens up to itself.

    query: (R, H, G, D), G tokens that do not see each other; key, value: (R, H, n, D);
    own_key, own_value: (R, H, G, J, D); hidden: (R, 1, 1, n), -inf on padding, or None. Returns (R, H, G, D).
    """
    query = query * query.shape[-1] ** -0.5
    score = query @ key.transpose(-1, -2)  # (R, H, G, n)
    if hidden is not None:
        score = score + hidden
    own = (own_key @ query.unsqueeze(-1)).squeeze(-1)  # (R, H, G, J)
    share = torch.cat([score, own], -1).softmax(-1)
    apart = share[..., key.shape[2] :].unsqueeze(-2) @ own_value  # (R, H, G, 1, D)
    return share[..., : key.shape[2]] @ value + apart.squeeze(-2)
