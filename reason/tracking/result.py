"""What a run came to: the content of ``result.json``, written and read through the dataclasses here.

Numbers stand at four levels: a ``Measure`` is one metric with its interval, an ``Outcome`` one way of answering
the examples, a ``Judged`` the method at one depth with its times and rivals, a ``Result`` the whole run.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Measure:
    """One metric over examples, with its 95% bootstrap interval."""

    name: str
    value: float
    low: float
    high: float
    n: int  # examples
    column: str  # of the rows: the mean of this column
    denominator: str = ""  # where named: sum of ``column`` over sum of ``denominator``
    larger_is_better: bool = True


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One way of answering the examples: on test, and on validation where it was judged there."""

    accuracy: Measure
    rows: str  # a file in the run folder, one row per example
    metrics: dict[str, Measure] = field(default_factory=dict)  # beside the accuracy
    cost: dict[str, float] = field(default_factory=dict)  # counters summed over the examples
    valid_accuracy: Measure | None = None
    valid_rows: str | None = None
    meaning: str = ""  # of a rival, for people


@dataclass(frozen=True, kw_only=True)
class Judged(Outcome):
    """The method at one depth."""

    depth: int
    effective_depth: float | None = None  # mean over examples of the depth that was used
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    latency_n: int = 0  # requests that were timed
    throughput_per_s: float | None = None
    overall: dict[str, float] = field(default_factory=dict)  # numbers that are no ratio of sums over rows
    rivals: dict[str, Outcome] = field(default_factory=dict)  # other ways, from the same samples


@dataclass(frozen=True)
class RunUnits:
    """What the numbers of a run count."""

    depth: str
    zero: str  # what depth 0 or the least depth means
    example: str
    latency: str
    throughput: str
    least: int = 0  # smallest depth


@dataclass(frozen=True)
class Training:
    """How a training went."""

    steps: int
    epochs: float
    best_step: int | None
    best_epoch: float | None
    best_valid: float | None
    stopped: str  # "planned" | "early"
    notes: list[str]
    parameters: int = 0  # that were trained


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run."""

    run: str
    experiment: str
    method: str
    backbone: str
    dataset: str
    data_digest: str
    split: str
    depth: int
    train_depth: int
    seed: int
    config_hash: str
    train_hash: str
    units: RunUnits
    curve: list[Judged]  # by depth, ascending
    metrics: dict[str, float]  # the numbers of the run's depth and its costs, as MLflow shows them
    baselines: dict[str, Outcome] = field(default_factory=dict)  # judged once
    beside: list[str] = field(default_factory=list)  # metrics that summaries show beside the accuracy
    trained_by: str | None = None  # the run whose model was used
    stages: dict[str, str] = field(default_factory=dict)  # key -> the run whose model it names
    version: int = 1  # of the method
    training: Training | None = None
    device: str = "cpu"
    device_name: str = ""
    world_size: int = 1
    threads: int = 0
    gpus: int = 0
    params_m: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)  # counts of the data
    created: float = 0.0  # time of day
    schema: int = SCHEMA

    @property
    def head(self) -> Judged:
        """The method at the run's depth."""
        return next(judged for judged in self.curve if judged.depth == self.depth)

    @property
    def accuracy(self) -> Measure:
        return self.head.accuracy

    @property
    def valid_accuracy(self) -> Measure | None:
        return self.head.valid_accuracy


def to_json(value: Any) -> Any:
    """A dataclass as JSON data."""
    return dataclasses.asdict(value)


def from_json(kind: Any, value: Any) -> Any:
    """JSON data as what ``kind`` declares. Keys that it does not know are left out.

    Raises:
        ValueError: a key is missing, or a value is not of its type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in arguments if a is not type(None))
        return None if value is None else from_json(inner, value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        declared = _hints(kind)
        if not isinstance(value, dict):
            raise ValueError(f"{kind.__name__} is not an object")
        try:
            return kind(**{k: from_json(declared[k], v) for k, v in value.items() if k in declared})
        except TypeError as error:
            raise ValueError(str(error).partition("__init__() ")[2] or str(error)) from error
    if origin is dict and isinstance(value, dict):
        return {k: from_json(arguments[1], v) for k, v in value.items()}
    if origin is list and isinstance(value, list):
        return [from_json(arguments[0], v) for v in value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Any or isinstance(value, kind):
        return value
    raise ValueError(f"{value!r} is not {getattr(kind, '__name__', kind)}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
