"""Configuration: from a name and some ``key=value`` words to one resolved, validated plan.

Every layer (preset, experiments file, ``-c`` file, environment, command line) holds dotted keys and
*text*; the text takes the type its field declares (``typed.py``), so a value means the same wherever it
is written and a string such as ``00123`` stays what it is. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reason import registry
from reason.engine import layers
from reason.engine.plan import Plan, check_depth
from reason.engine.typed import Draft, resolved
from reason.errors import ConfigError
from reason.keys import key, marked, walk
from reason.methods.base import MethodCard

# --- the sections every run has ---------------------------------------------------------------------


@dataclass
class TrainConfig:
    """How a model is trained. Counts are global: they do not change with the number of ranks."""

    epochs: int = key(30, "passes over the training examples; 0 (and steps=0) = evaluate the initial model")
    steps: int = key(0, "optimizer steps; above 0, it replaces epochs")
    batch_size: int = key(64, "examples per optimizer step, over all ranks and micro-batches")
    accumulate: int = key(1, "micro-batches per optimizer step on each rank (gradient accumulation)")
    optimizer: Literal["adamw", "adam", "sgd"] = key("adamw", "the optimizer; adamw decouples weight decay")
    lr: float = key(1e-3, "peak learning rate")
    weight_decay: float = key(0.0, "weight decay; decoupled for adamw, an L2 penalty for adam and sgd")
    beta1: float = key(0.9, "decay rate of the first moment (adam, adamw); momentum (sgd)")
    beta2: float = key(0.999, "decay rate of the second moment (adam, adamw)")
    schedule: Literal["constant", "linear", "cosine", "trapezoid"] = key(
        "constant", "learning rate schedule after the warmup"
    )
    warmup: float = key(0.0, "fraction of the planned steps over which the learning rate rises from 0")
    cooldown: float = key(0.2, "trapezoid: fraction of planned steps over which the learning rate falls to 0")
    clip: float = key(1.0, "maximum gradient norm; 0 = no clipping")
    precision: Literal["fp32", "bf16"] = key("fp32", "bf16 = mixed precision (autocast), weights in fp32")
    every: int = key(0, "steps between validations, each followed by a checkpoint; 0 = once per epoch")
    patience: int = key(5, "validations without improvement before training stops; 0 = no early stopping")

    def __post_init__(self):
        _at_least(self, "train", epochs=0, steps=0, batch_size=1, accumulate=1, every=0, patience=0, clip=0)
        _within(self, "train", warmup=(0, 1), cooldown=(0, 1), beta1=(0, 1), beta2=(0, 1))
        if not 0 < self.lr < math.inf:
            raise ValueError(f"train.lr is {self.lr}; it must be above 0 and finite.")
        if self.warmup + (self.cooldown if self.schedule == "trapezoid" else 0) > 1:
            raise ValueError("train.warmup and train.cooldown add up to more than 1.")
        size, parts = self.batch_size, self.accumulate
        if size < parts:
            raise ValueError(f"train.batch_size={size} cannot be divided into {parts} micro-batches.")


@dataclass
class EvalConfig:
    """How a model is judged."""

    batch_size: int = key(256, "examples per batch; throughput is measured at this batch size")
    limit: int = key(0, "most examples to evaluate and calibrate on, spread evenly over the split; 0 = all")
    curve: bool = key(True, "also evaluate every smaller depth, for a curve of accuracy against depth")
    latency_samples: int = key(100, "requests timed one by one; with fewer than 20 no p95 is reported")
    resamples: int = key(2000, "bootstrap resamples for the 95% confidence interval")

    def __post_init__(self):
        _at_least(self, "eval", batch_size=1, limit=0, latency_samples=0, resamples=100)


@dataclass
class HardwareConfig:
    """Where a run executes. Never part of a hash: the numbers must not depend on it."""

    device: Literal["auto", "cpu", "cuda", "mps"] = key("auto", "auto = cuda if available, else cpu")
    gpus: int = key(0, "number of GPUs (with device=cpu: of processes); 0 = one device, a GPU not required")
    parallel: Literal["ddp", "fsdp2"] = key("ddp", "how training is distributed over several devices")
    threads: int = key(0, "CPU threads per process; 0 = the cores, divided evenly among the processes")

    def __post_init__(self):
        _at_least(self, "hardware", gpus=0, threads=0)


def _at_least(section: Any, name: str, **least: float) -> None:
    for leaf, low in least.items():
        if not low <= getattr(section, leaf) < math.inf:
            raise ValueError(f"{name}.{leaf} is {getattr(section, leaf)}; it must be at least {low}.")


def _within(section: Any, name: str, **bounds: tuple[float, float]) -> None:
    for leaf, (low, high) in bounds.items():
        if not low <= (value := getattr(section, leaf)) <= high:
            raise ValueError(f"{name}.{leaf} is {value}; it must be between {low} and {high}.")


# --- resolving --------------------------------------------------------------------------------------


def resolve(
    name: str,
    overrides: Sequence[str] = (),
    *,
    files: Iterable[Path] = (),
    flags: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Plan:
    """Resolve a method or experiment name and its overrides into a plan.

    Args:
        name: a registered method, or an experiment of an experiments file.
        overrides: words ``key=value`` from the command line.
        files: ``-c`` files, later ones win.
        flags: dotted keys set by command-line flags (``{"hardware.gpus": 4}``); None values are unset.
        defaults: dotted keys below every other layer but the method's preset.
    Raises:
        ConfigError: an unknown name, key, choice or a value of the wrong type.
    """
    stack = [("sweep default", dict(defaults or {})), *layers.experiment_layers(name, cwd or Path.cwd())]
    stack += [(str(path), layers.flatten(layers.read_yaml(path), str(path))) for path in map(Path, files)]
    stack += layers.environment_layers(os.environ if environ is None else environ)
    stack.append(("command line", dict(map(layers.split, overrides))))
    stack.append(("command line", {k: v for k, v in (flags or {}).items() if v is not None}))
    return _assemble(name, stack)


def restore(
    experiment: str, flat_or_nested: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Plan:
    """The plan of a run that was recorded earlier, with ``overrides`` (dotted keys) on top."""
    stack = [(layers.RECORDED, layers.flatten(flat_or_nested)), ("command line", dict(overrides or {}))]
    return _assemble(experiment, stack)


def _assemble(name: str, stack: list[layers.Layer]) -> Plan:
    method = _last(stack, "method", name)
    card: MethodCard = registry.card("methods", method)
    stack = [("default", {"method": method}), (f"preset of {method}", dict(card.preset)), *stack]
    stack = [(where, {SHORTHANDS.get(k, k): v for k, v in values.items()}) for where, values in stack]
    backbone = registry.card("backbones", _last(stack, "backbone.name", card.backbone))
    kind = registry.card("backbones", card.backbone).kind  # a method works on backbones like its default one
    if backbone.kind != kind:
        fit = [c.name for c in registry.cards("backbones")[0] if c.kind == kind]
        raise ConfigError(
            f"The method {card.name!r} needs a {kind} as its backbone; {backbone.name!r} is a {backbone.kind}.",
            f"Choose a suitable backbone: {', '.join(fit)}.",
        )
    stack, dataset = _choose_dataset(stack, card)
    if card.view not in dataset.views:
        fit = [c.name for c in registry.cards("datasets")[0] if card.view in c.views]
        raise ConfigError(
            f"The method {method!r} needs {card.view!r} data; the dataset {dataset.name!r} provides {', '.join(dataset.views)}.",
            f"Choose a suitable dataset: {', '.join(fit)}.",
        )
    draft = Draft(_schema(card.name, card.Config, backbone.Config, dataset.Config), method)
    draft.merge("default", {"backbone.name": backbone.name, "dataset.name": dataset.name})
    for where, values in stack:
        draft.merge(where, values)
    _settle_depth(draft, card)
    config = draft.finish()
    for path in (k.name for k in draft.keys.values() if k.metadata.get("path") is True):
        *sections, leaf = path.split(".")  # a run may be resumed and read from anywhere
        section = functools.reduce(getattr, sections, config)
        if getattr(section, leaf) not in ("", "-", None):
            setattr(section, leaf, str(Path(getattr(section, leaf)).expanduser().absolute()))
    if settle := getattr(getattr(config, card.name), "settle", None):
        settle(config, draft.origin)
    flat = {k: operator.attrgetter(k)(config) for k in draft.keys}
    return Plan(name, card, config, flat, draft.origin, draft.written)


@functools.cache
def _schema(method: str, own: type, backbone: type, dataset: type) -> type:
    """The dataclass of a whole run of this method on this backbone and dataset."""

    def section(kind: type) -> Any:  # OmegaConf reads the class itself: checks run on what is resolved, once
        return dataclasses.field(default_factory=lambda: kind)

    keys = [
        ("method", str, key(method, "the reasoning method")),
        ("depth", int | None, key(None, "amount of reasoning at which the headline accuracy is measured")),
        ("train_depth", int | None, key(None, "depth used in training; 0 = the base, without the method")),
        ("seed", int, key(0, "seed of the data order, the initial weights and every random draw")),
        ("backbone", backbone, section(backbone)),
        ("dataset", dataset, section(dataset)),
        (method, own, section(own)),
        ("train", TrainConfig, section(TrainConfig)),
        ("eval", EvalConfig, section(EvalConfig)),
        ("hardware", HardwareConfig, section(HardwareConfig)),
        ("runs", str, key("runs", "folder in which run folders are created")),
        ("offline", bool, key(False, "do not download anything; use caches and local paths only")),
    ]
    return dataclasses.make_dataclass("RunConfig", keys)


def _settle_depth(draft: Draft, card: MethodCard) -> None:
    """Fill depth and train_depth from each other, before other keys refer to them, and refuse what cannot be."""
    axis = card.depth
    depth, train_depth = draft.value("depth"), draft.value("train_depth")
    if train_depth is not None and train_depth < 0:
        raise ConfigError(
            f"train_depth={train_depth} must be at least 0 (0 = the base, without {card.name}).",
            "Use train_depth=0 or more.",
        )
    if depth is None:
        depth = max(axis.default if train_depth is None else train_depth, axis.least)
    if train_depth is None:
        train_depth = depth
    check_depth(depth, train_depth, axis)
    draft.fill("depth", depth)
    draft.fill("train_depth", train_depth)


def _last(stack: list[layers.Layer], name: str, default: str) -> str:
    """The value of a key in the highest layer that has it, its interpolation resolved."""
    values, found = {}, ""
    for where, layer in stack:
        values |= layer
        found = where if name in layer else found
    return resolved(name, found, values) if name in values else default


SHORTHANDS = {"dataset": "dataset.name", "backbone": "backbone.name"}  # as in dataset=movielens-100k
OWN = {
    "sequences": "interactions",
    "text": "text",
    "problems": "problems",
}  # by view: the dataset that reads one's own files


def _choose_dataset(stack: list[layers.Layer], method: MethodCard) -> tuple[list[layers.Layer], Any]:
    """The dataset's card, and the layers without keys of datasets that a later layer replaced.

    A path given as the name means one's own data at that path, and NAME:TASK a task of the dataset NAME.
    """
    kept: list[layers.Layer] = []
    name = method.dataset
    everything = {k: v for _, values in stack for k, v in values.items()}
    for where, values in stack:
        written = values.get("dataset.name")
        if written is not None:
            chosen = resolved("dataset.name", where, {**everything, "dataset.name": written})
            values = {k: v for k, v in values.items() if k != "dataset.name"}
            if (whole := registry.parted("datasets", chosen))[1]:
                chosen, values = whole[0], {"dataset.task": whole[1], **values}
                written = chosen
            elif chosen not in registry.names("datasets") and _looks_like_path(chosen):
                values = {"dataset.path": written, **values}
                chosen = written = OWN[method.view]
            if chosen != name:
                gone = _replaced(name, chosen)
                kept = [(w, {k: v for k, v in lower.items() if k not in gone}) for w, lower in kept]
            name, values = chosen, {"dataset.name": written, **values}
        kept.append((where, values))
    return kept, registry.card("datasets", name)


def _replaced(old: str, new: str) -> set[str]:
    """Keys of one dataset that mean nothing, or another place, to the other."""
    before, after = (registry.card("datasets", n).Config for n in (old, new))
    shared = {k.name for k in walk(after, "dataset.")} - marked(after, "path", "dataset.")
    return {k.name for k in walk(before, "dataset.")} - shared | {"dataset.name"}


def _looks_like_path(name: str) -> bool:
    return any(mark in name for mark in ("/", "\\", "~")) or Path(name).suffix != "" or Path(name).exists()
