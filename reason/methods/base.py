"""The contract between a reasoning method and everything else.

The engine, the sweeps and the reports know only what stands here: a card that
describes the method without importing torch, and a ``Method`` whose
``evaluate(..., depth)`` is the same call for all of them. A method reads its
surroundings through ``Context`` alone: never the environment, never a clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

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
    bound: bool = True  # depth beyond train_depth is refused; else train_depth does not shape the model
    curve: Literal["all", "powers"] = "all"  # depths that a run judges: every integer, or powers of two

    def depths(self, deepest: int) -> list[int]:
        """The depths of a curve that ends at ``deepest``, ascending, the least one included."""
        if self.curve == "all":
            return list(range(self.least, deepest + 1))
        powers = {2**n for n in range(deepest.bit_length()) if 2**n >= self.least}
        return sorted({self.least, deepest, *powers})


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
    # Dataclass of the method's own keys, each a ``reason.keys.key`` with unit and source. It may define
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
    # False: no trainer, and no copy of a model that was only opened. Where the method's own keys decide it, its Config has
    # a property ``trains``.
    trains: bool = True
    version: int = 1  # part of the hashes; raised when what the method trains, fits or judges changes
    cohorts: tuple[Cohort, ...] = ()  # groups of examples that deeper reasoning may serve differently
    beside: tuple[str, ...] = ()  # further metrics that the summary of a run shows beside the accuracy
    # "module:function", called as f(folder, offline) of a finished run: its model, for methods that generate text with it
    # (``backbones.causal.LanguageModel``). Empty: it has none, or one of the backbone ``causal``.
    language_model: str = ""


TRACES = "traces.jsonl"  # in a run's folder, where a method writes any: see ``tracking.traces``


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


@dataclass(frozen=True)
class Rival:
    """Another way of answering the same examples at the same depth, from the same samples: best-of-n beside
    particle filtering. Its numbers are read from columns of the method's own rows, so it is paired with it.

    metrics: as those of the ``Evaluation`` it belongs to; it has the accuracy at least, under the same name.
    meaning: one line for people.
    cost: counters of its own, as in ``Evaluation``; empty = the same as the method's.
    timed_as: the name that its requests were timed under (``Meter.request``); "" = none were.
    bound: it answers with knowledge that nobody has (the oracle), so it is shown and never ranked.
    variant_of: the rival that this is with another budget; its own name begins with that one's: "best-of-n at
        equal tokens" is "best-of-n". Reports keep variants together, after the others.
    """

    meaning: str
    metrics: dict[str, Ratio]
    cost: dict[str, float] = field(default_factory=dict)
    timed_as: str = ""
    bound: bool = False
    variant_of: str = ""


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
    rivals: further outcomes of these examples by name; the same names at every depth.
    """

    rows: pa.Table
    accuracy: str
    metrics: dict[str, Ratio]
    cost: dict[str, float] = field(default_factory=dict)
    overall: Callable[[pa.Table], dict[str, float]] | None = None
    rivals: dict[str, Rival] = field(default_factory=dict)


class Examples(Protocol):
    """A split as the trainer and the methods read it: sized, ordered by seed, batched by index."""

    def __len__(self) -> int: ...

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """A permutation of range(len) for one epoch; consecutive runs of batch_size form batches."""
        ...

    def batch(self, index: np.ndarray) -> dict[str, Tensor]:
        """Collate the examples at ``index`` (n,) into CPU tensors whose first axis is n."""
        ...


class Splits(Protocol):
    """What ``Method.data`` returns: the splits by their use, none of them used for anything else.

    train: what the weights are learnt from. valid: chooses epochs and depths. fit: what is fitted to a trained
    model (thresholds, temperatures, a router) is fitted to these. test: what is reported. ``info`` is
    printed and logged (users, items, windows, tokens).
    """

    @property
    def train(self) -> Examples: ...
    @property
    def valid(self) -> Sized: ...
    @property
    def fit(self) -> Sized: ...
    @property
    def test(self) -> Sized: ...
    @property
    def info(self) -> dict[str, Any]: ...


Data = TypeVar("Data", bound=Splits)
Cases = TypeVar("Cases", bound=Sized)  # the type of ``valid``, ``fit`` and ``test``
Network = TypeVar("Network", bound="nn.Module")


class Meter(Protocol):
    """The only clock that a method sees."""

    def request(self, name: str = "") -> AbstractContextManager[None]:
        """Time one request at batch 1 (device synchronised on both sides). Warm-up calls are dropped.

        name: of the rival that answers it (``Rival.timed_as``); "" = the method.
        """
        ...

    def requests(self, examples: int) -> Iterator[int]:
        """Indices of the examples to time, warm-up first: a seeded, spread-out sample."""
        ...

    def batch(self, units: int | Callable[[], int]) -> AbstractContextManager[None]:
        """Time one batched call that serves ``units`` of the throughput unit; a function is asked when it is over."""
        ...

    def now(self) -> float:
        """Seconds on a clock that only goes forward, the device synchronised."""
        ...


class Opener(Protocol):
    """How a method gets its networks: each section of the configuration that names a backbone is one."""

    def __call__(self, section: str = "backbone", **sizes: Any) -> Any:
        """A network of the section's class and keys, on CPU. ``sizes`` are arguments of that class.

        section: dotted, such as ``particle.reward``.
        """
        ...


