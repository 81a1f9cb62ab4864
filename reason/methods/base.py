"""The contract between a reasoning method and everything else.

The engine, the sweeps and the reports know only what stands here: a card that
describes the method without importing torch, and a ``Method`` whose
``evaluate(..., depth)`` is the same call for all of them. A method reads its
surroundings through ``Context`` alone: never the environment, never a clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from reason.methods.figures import Figure
from reason.metrics.ratio import Ratio

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from torch import Tensor, nn


# --- the card: torch-free, what `list`, `show` and `--dry-run` read ---------------------------------


@dataclass(frozen=True)
class DepthAxis:
    """The integer that says how much reasoning is spent."""

    unit: str  # "latent steps", "recursions", "particles"
    least: int  # smallest depth that can be evaluated
    default: int  # depth (and train_depth) when nothing is said
    zero: str  # what the least depth means, for people
    bound: bool = True  # depth beyond train_depth is refused


@dataclass(frozen=True)
class Units:
    """What the numbers of a method count."""

    example: str  # what one row of an evaluation is: "user", "document"
    accuracy: str  # name of the accuracy on default data: "NDCG@10"
    latency: str  # what one latency sample spans: "one ranked request"
    throughput: str  # "users/s", "tokens/s"


@dataclass(frozen=True)
class Cohort:
    """A way of cutting examples into groups by a column of the rows, as ``reason study`` reads it."""

    column: str  # of the rows, the same whatever the model and the depth
    label: str  # what it says of an example, for people: "items in the history"
    # Upper bounds of groups, inclusive; none = four of equal mass, ties together.
    edges: tuple[float, ...] = ()
    known: bool = True  # before the answer is, so that requests can be routed by it; a target's is not


@dataclass(frozen=True)
class MethodCard:
    """A method as the command line sees it. The entry point in group ``reason.methods`` names one."""

    name: str
    summary: str
    paper: str  # authors, title, arXiv id
    # Dataclass of the method's own keys, a comment with unit and source on every field. It may define
    # ``settle(config, origin)``: called with the whole configuration and each key's layer, to refuse or fill in
    # what depends on other sections.
    Config: type
    depth: DepthAxis
    view: str  # what it reads of a dataset: "sequences", "chats", "problems", "text"
    units: Units
    target: str  # "module:Class" of the Method, imported when used
    backbone: str  # default backbone
    dataset: str  # default dataset
    preset: Mapping[str, Any] = field(default_factory=dict)  # dotted keys over the dataclass defaults
    trains: bool = True
    cohorts: tuple[Cohort, ...] = ()  # groups of examples that deeper reasoning may serve differently
    beside: tuple[str, ...] = ()  # further metrics that the summary of a run shows beside the accuracy


def evaluation_key(default: Any) -> Any:
    """A field of a method's Config that shapes how a model is judged, not the model: a sweep over it trains once."""
    return field(default=default, metadata={"evaluation": True})


# --- what flows through it --------------------------------------------------------------------------

Losses = dict[str, tuple["Tensor", "Tensor | float"]]
"""``{name: (sum, count)}``. The trainer minimises the total of sum / count, each count summed over
ranks and accumulated micro-batches, so that a batch cut in any way gives the same gradient."""


@dataclass(frozen=True)
class Step:
    """Where training stands when ``loss`` is called."""

    epoch: int  # passes over the training examples that are complete, from 0
    step: int  # optimiser steps that are complete, from 0
    progress: float  # share of the planned training that is complete, in [0, 1]
    generator: torch.Generator  # on the device; a function of seed, step, rank and micro-batch alone


@dataclass
class Evaluation:
    """One row per example and how to read numbers from the rows.

    Because every metric is a ratio of columns, rows of several ranks can be joined, intervals
    bootstrapped and cohorts cut afterwards, by code that knows nothing of the method.

    rows: columns ``id`` (string; equal across runs on the same split), ``depth_used`` (float),
        and the columns that ``metrics`` name; further columns (rank, cohort keys) are welcome.
    accuracy: the key of ``metrics`` that is *the* accuracy.
    cost: counters summed over examples: "steps", "tokens", "flops" (multiply-adds x 2). Never times.
    overall: numbers of the evaluation as a whole that are no ratio of sums over rows (coverage of a
        catalogue), computed from the joined rows; they carry no interval.
    """

    rows: pa.Table
    accuracy: str
    metrics: dict[str, Ratio]
    cost: dict[str, float] = field(default_factory=dict)
    overall: Callable[[pa.Table], dict[str, float]] | None = None


class Examples(Protocol):
    """A split as the trainer and the methods read it: sized, ordered by seed, batched by index."""

    def __len__(self) -> int: ...

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """A permutation of range(len) for one epoch; consecutive runs of batch_size form batches."""
        ...

    def batch(self, index: np.ndarray) -> dict[str, Tensor]:
        """Collate the examples at ``index`` (n,) into CPU tensors whose first axis is n."""
        ...


@dataclass
class Splits:
    """What ``Method.data`` returns. ``info`` is printed and logged (users, items, windows, tokens)."""

    train: Examples
    valid: Examples
    test: Examples
    info: dict[str, Any] = field(default_factory=dict)


