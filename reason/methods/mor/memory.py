"""What a token sees at each recursion: the keys and values of others, within one pass over whole sequences.

Bae et al., arXiv 2507.10524, section 2.3, and what may stand in for keys that do not exist because
their token left earlier. The cache of decoding (``cache.py``) answers the same calls.

    recursion   tokens that took this step, by this step's keys; who left is not seen
    sharing     all tokens, by the keys of the first step; later steps compute queries only
    hybrid      all tokens; this step's keys of those that took it, else the first step's
    deepest     all tokens; this step's keys of those that took it, else those of the last step they took
    propagate   all tokens; of those that left, keys made from the state they left with (as CALM does,
                Schuster et al., arXiv 2207.07061), once: where steps have corrections, by the weights of the
                first step that they do not take
"""

from __future__ import annotations

import torch
from torch import Tensor

from reason.backbones.decoder import Rope, Use
from reason.methods.mor.taken import Taken

KINDS = ("recursion", "sharing", "hybrid", "deepest", "propagate")


class Memory:
    """Of one forward pass.

    rope: of every position, (T, d_h / 2) twice.
    """

    def __init__(self, kind: str, rope: Rope):
        self.kind, self.rope = kind, rope
        self.turn = rope  # of those who take the latest step
        self.kept: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # layer -> (B T, h_kv, d_h) twice, what gaps are filled with
        self.inside: Tensor | None = None  # who took the latest step
        self.gone: Tensor | None = None  # who took the one before, and not this

    def run(self, layer: Use, j: int, step: int, x: Tensor, taken: Taken, left: Tensor | None) -> Tensor:
        """Layer ``j`` of the block at ``step`` (from 0) over the tokens that take it: (n, D) -> (n, D). Layers come
        in their order.

        left: (B T, D) states of all tokens before this step, where ``needs_states``.
        """
        if j == 0:
            self.turn = _at(self.rope, taken.position)
        rope = self.turn
        if self.kind == "recursion":
            return layer(x, rope, taken.look_back)
        if self.kind == "propagate" and j == 0:
            before, self.inside = self.inside, taken.index
            self.gone = None if before is None else before[~torch.isin(before, taken.index)]
        if step == 0:

            def remember(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                self.kept[j] = self._everywhere(k, taken), self._everywhere(v, taken)
                return taken.look_back(q, k, v)

            return layer(x, rope, remember)
        if self.kind == "sharing":
            return layer.finish(x, taken.look_at_all(layer.queries(x, rope), *self._by_sequence(j, taken)))
        if self.kind == "propagate":
            assert left is not None and self.gone is not None
            self.kept[j] = self._parting(layer, j, left[self.gone], self.gone % taken.length)

        def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            before = self.kept[j]
            now = tuple(old.index_copy(0, taken.index, new) for old, new in zip(before, (k, v), strict=True))
            self.kept[j] = now  # type: ignore[assignment]
            out = taken.look_at_all(q, *self._by_sequence(j, taken))
            if self.kind == "hybrid":
                self.kept[j] = before
            return out

        return layer(x, rope, merged)

    def _parting(self, layer: Use, j: int, left: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, with those made from the states (m, D) in which tokens at ``places`` have just left."""
        made = layer.keys_values(left, _at(self.rope, places))
        assert self.gone is not None
        k, v = (old.index_copy(0, self.gone, new) for old, new in zip(self.kept[j], made, strict=True))
        return k, v

    @property
    def needs_states(self) -> bool:
        return self.kind == "propagate"

    def _everywhere(self, x: Tensor, taken: Taken) -> Tensor:
        whole = x.new_zeros(taken.batch * taken.length, *x.shape[1:])
        return whole.index_copy(0, taken.index, x)

    def _by_sequence(self, j: int, taken: Taken) -> tuple[Tensor, Tensor]:
        k, v = (x.unflatten(0, (taken.batch, taken.length)) for x in self.kept[j])
        return k, v


def _at(rope: Rope, places: Tensor) -> Rope:
    return rope[0].index_select(0, places), rope[1].index_select(0, places)
