"""What a run will cost, before it: from the last finished run like it, else what its configuration allows at most.

Imports neither torch nor numpy, because ``--dry-run`` asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from reason.engine.layers import flatten
from reason.engine.plan import Plan
from reason.errors import ReasonError
from reason.tracking.folder import FINISHED, RunFolder
from reason.tracking.result import Judged, Result

UNITS = {"tokens": ("tokens", 1.0), "flops": ("TFLOP", 1e-12)}  # counters that are told, and in which unit
MOST = 20  # finished runs that are looked at, the newest first


def estimate(plan: Plan) -> list[str]:
    """Sentences for people; none where nothing is known."""
    if (like := _like(plan)) is not None:
        return [_from(plan, *like)]
    bound = getattr(getattr(plan.config, plan.card.name), "at_most", None)
    if bound is None:
        return []
    most = bound(plan.config)
    example = plan.card.units.example
    told = ", ".join(_told(name, most[name], "at most ") for name in UNITS if name in most)
    return [
        f"Cost: {told} for each {example} at depth {plan.config.depth}, by its own keys. No finished run is like this one, so "
        "nothing says how long it takes here; a small one does: eval.limit=20"
    ]


def _like(plan: Plan) -> tuple[RunFolder, Result] | None:
    """The newest finished run of the same experiment, else of the same method, on the same dataset and backbone."""
    same = (plan.card.name, plan.config.dataset.name, plan.config.backbone.name)
    found, _ = RunFolder.scan(
        plan.config.runs, lambda r: r["kind"] == "run" and r["method"] == plan.card.name
    )
    newest = sorted(found, key=lambda r: -r.identity["created"])[:MOST]
    for folder in sorted(newest, key=lambda r: r.identity["experiment"] != plan.experiment):
        try:
            result = folder.result if folder.status == FINISHED else None
        except ReasonError:
            continue
        if result is None or result.method != same[0] or (result.dataset, result.backbone) != same[1:]:
            continue
        if (result.training is not None) == plan.trains and any(
            set(UNITS) & set(j.cost) for j in result.curve
        ):
            return folder, result
    return None


def _from(plan: Plan, folder: RunFolder, like: Result) -> str:
    """The costs of another run, at the depths of this one: in all where both judge the same examples, else of each."""
    n = like.curve[0].accuracy.n
    recorded = flatten(folder.config)
    own = {k: v for k, v in plan.flat.items() if k.startswith("dataset.") or k == "eval.limit"}
    same = all(recorded.get(k, v) == v for k, v in own.items())
    share = 1 if same else 1 / n
    parts = []
    for name in UNITS:
        if name in like.curve[-1].cost:
            parts.append(_told(name, sum(_at(like.curve, name, d) for d in plan.depths) * share, "about "))
    hours = like.metrics.get("device_hours")
    spent = _work(like.curve, [judged.depth for judged in like.curve])
    if hours is not None and spent:
        seconds = 3600 * hours * _work(like.curve, plan.depths) / spent * share
        parts.append(
            f"about {_number(seconds)} s on {like.device_name or like.device} with everything beside it"
        )
    example = plan.card.units.example
    over = f"{n:,} {example}s of the test split" if same else f"each {example} of the test split"
    depths = ", ".join(map(str, plan.depths))
    return f"Cost, by {like.run}, of {over} at depth {depths}: {', '.join(parts)}."


def _work(curve: Sequence[Judged], depths: Iterable[int]) -> float:
    """What is proportional to the time of a run: its tokens or operations over all depths."""
    name = next((n for n in UNITS if n in curve[-1].cost), "")
    return sum(_at(curve, name, depth) for depth in depths) if name else 0.0


def _at(curve: Sequence[Judged], name: str, depth: int) -> float:
    """A counter at a depth: as it was counted, or on the straight line through its neighbours."""
    known = {j.depth: j.cost[name] for j in curve}
    if depth in known:
        return known[depth]
    if len(known) == 1:
        (only,) = known
        return known[only] * depth / max(only, 1)
    places = sorted(known)
    low, high = next(((a, b) for a, b in pairwise(places) if depth < b), (places[-2], places[-1]))
    return known[low] + (known[high] - known[low]) * (depth - low) / (high - low)


def _told(name: str, value: float, about: str) -> str:
    unit, factor = UNITS[name]
    return f"{about}{_number(value * factor)} {unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
