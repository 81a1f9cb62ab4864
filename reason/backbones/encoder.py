"""A causal encoder of item sequences that can go on reasoning after the last item.

The network is SASRec's with post-norm blocks, as ReaRec uses it (Tang et al., "Think Before
Recommend", arXiv 2503.22675, section 3; reference code 7f46432). A *latent step* feeds the state that
answers back as one more token, with a position vector of its own and the same weights.

It runs in two ways that give the same numbers:

- **over a trie** (training): the items of a history are one trunk, and every prefix of it grows its own
  branch of latent tokens. The trunk is encoded once for all prefixes (``encode``, ``reason``).
- **with a cache** (answering): one prefix per request; each step is one query row against the keys and
  values kept of the items and of the earlier steps (``start``, ``advance``).

Sequences are padded on the RIGHT. A causal query never looks to its right, so padding cannot leak into
any state that is read, and no mask is needed in the trunk.

The encoder knows nothing of losses, of readouts, or of when to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reason.backbones.attention import comb_attention
from reason.errors import ConfigError

if TYPE_CHECKING:
    from reason.backbones.config import SasrecConfig

EPS = 1e-12  # of every LayerNorm, as in the reference


class Block(nn.Module):
    """A post-norm block: ``a = LN(x + drop(attention(x)))``, ``y = LN(a + drop(down(gelu(up(a)))))``.

    Split around the attention so that the caller decides who sees whom.
    """

    def __init__(self, hidden: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(hidden, 3 * hidden)  # query, key, value
        self.out = nn.Linear(hidden, hidden)
        self.norm_attention = nn.LayerNorm(hidden, eps=EPS)
        self.up = nn.Linear(hidden, ffn)
        self.down = nn.Linear(ffn, hidden)
        self.norm_feed = nn.LayerNorm(hidden, eps=EPS)
        self.drop = nn.Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        """(B, ..., T, d) -> (B, H, ..., T, d/H), a view."""
        return x.unflatten(-1, (self.heads, -1)).movedim(-2, 1)

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, ..., T, d) -> three times (B, H, ..., T, d/H)."""
        query, key, value = self.project(x).chunk(3, dim=-1)
        return self.split(query), self.split(key), self.split(value)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As ``query_key_value`` where no query is asked for."""
        d = x.shape[-1]
        key, value = F.linear(x, self.project.weight[d:], self.project.bias[d:]).chunk(2, dim=-1)
        return self.split(key), self.split(value)

    def query(self, x: Tensor) -> Tensor:
        d = x.shape[-1]
        return self.split(F.linear(x, self.project.weight[:d], self.project.bias[:d]))

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the block. x: (B, ..., T, d); mixed: (B, H, ..., T, d/H), the attention's output."""
        mixed = mixed.movedim(1, -2).flatten(-2)
        x = self.norm_attention(x + self.drop(self.out(mixed)))
        return self.norm_feed(x + self.drop(self.down(F.gelu(self.up(x)))))


@dataclass
class Trunk:
    """The encoded items of a batch of histories."""

    states: Tensor  # (B, T, d), r_0 of every prefix
    keys: list[Tensor]  # per layer (B, H, T, d/H)
    values: list[Tensor]


@dataclass
class Thought:
    """One request per row, in the midst of reasoning. ``advance`` writes into it.

    The keys and values of the items are kept as the projection left them, without a copy; those of
    the latent tokens go to a small cache of their own.
    """

    state: Tensor  # (B, d), r_k
    items: list[tuple[Tensor, Tensor]]  # per layer: keys and values (B, H, T, d/H), views
    latent: list[tuple[Tensor, Tensor]]  # per layer: keys and values (B, H, K, d/H), filled up to k
    hidden: Tensor | None  # (B, 1, 1, T), -inf on padding and else 0; None where there is no padding
    step: int = 0  # k, steps taken


