"""Numbers and names as people read them, and the shades that stand for numbers: shared by all that draws."""

from __future__ import annotations

from reason.metrics.statistics import Difference, Interval

# What an accuracy counts, in one sentence. The part before @ is looked up where the whole is not.
MEANINGS = {
    "NDCG": "1 if the target is ranked first among all items, less further down, 0 below rank {k}",
    "Recall": "the share of {examples} whose target is ranked among the top {k} of all items",
    "MRR": "1 / rank of the target among all items",
    "Exact match": "the share of {examples} whose final answer is correct",
    "next-token accuracy": "the share of tokens that are predicted correctly",
}


def meaning(accuracy: str, example: str) -> str:
    """One sentence on an accuracy by its name, or ''."""
    name, _, k = accuracy.partition("@")
    return MEANINGS.get(accuracy, MEANINGS.get(name, "")).format(k=k, examples=f"{example}s")


def interval(i: Interval) -> str:
    return f"{i.value:.4f} [{i.low:.4f}, {i.high:.4f}]"


def difference(d: Difference | Interval) -> str:
    return f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"


def number(value: float | None, digits: int = 3) -> str:
    """About ``digits`` significant digits, never in powers of ten for everyday sizes; '' for None."""
    if value is None:
        return ""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0 or size >= 100:
        return f"{value:.0f}"
    if size >= 1e-4:
        places = digits - 1
        while size < 1:
            size, places = size * 10, places + 1
        while size >= 10:
            size, places = size / 10, places - 1
        return f"{value:.{max(places, 0)}f}"
    return f"{value:.{digits - 1}e}"


def tick(value: float) -> str:
    """A number at an axis: whole numbers without decimals."""
    return f"{value:,.0f}" if float(value).is_integer() else number(value)


def probability(p: float | None) -> str:
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def cell(value: object) -> str:
    """One cell of a table figure."""
    if isinstance(value, float):
        return number(value, 4)
    return "" if value is None else str(value)


_DARK, _LIGHT = (12, 34, 84), (253, 231, 76)


def shade(share: float) -> tuple[str, str]:
    """A background for a share of a range, and the ink that is legible on it, both as #rrggbb.

    Dark blue to yellow: a path that stays readable for colour-blind eyes. The ink changes where
    black and white stand out alike, at a contrast of 4.5.
    """
    share = min(1.0, max(0.0, share))
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(_DARK, _LIGHT, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}", "#000000" if share > 0.435 else "#ffffff"
