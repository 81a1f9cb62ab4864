"""Judge a model: join the ranks' rows, read the metrics from them, put an interval on each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
from torch import nn

from reason.engine.meter import Stopwatch, silent
from reason.engine.parallel import World
from reason.files import atomic
from reason.methods.base import Context, Evaluation, Examples, Method, Ratio
from reason.metrics.statistics import bootstrap_interval


@dataclass
class Judged:
    """An evaluation of the whole split, with what was timed on the way."""

    evaluation: Evaluation
    latency: dict[str, float | int | None]
    throughput: float | None  # units per second over all ranks

    @property
    def accuracy(self) -> float:
        return value(self.evaluation, self.evaluation.accuracy)

    @property
    def larger_is_better(self) -> bool:
        return self.evaluation.metrics[self.evaluation.accuracy].larger_is_better

    @property
    def effective_depth(self) -> float:
        return float(np.mean(_column(self.evaluation.rows, "depth_used")))


def judge(
    method: Method, ctx: Context, world: World, network: nn.Module, split: Examples, depth: int,
    *, meter: Stopwatch | None = None, limit: int = 0,
) -> Judged:  # fmt: skip
    """``method.evaluate`` on all ranks, as one evaluation, on every rank."""
    meter = meter or silent(world.device)
    here = replace(ctx, meter=meter, limit=limit)
    was_training = network.training
    network.eval()
    try:
        mine = method.evaluate(here, network, split, depth)
    finally:
        network.train(was_training)
    assert mine.rows.num_rows == len(here.shard(len(split))), "an evaluation has one row per example"
    parts = world.gather((mine.rows, mine.cost, meter.rate()))
    rows = interleave([rows for rows, _, _ in parts])
    cost: dict[str, float] = {}
    for _, counters, _ in parts:
        for name, count in counters.items():
            cost[name] = cost.get(name, 0.0) + count
    units, seconds = sum(r[0] for _, _, r in parts), max(r[1] for _, _, r in parts)
    return Judged(
        replace(mine, rows=rows, cost=cost),
        meter.latency(),
        units / seconds if seconds > 0 else None,
    )


def interleave(parts: list[pa.Table]) -> pa.Table:
    """Undo ``Context.shard``: rank r holds the rows r, r + size, r + 2 size, ..."""
    if len(parts) == 1:
        return parts[0]
    place = np.concatenate([np.arange(p.num_rows) * len(parts) + r for r, p in enumerate(parts)])
    return pa.concat_tables(parts).take(pa.array(np.argsort(place, kind="stable")))


def value(evaluation: Evaluation, name: str) -> float:
    """One metric, read from the rows."""
    numerator, denominator = _columns(evaluation.rows, evaluation.metrics[name])
    total = numerator.sum()
    return (
        float(total / denominator.sum()) if denominator is not None else float(total / max(len(numerator), 1))
    )


def report(evaluation: Evaluation, name: str, resamples: int) -> dict[str, Any]:
    """{name, value, low, high, n, column, denominator, larger_is_better} of one metric."""
    ratio = evaluation.metrics[name]
    numerator, denominator = _columns(evaluation.rows, ratio)
    low, high = bootstrap_interval(numerator, denominator, resamples=resamples)
    return {
        "name": name, "value": value(evaluation, name), "low": float(low), "high": float(high),
        "n": evaluation.rows.num_rows, "column": ratio.numerator, "denominator": ratio.denominator,
        "larger_is_better": ratio.larger_is_better,
    }  # fmt: skip


def write_rows(rows: pa.Table, path: Path) -> None:
    with atomic(path, "wb") as f:
        feather.write_feather(rows, f, compression="zstd")


def keep_ids(evaluation: Evaluation, ids: pa.ChunkedArray) -> Evaluation:
    """The same evaluation on the rows whose id is among ``ids``, in their order."""
    row_of = {key: row for row, key in enumerate(evaluation.rows.column("id").to_pylist())}
    chosen = [row_of[key] for key in ids.to_pylist()]
    return replace(evaluation, rows=evaluation.rows.take(chosen))


def _columns(rows: pa.Table, ratio: Ratio) -> tuple[np.ndarray, np.ndarray | None]:
    return _column(rows, ratio.numerator), _column(rows, ratio.denominator) if ratio.denominator else None


def _column(rows: pa.Table, name: str) -> np.ndarray:
    return rows.column(name).to_numpy().astype(np.float64)
