"""Llama-style layers, and a decoder that applies a block of them again and again.

One class is the vanilla language model (one recursion), the plain recursive one, and the network that
Mixture-of-Recursions routes tokens through: Bae et al., arXiv 2507.10524; layers as in Touvron et al.,
arXiv 2302.13971, with grouped-query attention (arXiv 2305.13245), and the biases of Qwen2 and the head
norms of Qwen3 where a network has them.

Which keys a token sees is up to the caller: a layer takes ``attend``, called with queries (..., h, d_h), keys
and values (..., h_kv, d_h), which returns the mixture (..., h, d_h). So a step over some of the
tokens, over packed sequences or against a cache runs the same layer. There is no dropout.

The uses of a shared layer may differ (``lora``): each then has a correction of low rank, as in "Relaxed
Recursive Transformers", Bae et al., arXiv 2410.20672. ``RecursiveDecoder.at`` returns a layer of the block at a
step, or at the steps of several groups of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reason.backbones.config import RecursiveConfig
from reason.backbones.shape import Shape
from reason.backbones.sharing import Sharing
from reason.errors import ConfigError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Rope = tuple[Tensor, Tensor]  # cos and sin, (..., d_h / 2), a row for each token
# Of all rows; or (number of rows, step) of one group of rows after the other.
Steps = int | Sequence[tuple[int, int]]

PRODUCTS = ("query", "key_value", "out", "gate", "up", "down")
NORMS = ("norm_attention", "norm_query", "norm_key", "norm_feed")


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each token sees itself and those before it. (..., T, h, d_h) and (..., T, h_kv, d_h) -> (..., T, h, d_h)."""
    grouped = query.shape[-2] != key.shape[-2]
    query, key, value = (x.transpose(-3, -2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return mixed.transpose(-3, -2)


class Rotary:
    """Rotary positions (Su et al., arXiv 2104.09864): angles of d_h / 2 planes at given positions.

    Not a module: the frequencies stay in float32, whatever the network is cast to.
    """

    def __init__(self, shape: Shape):
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device="cpu") / shape.head_dim
        frequency = 1.0 / shape.rope_theta**half
        if (scaling := shape.scaling) is not None:
            slow = frequency / scaling.factor
            if scaling.original:
                waves = scaling.original * frequency / (2 * torch.pi)  # in the first context
                keep = ((waves - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
                frequency = keep * frequency + (1 - keep) * slow
            else:
                frequency = slow
        self._on = {frequency.device: frequency}

    def __call__(self, positions: Tensor) -> Rope:
        """positions: (...), whole numbers -> cos and sin (..., d_h / 2), float32."""
        device = positions.device
        if device not in self._on:
            self._on[device] = next(iter(self._on.values())).to(device)
        angle = positions.unsqueeze(-1).float() * self._on[device]
        return angle.cos(), angle.sin()


def rope_at(rope: Rope, index: Tensor) -> Rope:
    """The angles of some rows."""
    return rope[0].index_select(0, index), rope[1].index_select(0, index)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn heads (..., h, d_h) by the angles of their tokens. Channel i is turned together with i + d_h / 2."""
    cos, sin = (r.unsqueeze(-2).to(x.dtype) for r in rope)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class LayerFormulas:
    """Pre-norm: ``a = x + out(attention(norm(x)))``, ``y = a + down(silu(gate(norm(a))) * up(norm(a)))``.

    The computation of a layer, given its parts.
    """

    head_dim: int
    norm_attention: Any
    norm_query: Any
    norm_key: Any
    norm_feed: Any
    query: Any
    key_value: Any
    out: Any
    gate: Any
    up: Any
    down: Any

    def forward(self, x: Tensor, rope: Rope, attend: Attend = causal) -> Tensor:
        """x: (..., D); rope: for the positions of x -> (..., D)."""
        normed = self.norm_attention(x)
        return self.finish(x, attend(self._queries(normed, rope), *self._keys_values(normed, rope)))

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        """(..., D) -> (..., h, d_h): all that a token has to compute to attend to keys of other steps."""
        return self._queries(self.norm_attention(x), rope)

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """(..., D) -> (..., h_kv, d_h) twice: all that a token has to compute for other tokens to attend to it."""
        return self._keys_values(self.norm_attention(x), rope)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the layer. x: (..., D); mixed: (..., h, d_h), the output of attention."""
        x = x + self.out(mixed.flatten(-2))
        normed = self.norm_feed(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def _queries(self, normed: Tensor, rope: Rope) -> Tensor:
        query = self.query(normed).unflatten(-1, (-1, self.head_dim))
        return rotate(self.norm_query(query), rope)

    def _keys_values(self, normed: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        key, value = self.key_value(normed).unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        return rotate(self.norm_key(key), rope), value


class Layer(LayerFormulas, nn.Module):
    """A layer that is used once, or in the same way at every step. See ``LayerFormulas``."""

    def __init__(self, shape: Shape):
        super().__init__()
        D, d_h, eps = shape.hidden, shape.head_dim, shape.norm_eps
        self.head_dim = d_h
        self.norm_attention = nn.RMSNorm(D, eps=eps)
        self.query = nn.Linear(D, shape.heads * d_h, bias=shape.biases)
        self.key_value = nn.Linear(D, 2 * shape.kv_heads * d_h, bias=shape.biases)  # keys, then values
        self.norm_query = nn.RMSNorm(d_h, eps=eps) if shape.head_norms else nn.Identity()
        self.norm_key = nn.RMSNorm(d_h, eps=eps) if shape.head_norms else nn.Identity()
        self.out = nn.Linear(shape.heads * d_h, D, bias=False)
        self.norm_feed = nn.RMSNorm(D, eps=eps)
        self.gate = nn.Linear(D, shape.ffn, bias=False)
        self.up = nn.Linear(D, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, D, bias=False)


class LowRank(nn.Module):
    """``x A^T B^T + b``, B and b 0 at first. inward: A (rank, inputs); outward: B (outputs, rank); scaling is 1."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        outputs, inputs = linear.weight.shape
        rank = min(rank, outputs, inputs)
        self.inward = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.outward = nn.Parameter(torch.zeros(outputs, rank))
        self.bias = None if linear.bias is None else nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(F.linear(x, self.inward), self.outward, self.bias)

    def fit_nearest(self, difference: Tensor) -> None:
        """The nearest to a matrix (outputs, inputs) that the rank allows: A = V^T and B = U S of its largest singular
        values. Found by the eigenvectors of its smaller square, many times faster than by a decomposition of itself."""
        wide, rank = difference.double(), len(self.inward)
        if wide.shape[0] >= wide.shape[1]:
            V = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -rank:].flip(1)
            A, B = V.T, wide @ V
        else:
            U = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:].flip(1)
            A = U.T @ wide
            S = torch.linalg.vector_norm(A, dim=1).clamp_min(1e-12)
            A, B = A / S[:, None], U * S
        self.inward.copy_(A)
        self.outward.copy_(B)


class Correction(nn.Module):
    """What one use of a shared layer adds to it: low rank for its linear maps, whole vectors for norms and biases."""

    def __init__(self, layer: Layer, rank: int):
        super().__init__()
        for name in PRODUCTS:
            self.add_module(name, LowRank(getattr(layer, name), rank))
        for name in NORMS:
            if isinstance(norm := getattr(layer, name), nn.RMSNorm):
                self.register_parameter(name, nn.Parameter(torch.zeros_like(norm.weight)))

    def parameter(self, name: str) -> tuple[str, bool]:
        """The parameter or module here that holds the difference of a layer's parameter, and whether as a product of two."""
        part, kind = name.split(".")
        return (part, False) if part in NORMS else (part, True) if kind == "weight" else (name, False)

    @torch.no_grad()
    def fit(self, layer: Layer, wanted: Mapping[str, Tensor]) -> None:
        """Bring the layer as near to the weights of another as the rank allows, by their names in a ``Layer``."""
        for name, parameter in layer.named_parameters():
            place, product = self.parameter(name)
            difference = wanted[name] - parameter
            if product:
                cast(LowRank, self.get_submodule(place)).fit_nearest(difference)
            else:
                self.get_parameter(place).copy_(difference)

    @torch.no_grad()
    def merged(self, layer: Layer) -> dict[str, Tensor]:
        """The weights of the layer with this correction added."""
        weights = {}
        for name, parameter in layer.named_parameters():
            place, product = self.parameter(name)
            if product:
                low = cast(LowRank, self.get_submodule(place))
                weights[name] = parameter + low.outward @ low.inward
            else:
                weights[name] = parameter + self.get_parameter(place)
        return weights


class Corrected(LayerFormulas):
    """A shared layer at some of its steps: called as a ``Layer``.

    groups: (number of rows, correction) of one group of rows after the other, along the first axis; a single one is for all
        rows.
    """

    def __init__(self, layer: Layer, groups: Sequence[tuple[int, Correction]]):
        self.head_dim, self.rows = layer.head_dim, [rows for rows, _ in groups]
        self.corrections = [correction for _, correction in groups]
        for name in PRODUCTS:
            setattr(self, name, partial(self._product, name, getattr(layer, name)))
        for name in NORMS:
            norm = getattr(layer, name)
            setattr(self, name, partial(self._norm, name, norm) if isinstance(norm, nn.RMSNorm) else norm)

    __call__ = LayerFormulas.forward

    def _product(self, name: str, shared: nn.Linear, x: Tensor) -> Tensor:
        return shared(x) + self._each(x, lambda correction, rows: getattr(correction, name)(rows))

    def _norm(self, name: str, shared: nn.RMSNorm, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, shared.normalized_shape, None, shared.eps)
        return self._each(normed, lambda correction, rows: rows * (shared.weight + getattr(correction, name)))

    def _each(self, x: Tensor, act: Callable[[Correction, Tensor], Tensor]) -> Tensor:
        """Each group of rows with the correction of its step."""
        if len(self.corrections) == 1:
            return act(self.corrections[0], x)
        return torch.cat([act(c, rows) for c, rows in zip(self.corrections, x.split(self.rows), strict=True)])


LayerUse = Layer | Corrected  # a physical layer, at some place of the unrolled network


class RecursiveDecoder(nn.Module):
    """Embedding, a first layer, a block of b layers used N_r times, a last layer, norm, head.

    Without private ends (``sharing=cycle`` or ``sequence``) there is only the block. Each physical layer
    is one module, whatever the times it is used, so no parameter has two names.

    Args:
        config: ``sharing`` and ``init_std`` are read here; for the rest see ``shape``.
        shape: sizes, ``config.shape(vocab)`` or those of a model that was opened. Its ``layers`` count
            the unrolled network.
        recursions: N_r. 1 is the vanilla network.
        lora: rank of the correction of each use of a shared layer; 0 = none.

    Raises:
        ConfigError: layers that the recursions do not divide.
    """

    def __init__(self, config: RecursiveConfig, *, shape: Shape, recursions: int, lora: int = 0):
        super().__init__()
        self.shape, self.sharing = shape, Sharing(config.sharing, shape.layers, recursions)
        self.embed = nn.Embedding(shape.vocab, shape.hidden)
        self.first = Layer(shape) if self.sharing.ends else None
        self.block = cast(Sequence[Layer], nn.ModuleList(Layer(shape) for _ in range(self.sharing.block)))
        self.last = Layer(shape) if self.sharing.ends else None
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.head = None if shape.tied else nn.Linear(shape.hidden, shape.vocab, bias=False)
        self.rope = Rotary(shape)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.init_std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        uses = range(recursions if lora else 0)
        found = nn.ModuleList(nn.ModuleList(Correction(layer, lora) for layer in self.block) for _ in uses)
        self.corrections = cast(Sequence[Sequence[Correction]], found) if lora else None  # [use][layer]

    @property
    def physical(self) -> list[Layer]:
        """The layers that exist, in the numbering of ``Sharing.physical``."""
        ends = ([self.first], [self.last]) if self.first is not None else ([], [])
        return cast(list[Layer], [*ends[0], *self.block, *ends[1]])

    def at(self, place: int, steps: Steps) -> LayerUse:
        """The layer at a place (below b) of a step of the loop, both from 0, or for groups of rows at several steps.

        Raises:
            ConfigError: several steps, and a scheme whose steps are of different layers.
        """
        if self.corrections is None and self.sharing.cyclic:
            return self.block[place]
        steps = [(0, steps)] if isinstance(steps, int) else steps
        runs = groupby(steps, lambda one: one[1])
        groups = [(step, sum(rows for rows, _ in run)) for step, run in runs]
        uses = [self.sharing.use(place, step) for step, _ in groups]
        if len({j for j, _ in uses}) > 1:
            raise ConfigError(
                f"Rows at several steps cannot go together: sharing={self.sharing.scheme} has other layers at each step.",
                "Use a cyclic scheme, or one row at a time.",
            )
        layer = self.block[uses[0][0] if uses else place]
        if self.corrections is None:
            return layer
        found = [self.corrections[n][j] for j, n in uses]
        return Corrected(layer, list(zip((rows for _, rows in groups), found, strict=True)))

    # --- all at once ------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, depth: int | None = None) -> Tensor:
        """States that the head reads: (B, T) tokens -> (B, T, D), each of the tokens up to its own.

        depth: recursions to take, 1 to N_r; all if None.

        Raises:
            ValueError: no such depth, or a scheme that cannot stop early.
        """
        rope = self.rope(torch.arange(tokens.shape[-1], device=tokens.device))
        depth = self.sharing.recursions if depth is None else depth
        self.sharing.upto(depth)  # refuses what cannot be
        x = self.begin(tokens, rope)
        for step in range(depth):
            x = self.recurse(x, rope, step=step)
        return self.finish(x, rope)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(hidden, self.embed.weight if self.head is None else self.head.weight)

    # --- in parts: the loop over ``block`` is the caller's ----------------------------------------------

    def begin(self, tokens: Tensor, rope: Rope, attend: Attend = causal) -> Tensor:
        """Up to the loop: (...) tokens -> (..., D)."""
        x = self.embed(tokens)
        return x if self.first is None else self.first(x, rope, attend)

    def recurse(self, x: Tensor, rope: Rope, attend: Attend = causal, step: int = 0) -> Tensor:
        """A step, residuals included: (..., D) -> (..., D). The f of the paper, once through the block (cyclic schemes).

        step: from 0; it matters where steps have corrections, or other layers.
        """
        for place in range(len(self.block)):
            x = self.at(place, step)(x, rope, attend)
        return x

    def finish(self, x: Tensor, rope: Rope, attend: Attend = causal) -> Tensor:
        """What follows the loop: (..., D) -> (..., D), for ``logits``."""
        return self.norm(x if self.last is None else self.last(x, rope, attend))

    # --- weights of another network -----------------------------------------------------------------------

    @torch.no_grad()
    def fill(
        self, tensors: Mapping[str, Tensor], origins: Sequence[Sequence[int]] | None = None
    ) -> RecursiveDecoder:
        """Take over the weights of a vanilla network, whose layers are named ``layers.0.``, ``layers.1.`` ...

        Args:
            tensors: as ``reason.backbones.pretrained.Pretrained`` has them.
            origins: for each physical layer, those of the other network it becomes the mean of, or none to
                leave it as it is; None gives each the one of its number.
        """
        if origins is None:
            origins = [(index,) for index in range(self.sharing.unique)]
        for layer, origin in zip(self.physical, origins, strict=True):
            for name, parameter in layer.named_parameters() if origin else ():
                weights = [tensors[f"layers.{index}.{name}"] for index in origin]
                parameter.copy_(weights[0] if len(weights) == 1 else torch.stack(weights).mean(0))
        outside = {"embed": self.embed, "norm": self.norm} | ({"head": self.head} if self.head else {})
        for name, module in outside.items():
            cast(Tensor, module.weight).copy_(tensors[f"{name}.weight"])
        return self

    def correct(self, tensors: Mapping[str, Tensor], origins: Sequence[int | None]) -> RecursiveDecoder:
        """Bring each use of a shared layer as near to a layer of a vanilla network as the rank of its correction allows.

        Args:
            tensors: as for ``fill``, which comes first.
            origins: for each of the L unrolled layers, the layer of the other network that it stands for; unread
                where a layer has no correction.
        """
        for origin, layer, correction in zip(origins, *self._uses(), strict=True):
            if correction is not None:
                names = [name for name, _ in layer.named_parameters()]
                correction.fit(layer, {name: tensors[f"layers.{origin}.{name}"] for name in names})
        return self

    @torch.no_grad()
    def unrolled(self) -> dict[str, Tensor]:
        """The weights of the vanilla network that does the same, named as ``fill`` reads them. Tensors of layers
        without corrections are those of this network, under several names."""
        weights = {f"{n}.{p}": t.detach() for n in ("embed", "norm", "head") if (module := getattr(self, n)) is not None
                 for p, t in module.named_parameters()}  # fmt: skip
        for index, (layer, correction) in enumerate(zip(*self._uses(), strict=True)):
            inside = dict(layer.named_parameters()) if correction is None else correction.merged(layer)
            weights |= {f"layers.{index}.{name}": tensor.detach() for name, tensor in inside.items()}
        return weights

    def _uses(self) -> tuple[list[Layer], list[Correction | None]]:
        """Of each of the L unrolled layers, the physical one, and what this use of it has beyond."""
        steps, places = range(self.sharing.recursions), range(self.sharing.block)
        uses = [self.sharing.use(place, step) for step in steps for place in places]
        inside = [None if self.corrections is None else self.corrections[n][j] for j, n in uses]
        ends = [None] if self.first is not None else []
        return [self.physical[index] for index in self.sharing.physical], [*ends, *inside, *ends]
