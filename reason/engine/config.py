"""Configuration: from a name and some ``key=value`` words to one resolved, validated plan.

Every layer (preset, experiments file, ``-c`` file, environment, command line) is flattened to
dotted keys and *text*; the text takes the type its field declares, so a value means the same
wherever it is written and a string such as ``00123`` stays what it is. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reason import registry
from reason.engine.layers import (
    Layer,
    environment_layers,
    experiment_layers,
    flatten,
    read_yaml,
    split,
)
from reason.engine.plan import Plan, check_depth
from reason.engine.typed import leaves, typed, unknown_key, values_of
from reason.errors import ConfigError
from reason.methods.base import MethodCard

# --- the sections every run has ---------------------------------------------------------------------


@dataclass
class TrainConfig:
    """How a model is trained. Counts are global: they do not change with the number of ranks."""

    epochs: int = (
        30  # passes over the training examples; 0, with steps 0 = no training: judge the model as it begins
    )
    steps: int = 0  # optimiser steps; when above 0 it replaces epochs
    batch_size: int = 64  # examples per optimiser step, over all ranks and micro-batches
    accumulate: int = 1  # micro-batches per optimiser step and rank
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"  # adamw decouples weight decay
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.0  # decoupled for adamw
    beta1: float = 0.9  # first-moment decay of adam(w); momentum of sgd
    beta2: float = 0.999  # second-moment decay of adam(w); unused by sgd
    schedule: Literal["constant", "linear", "cosine", "trapezoid"] = "constant"  # of the rate after warmup
    warmup: float = 0.0  # share of the planned steps over which the rate rises from 0
    cooldown: float = 0.2  # trapezoid: share of the planned steps over which it falls to 0
    clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 = autocast, weights stay fp32
    every: int = 0  # steps between validations, each followed by a checkpoint; 0 = an epoch
    patience: int = 5  # validations without a gain before training stops; 0 = never stops early

    def __post_init__(self):
        _at_least(self, "train", epochs=0, steps=0, batch_size=1, accumulate=1, every=0, patience=0, clip=0)
        _within(self, "train", warmup=(0, 1), cooldown=(0, 1), beta1=(0, 1), beta2=(0, 1))
        if not 0 < self.lr < math.inf:
            raise ValueError(f"train.lr is {self.lr}; it must be above 0 and finite.")
        if self.warmup + (self.cooldown if self.schedule == "trapezoid" else 0) > 1:
            raise ValueError("train.warmup and train.cooldown together exceed the whole training.")
        if self.batch_size < self.accumulate:
            raise ValueError(
                f"train.batch_size={self.batch_size} cannot be cut into {self.accumulate} micro-batches."
            )


@dataclass
class EvalConfig:
    """How a model is judged."""

    batch_size: int = 256  # examples per batched call; throughput is stated at this size
    limit: int = 0  # judge (and calibrate) on at most this many examples, spread over the split; 0 = all
    curve: bool = True  # also judge every depth below `depth`, so that a run shows its own curve
    latency_samples: int = 100  # requests timed one by one; below 20 no p95 is given
    resamples: int = 2000  # bootstrap resamples behind an interval

    def __post_init__(self):
        _at_least(self, "eval", batch_size=1, limit=0, latency_samples=0, resamples=100)


@dataclass
class HardwareConfig:
    """Where a run executes. Never part of a hash: the numbers must not depend on it."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = cuda where there is one, else cpu
    gpus: int = 0  # devices (on cpu: processes) to use; 0 = one, without insisting on a GPU
    parallel: Literal["ddp", "fsdp2"] = "ddp"  # how several devices share the training
    threads: int = 0  # CPU threads of each process; 0 = the cores shared evenly

    def __post_init__(self):
        _at_least(self, "hardware", gpus=0, threads=0)


def _at_least(section: Any, name: str, **least: float) -> None:
    for key, low in least.items():
        if not low <= getattr(section, key) < math.inf:
            raise ValueError(f"{name}.{key} is {getattr(section, key)}; it must be at least {low}.")


def _within(section: Any, name: str, **bounds: tuple[float, float]) -> None:
    for key, (low, high) in bounds.items():
        if not low <= getattr(section, key) <= high:
            raise ValueError(f"{name}.{key} is {getattr(section, key)}; it must lie in [{low}, {high}].")


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
    environ = os.environ if environ is None else environ
    cwd = Path.cwd() if cwd is None else cwd
    layers = [("default of a sweep", dict(defaults or {})), *experiment_layers(name, cwd)]
    layers += [(str(path), flatten(read_yaml(path))) for path in map(Path, files)]
    layers += environment_layers(environ)
    spoken = [split(word) for word in overrides]
    layers.append(("command line", dict(spoken)))
    layers.append(("command line", {k: v for k, v in (flags or {}).items() if v is not None}))
    return _assemble(name, layers)


