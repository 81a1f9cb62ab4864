"""The keys and values that a token sees at each recursion, within one pass over whole sequences.

Bae et al., arXiv 2507.10524, section 2.3 (recursion-wise caching and recursive sharing), and what may stand in
for the keys of tokens that exited earlier. The cache of decoding (``cache.py``) implements the same modes.

    recursion   active tokens only, by the keys of this recursion (recursion-wise caching)
    sharing     all tokens, by the keys of the first recursion; later ones compute queries only (recursive sharing)
    hybrid      all tokens; this recursion's keys of active tokens, else those of the first
    deepest     all tokens; this recursion's keys of active tokens, else those of the last one that they took
    propagate   all tokens; for those that exited, keys computed once from their exit states (as CALM does,
                Schuster et al., arXiv 2207.07061): where recursions have corrections, by the weights of the
                first recursion that they do not take
"""

from __future__ import annotations

import torch
from torch import Tensor

from reason.backbones.decoder import LayerUse, Rope, rope_at
from reason.methods.mor.active import ActiveTokens

KV_MODES = ("recursion", "sharing", "hybrid", "deepest", "propagate")


class VisibleKeys:
    """Keys and values of one forward pass.

    rope: of every position, (T, d_h / 2) twice.
    """

    def __init__(self, kv_mode: str, rope: Rope):
        self.kv_mode, self.rope = kv_mode, rope
        self.active_rope = rope  # of the active tokens of the latest step
        # layer -> (B T, h_kv, d_h) twice: the keys and values of all tokens
        self.all_keys: dict[int, tuple[Tensor, Tensor]] = {}
        self.active: Tensor | None = None  # flat positions of the tokens active at the latest step
        self.exited: Tensor | None = None  # and of those active at the step before, and not at this one

    def apply_layer(
        self, layer: LayerUse, j: int, step: int, x: Tensor, active: ActiveTokens, exit_states: Tensor | None
    ) -> Tensor:
        """Layer ``j`` of the block at ``step`` (from 0) over the active tokens: (n, D) -> (n, D). Layers are applied in
        their order.

        exit_states: (B T, D) states of all tokens before this step, where ``needs_exit_states``.
        """
        if j == 0:
            self.active_rope = rope_at(self.rope, active.position)
        rope = self.active_rope
        if self.kv_mode == "recursion":
            return layer(x, rope, active.attend_active)
        if self.kv_mode == "propagate" and j == 0:
            before, self.active = self.active, active.index
            self.exited = None if before is None else before[~torch.isin(before, active.index)]
        if step == 0:

            def store(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                self.all_keys[j] = self._scatter(k, active), self._scatter(v, active)
                return active.attend_active(q, k, v)

            return layer(x, rope, store)
        if self.kv_mode == "sharing":
            return layer.finish(x, active.attend_all(layer.queries(x, rope), *self._by_sequence(j, active)))
        if self.kv_mode == "propagate":
            assert exit_states is not None
            self._add_exit_keys(layer, j, exit_states, active.length)

        def update(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            before = self.all_keys[j]
            self.all_keys[j] = _replace(before, active.index, (k, v))
            out = active.attend_all(q, *self._by_sequence(j, active))
            if self.kv_mode == "hybrid":
                self.all_keys[j] = before
            return out

        return layer(x, rope, update)

    @property
    def needs_exit_states(self) -> bool:
        return self.kv_mode == "propagate"

    def _add_exit_keys(self, layer: LayerUse, j: int, exit_states: Tensor, length: int) -> None:
        """Keys and values of the tokens that have just exited, from their states."""
        assert self.exited is not None
        rope = rope_at(self.rope, self.exited % length)
        keys = layer.keys_values(exit_states[self.exited], rope)
        self.all_keys[j] = _replace(self.all_keys[j], self.exited, keys)

    def _scatter(self, x: Tensor, active: ActiveTokens) -> Tensor:
        whole = x.new_zeros(active.batch * active.length, *x.shape[1:])
        return whole.index_copy(0, active.index, x)

    def _by_sequence(self, j: int, active: ActiveTokens) -> tuple[Tensor, Tensor]:
        k, v = (x.unflatten(0, (active.batch, active.length)) for x in self.all_keys[j])
        return k, v


def _replace(old: tuple[Tensor, Tensor], index: Tensor, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values with the rows at ``index`` replaced."""
    (k, v), (new_k, new_v) = old, new
    return k.index_copy(0, index, new_k), v.index_copy(0, index, new_v)
