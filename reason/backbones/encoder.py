"""A causal encoder of item sequences that can go on reasoning after the last item.

The network is SASRec's with post-norm blocks, as ReaRec uses it (Tang et al., "Think Before
Recommend", arXiv 2503.22675, section 3; reference code 7f46432). A *latent step* feeds the state that
answers back as one more token, with a position vector of its own and the same weights.

It runs in two ways that give the same numbers:

- **over a trie** (training): the items of a history are one trunk, and every prefix of it grows its own
  branch of latent tokens. The trunk is encoded once for all prefixes (``encode``, ``reason``). Without
  the trie, each prefix is a row of its own (``reason.backbones.prefixes``).
- **with a cache** (answering): one prefix per request; each step is one query row against the keys and
  values kept of the items and of the earlier steps (``start``, ``advance``).

Sequences are padded on the RIGHT. A causal query never looks to its right, so padding cannot leak into
any state that is read, and no mask is needed in the trunk.

The encoder knows nothing of losses, of readouts, or of when to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reason.backbones.attention import comb_attention
from reason.backbones.config import EncoderConfig
from reason.errors import ConfigError

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
    """Encoded items, from which latent steps grow: of a history with all its prefixes, or of one prefix."""

    states: Tensor  # (B, T, d), r_0 of every prefix; or (B, d), r_0 of the one prefix in each row
    items: list[tuple[Tensor, Tensor]]  # per layer: keys and values (B, H, T, d/H), views
    hidden: Tensor | None = None  # of one prefix: (B, 1, 1, T), -inf on padding; None where there is none


@dataclass
class Thought:
    """One request per row, in the midst of reasoning. ``advance`` writes into it.

    The keys and values of the items are kept as the projection left them, without a copy; those of
    the latent tokens go to a small cache of their own.

    A rows go on out of the R whose keys and values are held: a row that leaves (``keep``) costs no more
    projections at once, and no more attention as soon as closing the gaps pays.
    """

    state: Tensor  # (A, d), r_k
    items: list[tuple[Tensor, Tensor]]  # per layer: keys and values (R, H, T, d/H), views
    latent: list[tuple[Tensor, Tensor]]  # per layer: keys and values (R, H, K, d/H), filled up to k
    hidden: Tensor | None  # (R, 1, 1, T), -inf on padding and else 0; None where there is no padding
    step: int = 0  # k, steps taken
    held: Tensor | None = None  # (A,), where the rows that go on lie among those held; None: in order, A = R

    @torch.no_grad()
    def keep(self, rows: Tensor, *, compact: float = 0.75) -> None:
        """Go on with ``rows`` (ascending positions among the A) alone.

        The last rows held move into the places of those that left, so few are moved, and into memory that is
        there already; what a row holds is written over once it is gone.

        compact: the share of held rows at or below which that is done. 1: whenever a row leaves; 0: never.
        """
        self.state = self.state.index_select(0, rows)
        held = rows if self.held is None else self.held.index_select(0, rows)
        count, room = len(held), len(self.latent[0][0])
        if count <= compact * room:
            free = held.new_ones(room, dtype=torch.bool).index_fill_(0, held, False)[:count]
            gaps, late = free.nonzero().squeeze(1), (held >= count).nonzero().squeeze(1)
            moved = held.index_select(0, late)

            def close(x: Tensor) -> Tensor:
                return x[:count].index_copy_(0, gaps, x.index_select(0, moved))

            self.items = [(close(k), close(v)) for k, v in self.items]
            self.latent = [(close(k), close(v)) for k, v in self.latent]
            self.hidden = None if self.hidden is None else close(self.hidden)
            held = held.index_copy(0, late, gaps)
        self.held = held


class SequenceEncoder(nn.Module):
    """SASRec with tied scoring and ``steps`` latent steps.

    Args:
        config: sizes, see ``EncoderConfig``.
        num_items: N. Items are 0..N-1; PAD is N, the last row of the table, which nothing reads: a padded
            place takes some item's vector, no state that counts depends on it, and PAD is no candidate.
        steps: K, the latent steps there are position vectors for. 0 is the plain encoder.
        text: (N, m) frozen text vectors or None. With them the vector of item i is
            ``table[i] + text_map @ text[i]``, as input and for scoring alike; ``text_map`` is learned,
            without bias (a bias would move all scores of a state by the same amount).
        table: what gives items their vectors, of width ``embedding_dim``, for a subclass that has no
            ordinary table.

    Raises:
        ConfigError: sizes that do not fit.
    """

    text: Tensor | None

    def __init__(
        self,
        config: EncoderConfig,
        *,
        num_items: int,
        steps: int,
        text: Tensor | None = None,
        table: Any = None,
    ):
        super().__init__()
        d = config.hidden
        assert num_items >= 1 and steps >= 0, f"{num_items} items, {steps} steps"
        if text is not None and len(text) != num_items:
            raise ConfigError(f"There are {len(text)} text vectors for {num_items} items.")
        self.num_items, self.steps, self.max_length = num_items, steps, config.max_length
        self.table = nn.Embedding(num_items + 1, d) if table is None else table
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

    def _embed(self, items: Tensor, vectors: Tensor | None = None) -> Tensor:
        """(B, T) items -> (B, T, d) input of the first block. vectors: what ``item_vectors`` gave."""
        if items.shape[1] > self.max_length:
            raise ValueError(
                f"{items.shape[1]} items exceed max_length={self.max_length}; pass the last ones."
            )
        vectors = self.item_vectors() if vectors is None else vectors
        x = F.embedding(items.clamp(max=self.num_items - 1), vectors)
        return self.drop(self.norm(x + self.position.weight[: items.shape[1]]))

    # --- over a trie: all prefixes at once ----------------------------------------------------------

    def encode(self, items: Tensor, vectors: Tensor | None = None) -> Trunk:
        """Encode histories (B, T), padded on the right with PAD. State t answers the prefix 0..t."""
        x, keys_values = self._embed(items, vectors), []
        for block in self.blocks:
            query, key, value = block.query_key_value(x)
            x = block.finish(x, self._among_items(query, key, value, None))
            keys_values.append((key, value))
        return Trunk(x, keys_values)

    def reason(
        self,
        items: Tensor,
        steps: int | None = None,
        noise: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The states of every prefix after every step; differentiable.

        Args:
            items: (B, T), padded on the right.
            steps: how many steps to take; all K if None.
            noise: (steps, B, T, d) or None. With it a second, noisy branch runs along, whose k-th input
                is the CLEAN state of step k-1 plus noise (ReaRec, eq. 13, as the reference code does it);
                noise enters latent tokens only, and both branches share the trunk.
            vectors: (N, d), what ``item_vectors`` gave; computed if None. Whoever scores with them passes
                them on, so that the input is made of the same ones.

        Returns:
            clean states (B, T, steps + 1, d), and the noisy ones (B, T, steps, d) or None. What stands at
            padded places means nothing.
        """
        steps = self.steps if steps is None else steps
        self._check(steps)
        return self.think(self.encode(items, vectors), steps, noise, comb_attention)

    def think(
        self, trunk: Trunk, steps: int, noise: Tensor | None, attend: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The latent steps of ``reason`` from a trunk: one more token a step under each of its states.

        attend: called with the newest tokens' queries (B, H, G, ..., d/H), the items' keys and values
            (B, H, T, d/H), and those of the latent tokens, (B, H, G, ..., J, d/H), J of them to each query.
            G = 2 where a noisy branch runs along; "..." is T where each row holds all prefixes, or nothing.
        """
        clean, noisy = [trunk.states], []
        branches: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        for k in range(steps):
            x = clean[-1] + self.step_position[k]
            x = torch.stack([x] if noise is None else [x, x + noise[k]], dim=1)  # (B, G, ..., d)
            x = self.drop(self.norm(x))
            for layer, block in enumerate(self.blocks):
                query, key, value = block.query_key_value(x)  # (B, H, G, ..., d/H)
                key, value = key.unsqueeze(-2), value.unsqueeze(-2)  # (B, H, G, ..., 1, d/H)
                if (earlier := branches[layer]) is not None:
                    key, value = torch.cat([earlier[0], key], -2), torch.cat([earlier[1], value], -2)
                branches[layer] = key, value
                x = block.finish(x, attend(query, *trunk.items[layer], key, value))
            clean.append(x[:, 0])
            if noise is not None:
                noisy.append(x[:, 1])
        return torch.stack(clean, -2), torch.stack(noisy, -2) if noisy else None

    # --- with a cache: one prefix per row -----------------------------------------------------------

    def start(
        self, items: Tensor, length: Tensor, steps: int | None = None, vectors: Tensor | None = None
    ) -> Thought:
        """Encode one prefix per row and make room for ``steps`` latent tokens.

        Args:
            items: (B, T), padded on the right.
            length: (B,) number of items in each row, at least 1.
            vectors: (N, d), what ``item_vectors`` gave; computed if None.
        """
        steps = self.steps if steps is None else steps
        self._check(steps)
        batch, width = items.shape
        if bool((length < 1).any()) or bool((length > width).any()):
            raise ValueError(
                "Each row needs between 1 and T items; an empty history has no last item to read."
            )
        trunk = self.encode_last(items, length, vectors)
        key = trunk.items[0][0]
        room = (batch, key.shape[1], steps, key.shape[3])
        latent = [(key.new_zeros(room), key.new_zeros(room)) for _ in self.blocks]
        return Thought(trunk.states, trunk.items, latent, trunk.hidden)

    def encode_last(self, items: Tensor, length: Tensor, vectors: Tensor | None = None) -> Trunk:
        """Encode one prefix per row, its last state alone; differentiable. Arguments as for ``start``.

        Only what later steps or the answer read is computed: in the last block the keys and values of
        all items, but the query and everything after it for the last item alone.
        """
        x, keys_values, hidden = self._embed(items, vectors), [], None
        width = items.shape[1]
        if bool((length < width).any()):
            padding = torch.arange(width, device=items.device) >= length[:, None]  # (B, T)
            hidden = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -torch.inf)[:, None, None]
        for block in self.blocks[:-1]:
            query, key, value = block.query_key_value(x)
            x = block.finish(x, self._among_items(query, key, value, hidden))
            keys_values.append((key, value))
        last = self.blocks[-1]
        key, value = last.key_value(x)
        keys_values.append((key, value))
        x = x[torch.arange(len(x), device=x.device), length - 1].unsqueeze(1)  # (B, 1, d)
        x = last.finish(x, F.scaled_dot_product_attention(last.query(x), key, value, attn_mask=hidden))
        return Trunk(x[:, 0], keys_values, hidden)

    def advance(self, thought: Thought, weights: list[Tensor] | None = None) -> Tensor:
        """Take one latent step and return the new state (A, d). Not differentiable: caches are written.

        Args:
            weights: a list to which each layer's attention (A, H, T + k) over items and latent tokens,
                this one included, is appended.
        """
        k, held = thought.step, thought.held
        self._check(k + 1)
        x = self.drop(self.norm(thought.state + self.step_position[k])).unsqueeze(1)  # (A, 1, d)
        for block, items, (keys, values) in zip(self.blocks, thought.items, thought.latent, strict=True):
            query, key, value = block.query_key_value(x)
            if held is None:
                keys[:, :, k : k + 1], values[:, :, k : k + 1] = key, value
            else:  # rows that left stay in memory until the gaps are closed: their query is 0, their mixture unread
                keys[held, :, k : k + 1], values[held, :, k : k + 1] = key, value
                query = query.new_zeros(len(keys), *query.shape[1:]).index_copy_(0, held, query)
            mixed, share = _attend(query, *items, keys[:, :, : k + 1], values[:, :, : k + 1], thought.hidden)
            if held is not None:
                mixed, share = mixed.index_select(0, held), share.index_select(0, held)
            x = block.finish(x, mixed)
            if weights is not None:
                weights.append(share.squeeze(2))
        thought.state, thought.step = x[:, 0], k + 1
        return thought.state

    def _among_items(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        """Attention of items (B, H, T, d/H) to items. ``hidden`` as in ``Trunk``; a causal query never meets
        the padding on its right."""
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def _check(self, steps: int) -> None:
        if not 0 <= steps <= self.steps:
            raise ValueError(
                f"{steps} latent steps were requested of an encoder that was trained for {self.steps}."
            )

    # --- what it costs ------------------------------------------------------------------------------

    def flops(self, length: Tensor, steps: int) -> Tensor:
        """Floating-point operations (multiply-adds x 2) of ``start``, ``steps`` x ``advance`` and one
        scoring of the catalogue, for histories of ``length`` (n,) items without padding; (n,) float64.
        Item vectors are looked up: they are made once for all requests (``vectors``)."""
        n = length.double()
        d, f, layers = self.table.embedding_dim, self.blocks[0].up.out_features, len(self.blocks)
        row = 4 * d * d + 2 * d * f  # projections and feed-forward of one token in one block
        whole = n * row + self._pairs(n) * 2 * d  # a block over all items
        last = n * 2 * d * d + 2 * d * d + 2 * d * f + 2 * n * d
        latent = sum(layers * (row + 2 * (n + k) * d) for k in range(1, steps + 1))
        return 2 * ((layers - 1) * whole + last + latent + self.num_items * d)

    def _pairs(self, n: Tensor) -> Tensor:
        """How many (query, key) pairs of n items see each other: a causal row t sees t + 1."""
        return n * (n + 1) / 2


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