class SequenceEncoder(nn.Module):
    """SASRec with tied scoring and ``steps`` latent steps.

    Args:
        config: see ``SasrecConfig``.
        num_items: N. Items are 0..N-1; PAD is N, the last row of the table. PAD has a vector only so
            that padded positions can be looked up: nothing that is read depends on it and it is no
            candidate, in training or after.
        steps: K, the latent steps there are position vectors for. 0 is the plain encoder.
        text: (N, m) frozen text vectors or None. With them the vector of item i is
            ``table[i] + text_map @ text[i]``, as input and for scoring alike; ``text_map`` is learned,
            without bias (a bias would move all scores of a state by the same amount).

    Raises:
        ConfigError: sizes that do not fit.
    """

    text: Tensor | None

    def __init__(self, config: SasrecConfig, *, num_items: int, steps: int, text: Tensor | None = None):
        super().__init__()
        d = config.hidden
        assert num_items >= 1 and steps >= 0, f"{num_items} items, {steps} steps"
        if text is not None and len(text) != num_items:
            raise ConfigError(f"There are {len(text)} text vectors for {num_items} items.")
        self.num_items, self.steps, self.max_length = num_items, steps, config.max_length
        self.table = nn.Embedding(num_items + 1, d)
        self.position = nn.Embedding(config.max_length, d)
        self.norm = nn.LayerNorm(d, eps=EPS)
        self.drop = nn.Dropout(config.dropout)
        blocks = [Block(d, config.heads, config.ffn, config.dropout) for _ in range(config.layers)]
        self.blocks = cast(Sequence[Block], nn.ModuleList(blocks))
        self.register_buffer("text", text)
        if text is not None:
            self.text_map = nn.Linear(text.shape[1], d, bias=False)
        if steps:  # at K = 0 there is no such parameter, for it would never be reached
            self.step_position = nn.Parameter(torch.empty(steps, d))  # P_R in the paper
        self.apply(_initialise)
        if steps:
            nn.init.normal_(self.step_position, std=0.02)

    # --- items ---------------------------------------------------------------------------------

    def item_vectors(self) -> Tensor:
        """(N, d): what items look like as input and as answers."""
        vectors = self.table.weight[: self.num_items]
        return vectors if self.text is None else vectors + self.text_map(self.text)

    def _embed(self, items: Tensor) -> Tensor:
        """(B, T) items -> (B, T, d) input of the first block."""
        if items.shape[1] > self.max_length:
            raise ValueError(
                f"{items.shape[1]} items exceed max_length={self.max_length}; pass the last ones."
            )
        x = self.table(items)
        if self.text is not None:
            known = F.pad(self.text, (0, 0, 0, 1))  # PAD has no text
            x = x + self.text_map(F.embedding(items, known))
        return self.drop(self.norm(x + self.position.weight[: items.shape[1]]))

    # --- over a trie: all prefixes at once ----------------------------------------------------------

    def encode(self, items: Tensor) -> Trunk:
        """Encode histories (B, T), padded on the right with PAD. State t answers the prefix 0..t."""
        x, keys, values = self._embed(items), [], []
        for block in self.blocks:
            query, key, value = block.query_key_value(x)
            x = block.finish(x, F.scaled_dot_product_attention(query, key, value, is_causal=True))
            keys.append(key)
            values.append(value)
        return Trunk(x, keys, values)

    def reason(
        self, items: Tensor, steps: int | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The states of every prefix after every step; differentiable.

        Args:
            items: (B, T), padded on the right.
            steps: how many steps to take; all K if None.
            noise: (steps, B, T, d) or None. With it a second, noisy branch runs along, whose k-th input
                is the CLEAN state of step k-1 plus noise (ReaRec, eq. 13, as the reference code does it);
                noise enters latent tokens only, and both branches share the trunk.

        Returns:
            clean states (B, T, steps + 1, d), and the noisy ones (B, T, steps, d) or None.
        """
        steps = self.steps if steps is None else steps
        self._check(steps)
        trunk = self.encode(items)
        clean, noisy = [trunk.states], []
        branches: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        for k in range(steps):
            x = clean[-1] + self.step_position[k]
            x = torch.stack([x] if noise is None else [x, x + noise[k]], dim=1)  # (B, G, T, d)
            x = self.drop(self.norm(x))
            for layer, block in enumerate(self.blocks):
                query, key, value = block.query_key_value(x)  # (B, H, G, T, d/H)
                key, value = key.unsqueeze(-2), value.unsqueeze(-2)  # (B, H, G, T, 1, d/H)
                if (earlier := branches[layer]) is not None:
                    key, value = torch.cat([earlier[0], key], -2), torch.cat([earlier[1], value], -2)
                branches[layer] = key, value
                mixed = comb_attention(query, trunk.keys[layer], trunk.values[layer], key, value)
                x = block.finish(x, mixed)
            clean.append(x[:, 0])
            if noise is not None:
                noisy.append(x[:, 1])
        return torch.stack(clean, 2), torch.stack(noisy, 2) if noisy else None

    # --- with a cache: one prefix per row -----------------------------------------------------------

    def start(self, items: Tensor, length: Tensor, steps: int | None = None) -> Thought:
        """Encode one prefix per row and make room for ``steps`` latent tokens.

        Only what later steps or the answer read is computed: in the last block the keys and values of
        all items, but the query and everything after it for the last item alone.

        Args:
            items: (B, T), padded on the right.
            length: (B,) number of items in each row, at least 1.
        """
        steps = self.steps if steps is None else steps
        self._check(steps)
        batch, width = items.shape
        if bool((length < 1).any()) or bool((length > width).any()):
            raise ValueError(
                "Each row needs between 1 and T items; an empty history has no last item to read."
            )
        x, kept = self._embed(items), []
        for block in self.blocks[:-1]:
            query, key, value = block.query_key_value(x)
            x = block.finish(x, F.scaled_dot_product_attention(query, key, value, is_causal=True))
            kept.append((key, value))
        last = self.blocks[-1]
        key, value = last.key_value(x)
        kept.append((key, value))
        hidden = None
        if bool((length < width).any()):
            padding = torch.arange(width, device=items.device) >= length[:, None]  # (B, T)
            hidden = torch.zeros_like(padding, dtype=key.dtype).masked_fill(padding, -torch.inf)[
                :, None, None
            ]
        x = x[torch.arange(batch, device=items.device), length - 1].unsqueeze(1)  # (B, 1, d)
        x = last.finish(x, F.scaled_dot_product_attention(last.query(x), key, value, attn_mask=hidden))
        room = (batch, key.shape[1], steps, key.shape[3])
        latent = [(key.new_empty(room), key.new_empty(room)) for _ in self.blocks]
        return Thought(x[:, 0], kept, latent, hidden)

    def advance(self, thought: Thought, weights: list[Tensor] | None = None) -> Tensor:
        """Take one latent step and return the new state (B, d). Not differentiable: caches are written.

        Args:
            weights: a list to which each layer's attention (B, H, T + k) over items and latent tokens,
                this one included, is appended.
        """
        k = thought.step
        self._check(k + 1)
        x = self.drop(self.norm(thought.state + self.step_position[k])).unsqueeze(1)  # (B, 1, d)
        for block, items, (keys, values) in zip(self.blocks, thought.items, thought.latent, strict=True):
            query, keys[:, :, k : k + 1], values[:, :, k : k + 1] = block.query_key_value(x)
            mixed, share = _attend(query, *items, keys[:, :, : k + 1], values[:, :, : k + 1], thought.hidden)
            x = block.finish(x, mixed)
            if weights is not None:
                weights.append(share.squeeze(2))
        thought.state, thought.step = x[:, 0], k + 1
        return thought.state

    def _check(self, steps: int) -> None:
        if not 0 <= steps <= self.steps:
            raise ValueError(f"{steps} latent steps asked of an encoder that was trained for {self.steps}.")

    # --- what it costs ------------------------------------------------------------------------------

    def flops(self, length: Tensor, steps: int) -> Tensor:
        """Floating-point operations (multiply-adds x 2) of ``start``, ``steps`` x ``advance`` and one
        scoring of the catalogue, for histories of ``length`` (n,) items without padding; (n,) float64."""
        n = length.double()
        d, f, layers = self.table.embedding_dim, self.blocks[0].up.out_features, len(self.blocks)
        row = 4 * d * d + 2 * d * f  # projections and feed-forward of one token in one block
        whole = n * row + n * (n + 1) * d  # a block over all items; a causal row t mixes t + 1 values
        last = n * 2 * d * d + 2 * d * d + 2 * d * f + 2 * n * d
        latent = sum(layers * (row + 2 * (n + k) * d) for k in range(1, steps + 1))
        return 2 * ((layers - 1) * whole + last + latent + self.num_items * d)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One query row (B, H, 1, d/H) over T items and k latent tokens, which lie in different memory.

    At 64 requests the keys and values of the items are megabytes: to move them next to those of the
    latent tokens, as a fused kernel wants it, costs more than the attention itself.

    Returns the mixture (B, H, 1, d/H) and the weights (B, H, 1, T + k).
    """
    width = key.shape[2]
    query = query * query.shape[-1] ** -0.5
    score = _product(query, key.transpose(-1, -2))
    if hidden is not None:
        score = score + hidden
    share = torch.cat([score, query @ own_key.transpose(-1, -2)], -1).softmax(-1)
    mixed = _product(share[..., :width], value) + share[..., width:] @ own_value
    return mixed, share


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b over axes (B, H), without the copy that ``@`` makes of a b in which these two cannot be merged."""
    if len(b) == 1:
        return a @ b
    return torch.stack([torch.bmm(a[:, head], b[:, head]) for head in range(b.shape[1])], 1)


def _initialise(module: nn.Module) -> None:
    """Linear and Embedding N(0, 0.02), biases 0; LayerNorm stays at (1, 0). As in the reference."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