class Meter(Protocol):
    """The only clock that a method sees."""

    def request(self) -> AbstractContextManager[None]:
        """Time one request at batch 1 (device synchronised on both sides). Warm-up calls are dropped."""
        ...

    def requests(self, examples: int) -> Iterator[int]:
        """Indices of the examples to time, warm-up first: a seeded, spread-out sample."""
        ...

    def batch(self, units: int) -> AbstractContextManager[None]:
        """Time one batched call that serves ``units`` of the throughput unit."""
        ...

    def now(self) -> float:
        """Seconds on a clock that only goes forward, the device synchronised."""
        ...


@dataclass
class Context:
    """All that a method may know of the run it is part of."""

    config: Any  # the resolved RunConfig: config.depth, config.train_depth, config.latent.loss ...
    backbone: Callable[..., Any]  # factory of the chosen backbone: backbone(**sizes) -> nn.Module
    dataset: Any  # the loaded dataset (see reason.datasets.base)
    data: Any  # what Method.data made of it (Splits); None while it is being made
    device: torch.device
    rank: int
    world_size: int
    log: Callable[[str, float, int], None]  # log(name, value, step)
    workdir: Path  # a folder of the run, for files the method wants to keep
    owner: Path  # the folder of the run that trains the model, or has trained it: often this one
    meter: Meter
    limit: int = 0  # judge at most this many examples of a split; 0 = all
    calibration: Mapping[str, Any] | None = None  # what ``Method.calibrate`` found; None while training

    def shard(self, examples: int) -> np.ndarray:
        """The indices of 0..examples-1 that this rank judges; over ranks each appears once.

        A limit takes examples spread evenly over the split.
        """
        import numpy as np

        chosen = np.arange(examples)
        if 0 < self.limit < examples:
            chosen = np.unique(np.linspace(0, examples - 1, self.limit).round().astype(np.int64))
        return chosen[self.rank :: self.world_size]


class Method(ABC):
    """One way of giving a model more reasoning. Stateless between calls except through the model."""

    def __init__(self, config: Any):
        self.config = config  # the resolved RunConfig

    @abstractmethod
    def data(self, ctx: Context) -> Splits:
        """Turn ``ctx.dataset`` into the splits that this method trains and is judged on."""

    @abstractmethod
    def build(self, ctx: Context) -> nn.Module:
        """The network, on CPU, initialised from torch's global random state (already seeded)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: Step) -> Losses:
        """The training objective of one micro-batch. Every parameter takes part in every step."""

    def counts(self, model: nn.Module, batch: dict[str, Tensor], step: Step) -> dict[str, float]:
        """The counts that ``loss`` would return for this batch, without its cost.

        Needed only when micro-batches are accumulated, where the denominators must be known
        before the first backward pass. The default runs ``loss`` without gradients; override it
        where the counts can be read off the batch.
        """
        import torch

        devices = [step.generator.device] if step.generator.device.type == "cuda" else []
        state = step.generator.get_state()
        with torch.random.fork_rng(devices), torch.no_grad():
            counts = {name: float(count) for name, (_, count) in self.loss(model, batch, step).items()}
        step.generator.set_state(state)
        return counts

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimiser groups; ``lr_scale`` and ``weight_decay`` are read. Default: one group."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def after_step(self, model: nn.Module, step: Step) -> None:
        """Called after each optimiser step, e.g. for a router's balance bias."""
        return None

    def check(self, ctx: Context, model: nn.Module) -> None:
        """Refuse what this network on this machine cannot do, before anything is trained."""
        return None

    def calibrate(self, ctx: Context, model: nn.Module, valid: Examples) -> dict[str, Any] | None:
        """Fit thresholds and temperatures to a trained model, on validation data only.

        Returns JSON data; sentences under "notes" are told to people. The engine keeps it with the
        run, bound to the model and the data by hash, and hands it back as ``ctx.calibration`` to
        ``evaluate``, ``predict`` and ``inspect``. Every run calibrates for itself, one that took over another's model too, so that what is fitted may
        depend on keys of evaluation. On several ranks the first one's answer counts.
        """
        return None

    @abstractmethod
    def evaluate(self, ctx: Context, model: nn.Module, split: Examples, depth: int) -> Evaluation:
        """Judge this rank's share (``ctx.shard``) of ``split`` at ``depth``; the engine joins the ranks."""

    def baselines(self, ctx: Context, split: Examples) -> dict[str, Evaluation]:
        """Trivial rivals (popularity, majority, greedy) on the same rows; whole split, rank 0."""
        return {}

    def predict(
        self, ctx: Context, model: nn.Module, requests: Sequence[dict[str, Any]], depth: int
    ) -> list[dict[str, Any]]:
        """Answer requests, one JSON object each, in order. A bad request gets {"error": ...}."""
        raise ValueError(f"{type(self).__name__} does not answer requests")

    def inspect(self, ctx: Context, model: nn.Module, example: str) -> list[Figure]:
        """Show what happened on one example ('' = the method's choice), as figures."""
        raise ValueError(f"{type(self).__name__} has nothing to inspect")
