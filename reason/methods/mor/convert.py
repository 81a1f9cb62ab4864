"""Conversion of a pretrained language model into a recursive one: initialising its shared layers.

Initialisation is after the reference code of Bae et al., arXiv 2507.10524; the low-rank correction of each use
of a shared layer (``mor.lora``) after "Relaxed Recursive Transformers", Bae et al., arXiv 2410.20672. The first and the
last layer are copied where the scheme has private ends; with one recursion every layer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reason.backbones.config import RecursiveConfig
from reason.backbones.decoder import RecursiveDecoder
from reason.backbones.pretrained import Pretrained
from reason.backbones.sharing import Scheme, Sharing
from reason.errors import ConfigError
from reason.methods.mor.config import Init


@dataclass(frozen=True)
class Layout:
    """Which layers of a source initialise which layers of the recursive network.

    origins: for each physical layer, the source's layers whose mean it starts from; none: random.
    counterparts: for each of the L unrolled layers, the layer of the source that it stands for.
    note: which layers were left out or repeated, for people; "" if none.
    """

    sharing: Sharing
    origins: list[tuple[int, ...]]
    counterparts: list[int]
    note: str = ""

    @classmethod
    def of(cls, layers: int, scheme: Scheme, recursions: int, init: Init = "stepwise") -> Layout:
        """For a source of so many layers. Where the recursions do not divide them, the nearest number that they do
        stands for them: some are left out, or repeated, evenly.

        Raises:
            ConfigError: more recursions than there are layers to share.
        """
        ends = 2 if scheme.startswith("middle") else 0
        middle = layers - ends
        if middle < recursions:
            raise ConfigError(
                f"The source has {max(middle, 0)} layers that can be shared, too few for {recursions} recursions.",
                f"Use train_depth={middle} or less." if middle > 0 else "Use backbone.sharing=cycle, or a deeper source.",
            )  # fmt: skip
        block = int(middle / recursions + 0.5)
        sharing = Sharing(scheme, ends + block * recursions, recursions)
        first = ends // 2
        spread = [first + i for i in evenly(middle, block * recursions)]
        counterparts = [0, *spread, layers - 1] if ends else spread
        tied: list[list[int]] = [[] for _ in range(sharing.unique)]
        for index, source in zip(sharing.physical, counterparts, strict=True):
            tied[index].append(source)
        if recursions > 1 and init != "average":
            some = {
                "stepwise": evenly(middle, block), "lower": range(block), "upper": range(middle - block, middle),
            }.get(init)  # fmt: skip
            tied[first : first + block] = [[]] * block if some is None else [[first + i] for i in some]
        return cls(
            sharing,
            [tuple(one) for one in tied],
            counterparts,
            _changed(range(first, first + middle), spread),
        )


def evenly(candidates: int, count: int) -> list[int]:
    """``count`` of the numbers below ``among``, from first to last in equal steps, rounded; repeated if there are more."""
    if count == 1:
        return [0]
    return [int(i * (candidates - 1) / (count - 1) + 0.5) for i in range(count)]


def _changed(there: Sequence[int], spread: Sequence[int]) -> str:
    """What happened to layers that do not divide evenly."""
    dropped = [i for i in there if i not in spread]
    repeated = sorted({i for i in spread if spread.count(i) > 1})
    if not (dropped or repeated):
        return ""
    what, which = ("left out", dropped) if dropped else ("repeated", repeated)
    listed = ", ".join(map(str, which[:8])) + (" ..." if len(which) > 8 else "")
    return f"{len(there)} layers of the source became {len(spread)}: {what}, counted from 0: {listed}"


def convert(
    causal: Pretrained, layout: Layout, make: Callable[..., RecursiveDecoder], lora: int = 0
) -> RecursiveDecoder:
    """The recursive network, initialised from the source.

    Args:
        make: builds a ``RecursiveDecoder`` with the scheme of the layout, given its sizes.
        lora: rank of the correction of each use of a shared layer; it starts as near to the source as that rank allows.
    """
    shape, recursions = replace(causal.shape, layers=layout.sharing.layers), layout.sharing.recursions
    decoder = make(shape=shape, recursions=recursions, lora=lora if recursions > 1 else 0)
    decoder.fill(causal.tensors, layout.origins)
    return decoder if decoder.corrections is None else decoder.correct(causal.tensors, layout.counterparts)


class Teacher:
    """The source itself, frozen and in float32. Not a module: nothing of it is trained, saved or sharded. Its weights are
    read at the first use."""

    def __init__(self, causal: Pretrained):
        self.causal = causal
        self._decoder: RecursiveDecoder | None = None

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> the states (B, T, D) that its head reads."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self._network(tokens.device)(tokens)

    @property
    def head_weight(self) -> Tensor:
        """(V, D), on the device of the last call of ``states``."""
        assert self._decoder is not None
        head = self._decoder.embed if self._decoder.head is None else self._decoder.head
        return head.weight.detach()

    def _network(self, device: torch.device) -> RecursiveDecoder:
        if self._decoder is None:
            with torch.random.fork_rng(devices=[]):  # building it leaves the random state as it was
                config = RecursiveConfig(sharing="cycle")
                self._decoder = RecursiveDecoder(config, shape=self.causal.shape, recursions=1)
            self._decoder.fill(self.causal.tensors).requires_grad_(False)
        return self._decoder.to(device).eval()