@dataclass
class Context(Generic[Data]):
    """All that a method may know of the run it is part of."""

    config: Any  # the resolved RunConfig: config.depth, config.train_depth, config.latent.loss ...
    open: Opener  # ctx.open(**sizes) -> nn.Module of the section `backbone`; ctx.open("particle.reward")
    load_dataset: Callable[[], Any]  # behind ``dataset`` and ``data``; a second call costs nothing
    load_data: Callable[[], Data]
    device: torch.device
    rank: int
    world_size: int
    log: Callable[[str, float, int], None]  # log(name, value, step)
    workdir: Path  # a folder of the run, for files the method wants to keep
    owner: Path  # the folder of the run that trains the model, or has trained it: often this one
    meter: Meter
    limit: int = 0  # judge at most this many examples of a split; 0 = all
    calibration: Mapping[str, Any] | None = None  # what ``Method.calibrate`` found; None while training

    @property
    def dataset(self) -> Any:
        """The dataset (see reason.datasets.base). Loaded when first asked for: a finished run answers without it."""
        return self.load_dataset()

    @property
    def data(self) -> Data:
        """What ``Method.data`` made of the dataset, made when first asked for."""
        return self.load_data()

    def shard(self, examples: int) -> np.ndarray:
        """The indices of 0..examples-1 that this rank judges; over ranks each appears once.

        A limit takes examples spread evenly over the split.
        """
        from reason.datasets.subsets import evenly_spaced

        return evenly_spaced(examples, self.limit)[self.rank :: self.world_size]


class Method(ABC, Generic[Data, Cases, Network]):
    """One way of giving a model more reasoning. Stateless between calls except through the model.

    ``Method[MySplits, MyCases, MyNetwork]`` gives the arguments below their types; a bare ``Method`` will do.
    """

    def __init__(self, config: Any):
        self.config = config  # the resolved RunConfig

    @abstractmethod
    def data(self, ctx: Context[Data]) -> Data:
        """Turn ``ctx.dataset`` into the splits that this method trains and is judged on."""

    @abstractmethod
    def build(self, ctx: Context[Data]) -> Network:
        """The network, on CPU, initialised from torch's global random state (already seeded).

        Parameters that do not train have ``requires_grad`` off; they are not saved, so building again must bring
        them back. What the sizes of the network and its answers need of the data is written into
        ``ctx.workdir`` on rank 0, and read from ``ctx.owner`` where a trained model lies there: a finished run
        needs nothing but itself.
        """

    def loss(self, model: Network, batch: dict[str, Tensor], step: Step) -> Losses:
        """The training objective of one micro-batch. Every parameter that trains takes part in every step.

        Not called where the card says ``trains=False``.
        """
        raise TypeError(f"{type(self).__name__} has no loss; its card must say trains=False")

    def counts(self, model: Network, batch: dict[str, Tensor], step: Step) -> dict[str, float]:
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

    def param_groups(self, model: Network) -> list[dict[str, Any]]:
        """Optimiser groups; ``lr_scale`` and ``weight_decay`` are read. Default: one group."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def after_step(self, model: Network, step: Step) -> None:
        """Called after each optimiser step, e.g. for a router's balance bias."""
        return None

    def check(self, ctx: Context[Data], model: Network) -> None:
        """Refuse what this network on this machine cannot do, before anything is trained."""
        return None

    def calibrate(self, ctx: Context[Data], model: Network, fit: Cases) -> dict[str, Any] | None:
        """Fit thresholds and temperatures to a trained model, on ``Splits.fit`` only.

        Returns JSON data; sentences under "notes" are told to people. The engine keeps it with the
        run, bound to the model and the data by hash, and hands it back as ``ctx.calibration`` to
        ``evaluate``, ``predict`` and ``inspect``. Every run calibrates for itself, one that took over
        another's model too, so that what is fitted may depend on keys of evaluation. On several ranks the
        first one's answer counts.
        """
        return None

    @abstractmethod
    def evaluate(self, ctx: Context[Data], model: Network, split: Cases, depth: int) -> Evaluation:
        """Judge this rank's share (``ctx.shard``) of ``split`` at ``depth``; the engine joins the ranks."""

    def evaluate_depths(
        self, ctx: Context[Data], model: Network, split: Cases, meters: Mapping[int, Meter]
    ) -> Iterator[tuple[int, Evaluation]]:
        """``evaluate`` at each depth of ``meters``, ascending, timed by its meter.

        Override it where several depths can be judged from the same samples.
        """
        for depth, meter in meters.items():
            yield depth, self.evaluate(replace(ctx, meter=meter), model, split, depth)

    def validate(self, ctx: Context[Data], model: Network, split: Cases, depth: int) -> Evaluation:
        """What training calls to choose its best weights: ``evaluate``, or something cheaper that ranks models alike."""
        return self.evaluate(ctx, model, split, depth)

    def baselines(
        self, ctx: Context[Data], model: Network, split: Cases, depth: int
    ) -> dict[str, Evaluation]:
        """Rivals that are judged once, at the run's depth, on the same share of ``split``: trivial ones
        (popularity, unigrams), and what needs samples of its own (greedy). Rivals from the same samples at every
        depth belong into ``Evaluation.rivals``."""
        return {}

    def predict(
        self, ctx: Context[Data], model: Network, requests: Sequence[dict[str, Any]], depth: int
    ) -> list[dict[str, Any]]:
        """Answer requests, one JSON object each, in order. A bad request gets {"error": ...}."""
        raise ValueError(f"{type(self).__name__} does not answer requests")

    def inspect(self, ctx: Context[Data], model: Network, example: str) -> list[Figure]:
        """Show what happened on one example ('' = the method's choice), as figures."""
        raise ValueError(f"{type(self).__name__} has nothing to inspect")
