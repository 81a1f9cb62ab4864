"""The token trie: one layout for everything that shares a prefix.

Several sequences with common prefixes are laid out once, in depth-first order.
Every token then needs a single integer, ``exit``: the physical index just past
its subtree. Attention and positions follow from it alone:

    query q sees key k   iff   k <= q < exit[k]          (k is q itself or an ancestor of q)
    position of a token  =     its depth in the trie

Multi-turn reasoning is such a trie (a spine of turns, one branch of reasoning per
turn); so are the latent steps under every prefix of a history (`Trie.comb`), many
targets under one history, and beams under one prompt. Trees that share a row are
packed side by side: no ``exit`` crosses a border, so they cannot see each other.

This module knows integers only: no model, no attention kernel, no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trie:
    """A forest of tokens in depth-first order.

    exit: (..., S) int64, index just past the subtree of each token.
    depth: (..., S) int64, number of ancestors; this is the position id.
    parent: (..., S) int64, row of the token before it on its root path; -1 at roots.
    """

    exit: Tensor
    depth: Tensor
    parent: Tensor

    def __len__(self) -> int:
        return self.exit.shape[-1]

    # --- constructors ---------------------------------------------------------------------------

    @classmethod
    def from_parents(cls, parent: Tensor | Sequence[int]) -> Trie:
        """The trie whose token i hangs under ``parent[i]`` (-1: a root). Shape (..., S).

        Raises:
            ValueError: the order is not depth-first (each parent must be the row before or one of
                its ancestors).
        """
        parent = torch.as_tensor(parent, dtype=torch.int64)
        rows = [_walk(row) for row in parent.reshape(-1, parent.shape[-1]).tolist()]
        exit = torch.tensor([row[0] for row in rows], dtype=torch.int64).reshape(parent.shape)
        depth = torch.tensor([row[1] for row in rows], dtype=torch.int64).reshape(parent.shape)
        return cls(exit.to(parent.device), depth.to(parent.device), parent)

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]]) -> tuple[Trie, Tensor, Tensor]:
        """Merge token sequences into the smallest trie that holds them all.

        Equal prefixes become the same rows. Among the children of a token the one with the longest
        remaining path comes last, so that the longest history ends the layout in one piece.

        Returns:
            the trie, its tokens (S,) int64, and the row of each sequence's last token (n,) int64.
            ``trie.path(leaf)`` gives the rows of one sequence in order.

        Raises:
            ValueError: a sequence is empty.
        """
        token, above, ends = [], [], []  # in order of insertion
        child: dict[tuple[int, int], int] = {}
        for number, sequence in enumerate(sequences):
            if not len(sequence):
                raise ValueError(f"sequence {number} is empty: a sample needs at least one token")
            node = -1
            for t in sequence:
                t = int(t)
                key = (node, t)
                if key not in child:
                    child[key] = len(token)
                    token.append(t)
                    above.append(node)
                node = child[key]
            ends.append(node)

        height = [1] * len(token)  # tokens on the longest path downwards; children come after parents
        below: list[list[int]] = [[] for _ in token]
        roots = []
        for node in range(len(token) - 1, -1, -1):
            if above[node] >= 0:
                height[above[node]] = max(height[above[node]], height[node] + 1)
        for node, up in enumerate(above):
            (below[up] if up >= 0 else roots).append(node)

        row_of, parent, tokens = [0] * len(token), [], []
        stack = sorted(roots, key=lambda n: height[n])[::-1]  # popped from the end: longest path last
        while stack:
            node = stack.pop()
            row_of[node] = len(tokens)
            tokens.append(token[node])
            parent.append(row_of[above[node]] if above[node] >= 0 else -1)
            stack.extend(sorted(below[node], key=lambda n: height[n])[::-1])
        leaves = torch.tensor([row_of[node] for node in ends], dtype=torch.int64)
        return cls.from_parents(parent), torch.tensor(tokens, dtype=torch.int64), leaves

    @classmethod
    def chain(cls, length: int) -> Trie:
        """A plain sequence of ``length`` tokens: causal attention."""
        return cls.comb(length, 0)

    @classmethod
    def comb(cls, trunk: int, branch: int) -> Trie:
        """A trunk of ``trunk`` tokens, each of which carries one branch of ``branch`` tokens.

        The layout is v0 z0,1 .. z0,K v1 z1,1 .. with v the trunk and K = branch: what one pass over a
        history needs to try K latent steps after every prefix. S = trunk * (branch + 1).
        """
        width = branch + 1
        t = torch.arange(trunk).repeat_interleave(width)  # (S,) trunk token it belongs to
        k = torch.arange(width).repeat(trunk)  # (S,) 0 on the trunk, 1..K along the branch
        row = torch.arange(trunk * width)
        on_trunk = k == 0
        exit = torch.where(on_trunk, trunk * width, (t + 1) * width)
        parent = torch.where(on_trunk, row - width, row - 1).clamp(min=-1)
        return cls(exit, t + k, parent)

    @classmethod
    def pack(cls, tries: Sequence[Trie]) -> Trie:
        """Lay 1-D tries side by side in one row; none sees another."""
        start = 0
        exit, depth, parent = [], [], []
        for trie in tries:
            assert trie.exit.dim() == 1, "pack joins 1-D tries"
            exit.append(trie.exit + start)
            depth.append(trie.depth)
            parent.append(torch.where(trie.parent < 0, -1, trie.parent + start))
            start += len(trie)
        return cls(torch.cat(exit), torch.cat(depth), torch.cat(parent))

    # --- what is read from it -------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Trie:
        return Trie(self.exit.to(device), self.depth.to(device), self.parent.to(device))

    def visible(self) -> Tensor:
        """(..., S, S) bool: [q, k] is true where row q sees row k. For tests, small tries and pictures."""
        return visible(self.exit)

    def pairs(self) -> int:
        """Number of visible (query, key) pairs: row q sees exactly depth + 1 keys."""
        return int((self.depth + 1).sum())

    def path(self, row: int) -> Tensor:
        """Rows from the root down to ``row``, (depth + 1,) int64. 1-D tries only."""
        rows = []
        parent = self.parent.tolist()
        while row >= 0:
            rows.append(row)
            row = parent[row]
        return torch.tensor(rows[::-1], dtype=torch.int64, device=self.parent.device)

    def triples(self, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss triples: which row predicts which token, and how much it counts. 1-D tries only.

        tokens: (S,) int64; weight: (S,), 0 where a token is not a label. Returns (parent_row,
        target, weight), each (n,). A row may predict several tokens (two labelled children), which
        is why a shifted label row cannot stand in for triples. Roots are predicted by nobody.

        Source: Goru et al., arXiv 2504.18246 (the labels of every turn, gathered in one pass).
        """
        labelled = ((weight != 0) & (self.parent >= 0)).nonzero().squeeze(-1)
        return self.parent[labelled], tokens[labelled], weight[labelled]


def visible(exit: Tensor, query_index: Tensor | None = None, key_index: Tensor | None = None) -> Tensor:
    """The rule itself: (..., Q, S) bool, true where ``key_index <= query_index < exit``.

    exit: (..., S), one per key. Indices are physical rows; both default to 0..S-1.
    """
    row = torch.arange(exit.shape[-1], device=exit.device)
    key = row if key_index is None else key_index
    query = (row if query_index is None else query_index).unsqueeze(-1)  # (..., Q, 1)
    return (key.unsqueeze(-2) <= query) & (query < exit.unsqueeze(-2))


def _walk(parent: list[int]) -> tuple[list[int], list[int]]:
    """Exit and depth of one row of parents, in one pass with the open root path on a stack."""
    size = len(parent)
    exit, depth = [size] * size, [0] * size
    path: list[int] = []  # rows whose subtree is still open
    for row, up in enumerate(parent):
        while path and path[-1] != up:
            exit[path.pop()] = row
        if up != -1 and not path:
            raise ValueError(
                f"row {row} hangs under row {up}, which is not the row before it nor one of that row's ancestors: "
                "put the tokens in depth-first order (-1 marks a root)"
            )
        depth[row] = len(path)
        path.append(row)
    return exit, depth
