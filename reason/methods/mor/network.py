"""The network: a recursive decoder whose tokens exit the loop when their router decides so.

Bae et al., arXiv 2507.10524, section 2. Only active tokens are computed: they are packed, and tokens that
exited are not touched again before the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reason.backbones.decoder import RecursiveDecoder
from reason.methods.mor.active import ActiveTokens
from reason.methods.mor.convert import Teacher
from reason.methods.mor.router import Router, deepest_if_nonfinite, gate
from reason.methods.mor.token_selection import KnownDepths, Route
from reason.methods.mor.visible_keys import VisibleKeys


@dataclass
class StepRouting:
    """What a step's router scored, and which tokens were chosen."""

    candidates: ActiveTokens  # n tokens active before the step
    logits: Tensor  # (n,) float32
    aux_logits: Tensor | None  # (n,) of the auxiliary router that predicts top-k, where there is one
    chosen: Tensor | None  # (m,) indices into the candidates; None: all

    @property
    def deciding(self) -> Tensor:
        """(n,) the logits that decide where the future is not seen."""
        return self.logits if self.aux_logits is None else self.aux_logits


@dataclass
class RoutedOutput:
    """The result of a forward pass."""

    states: Tensor  # (B, T, D), after the loop, before the last layer
    depth: Tensor  # (B, T) int64, recursions taken; 0 at padding
    entry: Tensor | None  # (n, N_r) logits of a token-choice router
    steps: list[StepRouting] = field(default_factory=list)  # one for each step
    exits: list[Tensor] = field(
        default_factory=list
    )  # (B, T, D) states if the loop ended after each step but the last