def restore(
    experiment: str, flat_or_nested: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Plan:
    """The plan of a run that was recorded earlier, with ``overrides`` (dotted keys) on top."""
    layers = [("recorded run", flatten(flat_or_nested)), ("command line", dict(overrides or {}))]
    return _assemble(experiment, layers)


def _assemble(name: str, layers: list[Layer]) -> Plan:
    method = _last(layers, "method") or name
    card: MethodCard = registry.card("methods", method)
    layers = [(f"preset of {method}", dict(card.preset)), *layers]
    layers = [(where, {_shorthand(k): v for k, v in values.items()}) for where, values in layers]
    backbone = registry.card("backbones", str(_last(layers, "backbone.name") or card.backbone))
    _suits(backbone, card)
    layers, dataset = _choose_dataset(layers, card)
    if card.view not in dataset.views:
        raise ConfigError(
            f"The method {method!r} reads {card.view!r}; the dataset {dataset.name!r} offers {', '.join(dataset.views)}.",
            "Choose one that fits: "
            + ", ".join(c.name for c in registry.cards("datasets")[0] if card.view in c.views)
            + ".",
        )
    schema = _schema(card, backbone.Config, dataset.Config)
    fields = dict(leaves(schema))
    values: dict[str, Any] = {"method": method, "backbone.name": backbone.name, "dataset.name": dataset.name}
    origin = dict.fromkeys(fields, "default")
    for where, layer in layers:
        for key, text in layer.items():
            if key not in fields:
                raise unknown_key(key, where, fields, method)
            values[key], origin[key] = text, where
    config = typed(schema, fields, values, origin)
    for section in (config.backbone, config.dataset):  # a run may be resumed and read from anywhere
        for f in dataclasses.fields(section):
            if f.metadata.get("path") is True and getattr(section, f.name) not in ("", "-"):
                setattr(section, f.name, str(Path(getattr(section, f.name)).expanduser().absolute()))
    _settle_depth(config, card, origin)
    if settle := getattr(getattr(config, card.name), "settle", None):
        settle(config, origin)
    return Plan(name, card, config, dict(values_of(config)), origin)


def _suits(backbone: Any, card: MethodCard) -> None:
    """A method works on backbones of the kind of its default one."""
    kind = registry.card("backbones", card.backbone).kind
    if backbone.kind != kind:
        fit = [c.name for c in registry.cards("backbones")[0] if c.kind == kind]
        raise ConfigError(
            f"The method {card.name!r} works on a {kind}; the backbone {backbone.name!r} is a {backbone.kind}.",
            f"Choose one that fits: {', '.join(fit)}.",
        )


def _schema(card: MethodCard, backbone: type, dataset: type) -> type:
    """The dataclass of a whole run of this method on this backbone and dataset."""
    section = dataclasses.field
    return dataclasses.make_dataclass(
        "RunConfig",
        [
            ("method", str, section(default=card.name)),
            ("depth", int | None, section(default=None)),
            ("train_depth", int | None, section(default=None)),
            ("seed", int, section(default=0)),
            ("backbone", backbone, section(default_factory=backbone)),
            ("dataset", dataset, section(default_factory=dataset)),
            (card.name, card.Config, section(default_factory=card.Config)),
            ("train", TrainConfig, section(default_factory=TrainConfig)),
            ("eval", EvalConfig, section(default_factory=EvalConfig)),
            ("hardware", HardwareConfig, section(default_factory=HardwareConfig)),
            ("runs", str, section(default="runs")),
            ("offline", bool, section(default=False)),
        ],
    )


def _settle_depth(config: Any, card: MethodCard, origin: dict[str, str]) -> None:
    """Fill depth and train_depth from each other and refuse what cannot be."""
    axis = card.depth
    if config.train_depth is not None and config.train_depth < 0:
        raise ConfigError(
            f"train_depth={config.train_depth} is below the least, 0: the base without {card.name}.",
            "Use train_depth=0 or more.",
        )
    if config.depth is None:
        config.depth = axis.default if config.train_depth is None else config.train_depth
        config.depth = max(config.depth, axis.least)
    if config.train_depth is None:
        config.train_depth = config.depth
    check_depth(config.depth, config.train_depth, axis)


def _last(layers: list[Layer], key: str) -> Any:
    found = [values[key] for _, values in layers if key in values]
    return found[-1] if found else None


def _shorthand(key: str) -> str:
    """`dataset=movielens-100k` means `dataset.name=movielens-100k`."""
    return f"{key}.name" if key in ("dataset", "backbone") else key


OWN = {"sequences": "interactions", "text": "text"}  # by view: the dataset that reads one's own files


def _choose_dataset(layers: list[Layer], method: MethodCard) -> tuple[list[Layer], Any]:
    """The dataset's card, and the layers without keys of datasets that a later layer replaced.

    A path given as the name means one's own data at that path.
    """
    kept: list[Layer] = []
    name = method.dataset
    for where, values in layers:
        asked = values.get("dataset.name")
        if asked is not None:
            asked, values = str(asked), {k: v for k, v in values.items() if k != "dataset.name"}
            if asked not in registry.names("datasets") and _looks_like_path(asked):
                asked, values = OWN[method.view], {"dataset.path": asked, **values}
            if asked != name:
                gone = _replaced(name, asked)
                kept = [(w, {k: v for k, v in lower.items() if k not in gone}) for w, lower in kept]
            name, values = asked, {"dataset.name": asked, **values}
        kept.append((where, values))
    return kept, registry.card("datasets", name)


def _replaced(old: str, new: str) -> set[str]:
    """Keys of one dataset that mean nothing, or another place, to the other."""
    before, after = (dataclasses.fields(registry.card("datasets", n).Config) for n in (old, new))
    shared = {f.name for f in after if not f.metadata.get("path")}
    return {f"dataset.{f.name}" for f in before if f.name not in shared} | {"dataset.name"}


def _looks_like_path(name: str) -> bool:
    return any(mark in name for mark in ("/", "\\", "~")) or Path(name).suffix != "" or Path(name).exists()
