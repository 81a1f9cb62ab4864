"""What a run came to: the content of ``result.json``, written and read through the dataclasses here.

Numbers stand at four levels: a ``Measure`` is one metric with its interval, an ``Outcome`` one way of answering
the examples, a ``Judged`` the method at one depth with its times and rivals, a ``Result`` the whole run. The
``result.json`` of a sweep is a ``SweepResult``.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from reason.metrics.statistics import Interval

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

    @property
    def interval(self) -> Interval:
        from reason.metrics.statistics import Interval  # needs numpy, which a list of runs does without

        return Interval(self.value, self.low, self.high, self.n)


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
    bound: bool = False  # a rival that is shown and never ranked
    variant_of: str = ""  # the rival that this one is with another budget
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    latency_n: int = 0  # requests that were timed


@dataclass(frozen=True, kw_only=True)
class Judged(Outcome):
    """The method at one depth."""

    depth: int
    effective_depth: float | None = None  # mean over examples of the depth that was used
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
    files: dict[str, Any] = field(default_factory=dict)  # of the run folder -> its size and checksum
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if all(judged.depth != self.depth for judged in self.curve):
            raise ValueError(f"has no depth {self.depth} in its curve")

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


@dataclass(frozen=True)
class SweepTrial:
    """One trial of a sweep, and what became of it."""

    varied: dict[str, str]  # key -> value
    run: str | None  # its run folder, where it has one
    problem: str = ""  # why it has no result


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A finished sweep."""

    run: str
    experiment: str
    trials: list[SweepTrial]  # in the order of execution
    metrics: dict[str, float]  # sums over the trials, as MLflow shows them
    kind: str = "sweep"
    schema: int = SCHEMA


Kind = TypeVar("Kind", Result, SweepResult)


def to_json(value: Result | SweepResult) -> dict[str, Any]:
    """The content of ``result.json``."""
    return dataclasses.asdict(value)


def from_json(kind: type[Kind], value: dict[str, Any]) -> Kind:
    """The content of a ``result.json`` as what it describes. Keys that ``kind`` does not know are left out.

    Args:
        kind: ``Result`` or ``SweepResult``.
    Raises:
        ValueError: another schema, a key that is missing, or a value that is not of its type. The message goes on
            from the name of the file: "has no units.depth".
    """
    schema = value.get("schema")
    if schema != SCHEMA:
        known = "has no schema" if schema is None else f"has schema {schema!r}"
        raise ValueError(f"{known}, this version reads {SCHEMA}")
    return _read(kind, value, "")


def _read(kind: Any, value: Any, at: str) -> Any:
    """JSON data as what ``kind`` declares; ``at`` says where in the file it stands."""
    if type(value) in _SCALARS.get(kind, ()) or kind is Any:
        return value
    origin, arguments, is_dataclass = _form(kind)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in arguments if a is not type(None))
        return None if value is None else _read(inner, value, at)
    if isinstance(value, dict) and is_dataclass:
        found = {}
        for key, (declared, needed) in _keys(kind).items():
            where = f"{at}.{key}" if at else key
            if key in value:
                found[key] = _read(declared, value[key], where)
            elif needed:
                raise ValueError(f"has no {where}")
        return kind(**found)
    if isinstance(value, dict) and origin is dict:
        return {k: _read(arguments[1], v, f"{at}.{k}") for k, v in value.items()}
    if isinstance(value, list) and origin is list:
        return [_read(arguments[0], v, f"{at}[{i}]") for i, v in enumerate(value)]
    name = "an object" if is_dataclass or origin is dict else _NAMES.get(kind, "a list")
    raise ValueError(f"has a value at {at} that is not {name}")


_SCALARS = {str: (str,), bool: (bool,), int: (int,), float: (float, int)}
_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


@functools.cache
def _form(kind: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """Of a declared type, its origin, its arguments, and whether it is a dataclass."""
    return typing.get_origin(kind), typing.get_args(kind), dataclasses.is_dataclass(kind)


@functools.cache
def _keys(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Of each field of a dataclass, its type and whether it has to be there."""
    hints = typing.get_type_hints(kind)
    return {f.name: (hints[f.name], f.default is f.default_factory is MISSING) for f in fields(kind)}
