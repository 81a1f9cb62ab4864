"""Which layers of a deep network are one and the same: four ways to build it from fewer.

Bae et al., "Mixture-of-Recursions", arXiv 2507.10524, table 5. Free of torch, so that sizes that do not
fit are refused before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from reason.errors import ConfigError, unknown

Scheme = Literal["cycle", "sequence", "middle_cycle", "middle_sequence"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


@dataclass(frozen=True)
class Sharing:
    """A network of ``layers`` layers in which a block of ``block`` physical ones is used ``recursions`` times.

        cycle            0 1 2  0 1 2  0 1 2       the whole block is repeated
        sequence         0 0 0  1 1 1  2 2 2       each layer is repeated in its place
        middle_cycle     0  1 2 3  1 2 3  4        so is the middle; first and last layer stand alone
        middle_sequence  0  1 1 2 2 3 3   4

    One recursion is the vanilla network: every layer is its own, under any scheme.

    Raises:
        ConfigError: unknown scheme; counts below 1; recursions that do not divide the layers, with the
            nearest counts that fit.
    """

    scheme: Scheme
    layers: int  # L, as they are run
    recursions: int  # N_r

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise unknown("sharing scheme", self.scheme, SCHEMES)
        if self.recursions < 1:
            raise ConfigError(
                f"There are {self.recursions} recursions; at least 1 is needed.", "1 is the vanilla network."
            )
        middle = self.layers - self.ends
        if middle < 1 or middle % self.recursions:
            raise ConfigError(self._wrong(middle), self._mend(middle))

    @property
    def ends(self) -> int:
        """Layers that stand outside the block: 2 or 0."""
        return 2 if self.scheme.startswith("middle") else 0

    @property
    def cyclic(self) -> bool:
        """Whether the block is run as a whole, so that it can be left after any recursion."""
        return self.scheme.endswith("cycle")

    @property
    def block(self) -> int:
        """b, physical layers that are shared."""
        return (self.layers - self.ends) // self.recursions

    @property
    def unique(self) -> int:
        """Physical layers in all."""
        return self.block + self.ends

    @property
    def physical(self) -> tuple[int, ...]:
        """The physical layer behind each of the L unrolled ones. With private ends, 0 and b + 1 are those."""
        return self._unrolled(self.recursions)

    def upto(self, depth: int) -> tuple[int, ...]:
        """``physical`` of the network that stops recursing after ``depth`` times, 1 to N_r.

        Raises:
            ValueError: no such depth, or a scheme whose recursions are not whole passes.
        """
        if not 1 <= depth <= self.recursions:
            raise ValueError(f"depth is {depth}; this network recurses 1 to {self.recursions} times.")
        if depth < self.recursions and not self.cyclic:
            raise ValueError(
                f"sharing={self.scheme} repeats each layer in its place and cannot stop early: "
                f"use depth={self.recursions}, or sharing={self.scheme.replace('sequence', 'cycle')}."
            )
        return self._unrolled(depth)

    def use(self, place: int, step: int) -> tuple[int, int]:
        """(layer of the block, which use of it) at a place, below b, of the step's b layers of the unrolled middle. From 0."""
        return (place, step) if self.cyclic else divmod(step * self.block + place, self.recursions)

    def _unrolled(self, depth: int) -> tuple[int, ...]:
        inner = range(self.block * depth)
        middle = [i % self.block if self.cyclic else i // depth for i in inner]
        return (0, *(1 + i for i in middle), self.block + 1) if self.ends else tuple(middle)

    def _wrong(self, middle: int) -> str:
        if middle < 1:
            need = "its two private ends and " if self.ends else ""
            return f"backbone.layers={self.layers} is too few: {self.scheme} needs {need}at least 1 layer."
        left = f"{middle} layers between the two ends" if self.ends else f"{middle} layers"
        return (
            f"backbone.layers={self.layers} does not fit {self.recursions} recursions with "
            f"sharing={self.scheme}: {self.recursions} does not divide {left}."
        )

    def _mend(self, middle: int) -> str:
        whole = max(middle, 0) // self.recursions  # passes through the block, rounded down
        layers = [self.ends + self.recursions * b for b in (whole, whole + 1) if b]
        hint = "Nearest: backbone.layers=" + " or ".join(map(str, layers))
        if middle < 1:
            return hint + "."
        fit = [n for n in range(1, middle + 1) if middle % n == 0]
        below = max((n for n in fit if n < self.recursions), default=None)
        above = min((n for n in fit if n > self.recursions), default=None)
        return hint + ", or " + " or ".join(str(n) for n in (below, above) if n) + " recursions."
