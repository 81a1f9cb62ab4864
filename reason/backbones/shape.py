"""The sizes of a Llama-like network: all that has to be known to build one and to count what it costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scaling:
    """Rotary frequencies stretched for a longer context than the network was first trained for.

    Without ``original`` every frequency is divided by ``factor`` ("linear"). With it ("llama3") those whose
    wave, in tokens, is shorter than original/high are left, those longer than original/low are divided,
    and between the two the share moves from one to the other.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 0  # tokens of the first context; 0 = linear


@dataclass(frozen=True)
class Shape:
    """Names as in the papers; counts of rows and columns, not of parameters."""

    vocab: int  # V, rows of the embedding; may exceed the tokens there are
    hidden: int  # D
    layers: int  # L, unrolled
    heads: int  # h
    kv_heads: int  # h_kv
    head_dim: int  # d_h
    ffn: int  # F
    tied: bool = True  # the embedding is the head
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    scaling: Scaling | None = None
    biases: bool = False  # of queries, keys and values (Qwen2)
    head_norms: bool = False  # of queries and keys, within each head (Qwen3)
    context: int = 0  # tokens it was trained to read; 0 = not known
