"""Judge a model: join the ranks' rows, read the metrics from them, put an interval on each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import torch
from torch import nn

from reason.engine.meter import Stopwatch, silent
from reason.engine.parallel import World
from reason.files import atomic
from reason.methods.base import Context, Evaluation, Method, Ratio
from reason.metrics.statistics import bootstrap_interval
from reason.tracking.result import Measure


@dataclass
class TimedEvaluation:
    """An evaluation of the whole split, with what was timed on the way."""

    evaluation: Evaluation
    latency: dict[str, Any]  # of ``Stopwatch.latency``
    rival_latency: dict[str, dict[str, Any]]  # of each rival
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
    method: Method, ctx: Context, world: World, network: nn.Module, split: Sized, depth: int,
    *, meter: Stopwatch | None = None, limit: int = 0,
) -> TimedEvaluation:  # fmt: skip
    """``method.evaluate`` on all ranks, as one evaluation, on every rank."""
    meters = {depth: meter or silent(world.device)}
    return next(judge_depths(method, ctx, world, network, split, meters, limit=limit))[1]


def judge_depths(
    method: Method, ctx: Context, world: World, network: nn.Module, split: Sized,
    meters: dict[int, Stopwatch], *, limit: int = 0,
) -> Iterator[tuple[int, TimedEvaluation]]:  # fmt: skip
    """``method.evaluate_depths`` on all ranks: each depth of ``meters`` with its evaluation, on every rank."""
    here = replace(ctx, limit=limit)
    with _judging(network):
        for depth, mine in method.evaluate_depths(here, network, split, meters):
            yield depth, _joined(here, world, len(split), mine, meters[depth])


def judge_validation(
    method: Method, ctx: Context, world: World, network: nn.Module, split: Sized, depth: int
) -> TimedEvaluation:
    """``method.validate`` on all ranks, as one evaluation, on every rank."""
    meter = silent(world.device)
    with _judging(network):
        mine = method.validate(replace(ctx, meter=meter), network, split, depth)
        return _joined(ctx, world, len(split), mine, meter)


def judge_baselines(
    method: Method, ctx: Context, world: World, network: nn.Module, split: Sized, depth: int, *, limit: int = 0
) -> dict[str, Evaluation]:  # fmt: skip
    """``method.baselines`` on all ranks: each rival's evaluation by name, on every rank."""
    meter = silent(world.device)
    here = replace(ctx, meter=meter, limit=limit)
    with _judging(network):
        found = method.baselines(here, network, split, depth).items()
        return {name: _joined(here, world, len(split), mine, meter).evaluation for name, mine in found}


@contextmanager
def _judging(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)


def _joined(ctx: Context, world: World, examples: int, mine: Evaluation, meter: Stopwatch) -> TimedEvaluation:
    """The shares of all ranks as one evaluation."""
    assert mine.rows.num_rows == len(ctx.shard(examples)), "an evaluation has one row per example"
    own = {name: rival.cost for name, rival in mine.rivals.items()}
    parts = world.gather((mine.rows, mine.cost, own, meter.rate()))
    rows, costs, rival_costs, rates = zip(*parts, strict=True)
    rivals = {n: replace(r, cost=_summed([c[n] for c in rival_costs])) for n, r in mine.rivals.items()}
    joined = replace(mine, rows=interleave(rows), cost=_summed(costs), rivals=rivals)
    units, seconds = sum(u for u, _ in rates), max(s for _, s in rates)
    timed = {n: meter.latency(r.timed_as) if r.timed_as else {} for n, r in mine.rivals.items()}
    return TimedEvaluation(joined, meter.latency(), timed, units / seconds if seconds > 0 else None)


def _summed(counters: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(c[name] for c in counters) for name in counters[0]}


def interleave(parts: Sequence[pa.Table]) -> pa.Table:
    """Undo ``Context.shard``: rank r holds the rows r, r + size, r + 2 size, ..."""
    if len(parts) == 1:
        return parts[0]
    place = np.concatenate([np.arange(p.num_rows) * len(parts) + r for r, p in enumerate(parts)])
    return pa.concat_tables(parts).take(pa.array(np.argsort(place, kind="stable")))


def value(evaluation: Evaluation, name: str) -> float:
    """One metric, read from the rows."""
    return _value(*_columns(evaluation.rows, evaluation.metrics[name]))


def _value(numerator: np.ndarray, denominator: np.ndarray | None) -> float:
    if denominator is None:
        return float(numerator.sum() / max(len(numerator), 1))
    return float(numerator.sum() / denominator.sum())


def report(evaluation: Evaluation, ratios: Mapping[str, Ratio], name: str, resamples: int) -> Measure:
    """One of ``ratios`` over the rows of an evaluation, with its interval."""
    ratio = ratios[name]
    numerator, denominator = _columns(evaluation.rows, ratio)
    low, high = bootstrap_interval(numerator, denominator, resamples=resamples)
    return Measure(
        name, _value(numerator, denominator), float(low), float(high), evaluation.rows.num_rows,
        ratio.numerator, ratio.denominator, ratio.larger_is_better,
    )  # fmt: skip


def write_rows(rows: pa.Table, path: Path) -> None:
    with atomic(path, "wb") as f:
        feather.write_feather(rows, f, compression="zstd")


def _columns(rows: pa.Table, ratio: Ratio) -> tuple[np.ndarray, np.ndarray | None]:
    return _column(rows, ratio.numerator), _column(rows, ratio.denominator) if ratio.denominator else None


def _column(rows: pa.Table, name: str) -> np.ndarray:
    return rows.column(name).to_numpy().astype(np.float64)