class MixtureOfRecursions(nn.Module):
    """Routers around a ``RecursiveDecoder``.

    Args:
        decoder: with cyclic sharing where tokens may leave early.
        config: the method's keys.
        std: standard deviation of the initial weights of routers.
        teacher: the model that the decoder was converted from, to distil from.
        converted: whether the decoder was converted from another model; None: if there is a teacher. It decides how a
            step enters the state (``MorConfig.resolved``).
    """

    def __init__(
        self, decoder: RecursiveDecoder, config: Any, std: float, teacher: Teacher | None = None,
        converted: bool | None = None,
    ):  # fmt: skip
        super().__init__()
        converted = teacher is not None if converted is None else converted
        self.recursions = decoder.sharing.recursions
        self.decoder, self.config = decoder, config.resolved(converted, self.recursions)
        self.teacher = teacher  # no module: not trained, saved or sharded
        width, N = decoder.shape.hidden, self.recursions
        token, expert = config.routing == "token", config.routing in ("expert", "random")
        self.by_token = Router(width, N, config.router, std) if token else None
        self.by_step = _routers(N if expert else 0, width, config, std)
        self.foreseers = _routers(N if expert and config.aux == "router" else 0, width, config, std)
        self.bias: Tensor  # (N_r,) of selection by a token, never of a gate
        self.register_buffer("bias", torch.zeros(N) if token else None)
        self.fallbacks = 0  # router outputs that were not finite, while decoding
        if converted:  # a gate begins at 1
            for router in [*self.by_step, *([self.by_token] if self.by_token else [])]:
                nn.init.zeros_(router.layers[-1].weight)
        self._load = torch.zeros(N)  # tokens that chose each depth since ``take_load``, on this rank

    def forward(
        self, tokens: Tensor, route: Route | None = None, *, lengths: Tensor | None = None, cap: int | None = None,
        kv_mode: str = "recursion", exits: bool = False,
    ) -> RoutedOutput:  # fmt: skip
        """Run the loop over (B, T) tokens.

        Args:
            route: which tokens take the next step (``token_selection``); None: what a token-choice router chooses, else all.
            lengths: (B,) tokens of sequences that are padded on the right; None: all T.
            cap: recursions at most; None: all.
            kv_mode: which keys a token sees (``visible_keys.KV_MODES``).
            exits: also return the states as if the loop had ended earlier.
        """
        B, T = tokens.shape
        cap = cap or self.recursions
        rope = self.decoder.rope(torch.arange(T, device=tokens.device))
        x = self.decoder.begin(tokens, rope).flatten(0, 1)  # (B T, D)
        active, visible = ActiveTokens.all_of(tokens, lengths), VisibleKeys(kv_mode, rope)
        u = (
            x if active.per_sequence is not None else x.index_select(0, active.index)
        )  # (n, D), states of the active tokens
        entry = None if self.by_token is None else deepest_if_nonfinite(self.by_token(u))  # (n, N_r)
        if route is None:
            route = KnownDepths(self.recursions if entry is None else self.chosen_depth(entry, active))
        entered, depth, steps = active, torch.zeros(B * T, dtype=torch.int64, device=x.device), []
        trail: Trail = [(None, x)]
        for step in range(cap):
            logits = (
                deepest_if_nonfinite(self.by_step[step](u))[:, 0] if self.by_step else u.new_zeros(len(u))
            )
            aux_logits = (
                deepest_if_nonfinite(self.foreseers[step](u.detach()))[:, 0] if self.foreseers else None
            )
            deciding = logits if aux_logits is None or route.looks_ahead else aux_logits
            chosen, per_sequence = route(step, deciding.detach(), active)
            steps.append(StepRouting(active, logits, aux_logits, chosen))
            if chosen is not None:
                active = active.select(chosen, per_sequence)
                u, logits = u.index_select(0, chosen), logits.index_select(0, chosen)
            if not len(active):
                break
            before = assemble(trail) if visible.needs_exit_states and step else None
            f = u
            for j in range(len(self.decoder.block)):
                f = visible.apply_layer(self.decoder.at(j, step), j, step, f, active, before)
            u = self.combine(u, f, logits)
            whole = active.per_sequence == T
            trail.append((chosen if step else None if whole else active.index, u))
            depth = depth.index_fill(0, active.index, step + 1)
        ends = range(1, len(trail) - 1) if exits else ()
        earlier = [
            self.exit_states(x, assemble(trail[: n + 1]), depth.clamp_max(n), entry, entered) for n in ends
        ]
        final = self.exit_states(x, assemble(trail), depth, entry, entered)
        return RoutedOutput(
            final.view(B, T, -1), depth.view(B, T), entry, steps, [y.view(B, T, -1) for y in earlier]
        )

    def add_load(self, load: Tensor) -> None:
        """Add (N_r,) counts of tokens by the depth they chose, for ``take_load``."""
        self._load = self._load.to(load.device) + load

    def take_load(self) -> Tensor:
        """(N_r,) counts added since the last call, summed over ranks."""
        load, self._load = self._load, torch.zeros_like(self._load)
        if dist.is_initialized():
            dist.all_reduce(load)
        return load

    @property
    def head_weight(self) -> Tensor:
        """(V, D) rows that states are scored with."""
        head = self.decoder.head
        return self.decoder.embed.weight if head is None else head.weight

    def read(self, states: Tensor) -> Tensor:
        """(B, T, D) states after the loop -> (B, T, D) that the head reads: the last layer and the norm."""
        rope = self.decoder.rope(torch.arange(states.shape[1], device=states.device))
        return self.decoder.finish(states, rope)

    def chosen_depth(self, entry: Tensor, active: ActiveTokens) -> Tensor:
        """(B T,) int64: the depth each token chooses by its scores (n, N_r) and the selection bias; 0 at padding.
        Of equal scores, the deepest."""
        choice = self.recursions - (self.gates(entry) + self.bias).flip(-1).argmax(-1)
        return choice.new_zeros(active.batch * active.length).index_copy(0, active.index, choice)

    def gates(self, logits: Tensor) -> Tensor:
        """How strongly a recursion's output enters the state, shaped like the logits."""
        return gate(logits, self.config.gate, self.config.alpha)

    def combine(self, u: Tensor, f: Tensor, logits: Tensor) -> Tensor:
        """How a step enters the state: (n, D), (n, D), (n,) -> (n, D). Token-choice gates once, where a token exits."""
        if not self.by_step or self.config.combine == "replace":
            return f
        g = self.gates(logits)[:, None].to(u.dtype)
        return u + g * (f - u if self.config.combine == "delta" else f)

    def exit_states(
        self, x: Tensor, h: Tensor, depth: Tensor, entry: Tensor | None, entered: ActiveTokens
    ) -> Tensor:
        """States (B T, D) after the loop, from those at entry (x), the last ones in it (h), and depths (B T,)."""
        if entry is None or self.config.combine == "replace":
            return h
        scores = self.gates(entry)  # (n, N_r)
        weight = scores.gather(1, depth[entered.index, None] - 1)  # (n, 1), of the depth it has
        weight = x.new_zeros(len(x), 1).index_copy(0, entered.index, weight.to(x.dtype))
        return x + weight * (h - x if self.config.combine == "delta" else h)


def _routers(n: int, width: int, config: Any, std: float) -> Sequence[Router]:
    return cast(Sequence[Router], nn.ModuleList(Router(width, 1, config.router, std) for _ in range(n)))


# For each step: the indices of its tokens among those of the step before (None: all of them), and their states.
Trail = list[tuple[Tensor | None, Tensor]]


def assemble(trail: Trail) -> Tensor:
    """(B T, D) states if the loop ends here. A token that a step did not choose keeps the state of the step before."""
    (index, states), *before = trail[::-1]
    for earlier_index, earlier in before:
        if index is not None:
            states = earlier.index_copy(0, index, states)
        index = earlier_index
    return states
