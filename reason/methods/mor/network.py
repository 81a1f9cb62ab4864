"""The network: a recursive decoder whose tokens leave the loop when their router says so.

Bae et al., arXiv 2507.10524, section 2. Only tokens that take a recursion are computed: they stand packed,
and what has left is not touched again before the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reason.backbones.decoder import RecursiveDecoder
from reason.methods.mor.memory import Memory
from reason.methods.mor.router import Router, gate
from reason.methods.mor.routes import Known, Route
from reason.methods.mor.taken import Taken

if TYPE_CHECKING:
    from reason.methods.mor.convert import Teacher


@dataclass
class Scored:
    """What the router of a step said, and what came of it."""

    among: Taken  # n candidates
    logits: Tensor  # (n,) float32
    foreseen: Tensor | None  # (n,) logits of the router that foresees top-k, where there is one
    places: Tensor | None  # (m,) of those chosen; None: all


@dataclass
class Routed:
    """A forward pass."""

    states: Tensor  # (B, T, D), after the loop, before the last layer
    depth: Tensor  # (B, T) int64, recursions taken; 0 at padding
    entry: Tensor | None  # (n, N_r) logits of a token-choice router
    scored: list[Scored] = field(default_factory=list)  # of each step
    exits: list[Tensor] = field(
        default_factory=list
    )  # (B, T, D) states had the loop ended after each step but the last


class MixtureOfRecursions(nn.Module):
    """Routers around a ``RecursiveDecoder``.

    Args:
        decoder: with cyclic sharing where tokens may leave early.
        config: the method's keys.
        std: of the weights of routers at the start.
        teacher: the model that the decoder's weights began as, where something is learned from it.
        converted: whether they began as another model's; None: if there is a teacher. It decides how a step enters the state.
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
        self.broken = 0  # scores that were no number, in decoding
        if converted:  # a gate begins at 1
            for router in [*self.by_step, *([self.by_token] if self.by_token else [])]:
                nn.init.zeros_(router.layers[-1].weight)
        self._load = torch.zeros(N)  # tokens that chose each depth since it was last asked; each rank its own

    def forward(
        self, tokens: Tensor, route: Route | None = None, *, real: Tensor | None = None, cap: int | None = None,
        memory: str = "recursion", exits: bool = False,
    ) -> Routed:  # fmt: skip
        """Run the loop over (B, T) tokens.

        Args:
            route: who takes the next step (``routes``); None: what a token-choice router says, else all.
            real: (B,) tokens of sequences that are padded on the right; None: all T.
            cap: recursions at most; None: all.
            memory: what a token sees (``memory.KINDS``).
            exits: also say what the states would be had the loop ended earlier.
        """
        B, T = tokens.shape
        cap = cap or self.recursions
        rope = self.decoder.rope(torch.arange(T, device=tokens.device))
        x = self.decoder.begin(tokens, rope).flatten(0, 1)  # (B T, D)
        taken, keys = Taken.everything(tokens, real), Memory(memory, rope)
        u = x if taken.each is not None else x.index_select(0, taken.index)  # (n, D), those still in the loop
        entry = None if self.by_token is None else deepest_where_broken(self.by_token(u))  # (n, N_r)
        if route is None:
            route = Known(self.recursions if entry is None else self.chosen_depth(entry, taken))
        entered, depth, scored = taken, torch.zeros(B * T, dtype=torch.int64, device=x.device), []
        trail: Trail = [(None, x)]
        for step in range(cap):
            logits = (
                deepest_where_broken(self.by_step[step](u))[:, 0] if self.by_step else u.new_zeros(len(u))
            )
            foreseen = (
                deepest_where_broken(self.foreseers[step](u.detach()))[:, 0] if self.foreseers else None
            )
            heard = logits if foreseen is None or route.looks_ahead else foreseen
            places, each = route(step, heard.detach(), taken)
            scored.append(Scored(taken, logits, foreseen, places))
            if places is not None:
                taken = taken.pick(places, each)
                u, logits = u.index_select(0, places), logits.index_select(0, places)
            if not len(taken):
                break
            left = settled(trail) if keys.needs_states and step else None
            f = u
            for j in range(len(self.decoder.block)):
                f = keys.run(self.decoder.at(j, step), j, step, f, taken, left)
            u = self.combine(u, f, logits)
            whole = taken.each == T
            trail.append((places if step else None if whole else taken.index, u))
            depth = depth.index_fill(0, taken.index, step + 1)
        ends = range(1, len(trail) - 1) if exits else ()
        earlier = [self.leave(x, settled(trail[: n + 1]), depth.clamp_max(n), entry, entered) for n in ends]
        final = self.leave(x, settled(trail), depth, entry, entered)
        return Routed(
            final.view(B, T, -1), depth.view(B, T), entry, scored, [y.view(B, T, -1) for y in earlier]
        )

    def note_load(self, load: Tensor) -> None:
        """Add (N_r,) tokens by the depth they chose, for ``take_load``."""
        self._load = self._load.to(load.device) + load

    def take_load(self) -> Tensor:
        """(N_r,) what was noted since the last call, over all ranks."""
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

    def chosen_depth(self, entry: Tensor, taken: Taken) -> Tensor:
        """(B T,) int64: the depth each token chooses by its scores (n, N_r) and the selection bias; 0 at padding.
        The deepest of those that are equal."""
        choice = self.recursions - (self.gates(entry) + self.bias).flip(-1).argmax(-1)
        return choice.new_zeros(taken.batch * taken.length).index_copy(0, taken.index, choice)

    def gates(self, logits: Tensor) -> Tensor:
        """How strongly what a router scored enters the state, as its logits."""
        return gate(logits, self.config.gate, self.config.alpha)

    def combine(self, u: Tensor, f: Tensor, logits: Tensor) -> Tensor:
        """How a step enters the state: (n, D), (n, D), (n,) -> (n, D). Token-choice gates once, where a token leaves."""
        if not self.by_step or self.config.combine == "replace":
            return f
        g = self.gates(logits)[:, None].to(u.dtype)
        return u + g * (f - u if self.config.combine == "delta" else f)

    def leave(self, x: Tensor, h: Tensor, depth: Tensor, entry: Tensor | None, entered: Taken) -> Tensor:
        """States (B T, D) after the loop, from those at entry, the last ones in it, and the depth they were taken to."""
        if entry is None or self.config.combine == "replace":
            return h
        scores = self.gates(entry)  # (n, N_r)
        weight = scores.gather(1, depth[entered.index, None] - 1)  # (n, 1), of the depth it has
        weight = x.new_zeros(len(x), 1).index_copy(0, entered.index, weight.to(x.dtype))
        return x + weight * (h - x if self.config.combine == "delta" else h)


def _routers(n: int, width: int, config: Any, std: float) -> Sequence[Router]:
    return cast(Sequence[Router], nn.ModuleList(Router(width, 1, config.router, std) for _ in range(n)))


# Of each step: the places of its tokens among those of the step before (None: all of them), and their states.
Trail = list[tuple[Tensor | None, Tensor]]


def settled(trail: Trail) -> Tensor:
    """(B T, D) states if the loop ends here. Whom a step did not take is as the step before left it."""
    (within, states), *before = trail[::-1]
    for place, earlier in before:
        if within is not None:
            states = earlier.index_copy(0, within, states)
        within = place
    return states


CERTAIN = 100.0  # a logit beyond doubt


def deepest_where_broken(logits: Tensor) -> Tensor:
    """(n, m) logits, rows that hold what is no number replaced by the deepest choice: a broken router costs time, not text."""
    certain = torch.full_like(logits[:1], -CERTAIN)
    certain[:, -1] = CERTAIN
    return torch.where(logits.isfinite().all(-1, keepdim=True), logits, certain)
