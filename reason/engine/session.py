"""A method brought to life: network built, data at hand, ready to train, judge or answer.

A run's workers use it; ``open_run`` uses it on a finished one, for `predict`, `inspect` and
``reason.load``, and opens no data then: the run holds what answering needs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reason import registry
from reason.engine.checkpoint import load_model, load_tensors, network_state, save_model, trained_state
from reason.engine.config import restore
from reason.engine.memory import enough_memory
from reason.engine.meter import silent
from reason.engine.parallel import World, choose_device, threads_of
from reason.engine.plan import Plan, check_depth
from reason.errors import RunError
from reason.files import read_json, sha256, write_json
from reason.methods.base import Context, Method
from reason.methods.figures import Figure
from reason.tracking.folder import FINISHED, RunFolder
from reason.tracking.result import Result

MODEL = "model/model.safetensors"
CALIBRATION = "calibration.json"


@dataclass
class Session:
    """One method with its network in one world."""

    plan: Plan
    world: World
    method: Method
    ctx: Context
    network: nn.Module

    @classmethod
    def begin(
        cls, plan: Plan, world: World, workdir: Path, log: Callable[[str, float, int], None] = lambda *_: None,
        owner: Path | None = None, *, with_data: bool = True,
    ) -> Session:  # fmt: skip
        """Load the data and build the network, its initial weights a function of the seed alone.

        owner: the folder of the run whose model this is to be; None: ``workdir``.
        with_data: False leaves the data closed until somebody asks ``ctx`` for it.
        """
        config = plan.config
        method: Method = registry.resolve(plan.card.target)(config)

        def opened(section: str = "backbone", **sizes: Any) -> nn.Module:
            keys = functools.reduce(getattr, section.split("."), config)
            card = registry.card("backbones", keys.name)
            return registry.resolve(card.target)(keys, **sizes)

        ctx = Context(
            config=config,
            open=opened,
            load_dataset=functools.partial(load_dataset, plan),
            load_data=functools.cache(lambda: method.data(ctx)),
            device=world.device,
            rank=world.rank,
            world_size=world.size,
            log=log,
            workdir=workdir,
            owner=owner or workdir,
            meter=silent(world.device),
        )
        if with_data:
            ctx.load_data()  # before the seed is set: what reading draws must not move the weights
        torch.manual_seed(config.seed)
        network = method.build(ctx)
        return cls(plan, world, method, ctx, network.to(world.device))

    def keep_trained(self, wrapped: nn.Module, folder: RunFolder, train_hash: str) -> None:
        """Write what was trained under the run's ``model/``. Every rank calls.

        A network that FSDP2 has cut up is replaced by a whole one with the same weights.
        """
        if self.world.mode == "fsdp2":
            tensors = network_state(wrapped)
            torch.manual_seed(self.plan.config.seed)
            self.network = self.method.build(self.ctx).to(self.world.device)
            for name, tensor in trained_state(self.network).items():
                if self.world.is_main:
                    tensor.copy_(tensors[name])
                self.world.broadcast(tensor)
        if self.world.is_main:
            meta = {"train_hash": train_hash, "method": self.plan.card.name}
            save_model(self.network, folder / MODEL, meta)

    def load_model(self, folder: RunFolder, train_hash: str) -> None:
        """Weights that a run trained. A method that trains nothing has its network already.

        Raises:
            RunError: absent, corrupt, altered, or of another configuration.
        """
        if self.plan.trains:
            with remake(folder):
                load_model(self.network, folder / MODEL, train_hash)

    def calibrate(self, folder: RunFolder, owner: RunFolder) -> None:
        """Fit what the method fits after training, and keep it in ``folder``. Every rank calls.

        owner: the run whose model this is.
        """
        self.network.eval()
        with torch.no_grad():
            fitted = self.method.calibrate(self.ctx, self.network, self.ctx.data.fit)
        fitted = self.world.same(fitted)
        self.ctx.calibration = fitted
        if self.world.is_main and fitted is not None:
            write_json(folder / CALIBRATION, {**_fitted_to(folder, owner), "fitted": fitted})

    def load_calibration(self, folder: RunFolder, owner: RunFolder) -> None:
        """What ``calibrate`` kept.

        Raises:
            RunError: it cannot be read, or was fitted to another model or other data.
        """
        path, again = folder / CALIBRATION, f"Fit it again with: reason evaluate {folder.path}"
        if not path.exists():
            return
        try:
            kept = read_json(path)
            fitted = kept["fitted"]
        except (ValueError, KeyError, TypeError) as error:
            again = f"Fit it again with: reason resume {folder.path}"
            raise RunError(f"{path} is not a valid calibration: {error}.", again) from error
        for key, mine in _fitted_to(folder, owner).items():
            if kept.get(key) != mine:
                what = {"model": "model", "data_digest": "dataset"}[key]
                raise RunError(
                    f"{path} was fitted to a different {what} ({str(kept.get(key))[:8]}, now {mine[:8]}): "
                    "its thresholds do not apply.",
                    again,
                )
        self.ctx.calibration = fitted


_datasets: dict[str, Any] = {}  # the last two, by their configuration


def load_dataset(plan: Plan) -> Any:
    """The plan's dataset. Loaded once per process and configuration: a dataset never changes."""
    config = plan.config
    key = json.dumps({k: v for k, v in plan.flat.items() if k.startswith("dataset.")}, sort_keys=True)
    if key not in _datasets:
        card = registry.card("datasets", config.dataset.name)
        loaded = registry.resolve(card.target)(config.dataset, offline=config.offline)
        while len(_datasets) > 1:
            _datasets.pop(next(iter(_datasets)))
        _datasets[key] = loaded
    return _datasets[key]


def _fitted_to(folder: RunFolder, owner: RunFolder) -> dict[str, str]:
    """What a calibration holds for: the model and the data, each by a digest."""
    identity = folder.identity
    model = sha256(owner / MODEL) if (owner / MODEL).exists() else identity["train_hash"]
    return {"model": model, "data_digest": identity["data_digest"]}


class LoadedRun:
    """A finished run, its model in memory: what ``reason.load`` returns."""

    def __init__(self, folder: RunFolder, session: Session):
        self.folder = folder
        self.session = session

    @property
    def result(self) -> Result:
        """The run's result.json."""
        result = self.folder.result
        if result is None:
            raise RunError(
                f"{self.folder.name} has lost its result.json.",
                f"`reason resume {self.folder.path}` makes it anew.",
            )
        return result

    def predict(self, requests: Sequence[dict[str, Any]], depth: int | None = None) -> list[dict[str, Any]]:
        """Answer requests at ``depth`` (default: the run's). One answer per request, in order."""
        s, plan = self.session, self.session.plan
        at: int = plan.config.depth if depth is None else depth
        check_depth(at, plan.config.train_depth, plan.card.depth)
        with torch.inference_mode(), enough_memory(plan):
            return s.method.predict(s.ctx, s.network.eval(), requests, at)

    def inspect(self, example: str = "") -> list[Figure]:
        """Figures of what happened on one example."""
        s = self.session
        with torch.no_grad(), enough_memory(s.plan):
            return s.method.inspect(s.ctx, s.network.eval(), example)


def recorded_plan(folder: RunFolder, overrides: dict[str, Any] | None = None) -> Plan:
    """The plan that a run was made by, with ``overrides`` on top. Sources that are stages name their runs."""
    identity = folder.identity
    plan = restore(identity["experiment"], folder.config, overrides)
    plan.written = {k: v for k, v in identity.get("written", {}).items() if k not in (overrides or {})}
    for key, name in identity.get("stages", {}).items():
        section, _, leaf = key.rpartition(".")
        keys = functools.reduce(getattr, section.split("."), plan.config)
        setattr(keys, leaf, f"run:{folder.path.parent.absolute() / name}")
    return plan


def open_run(folder: RunFolder) -> LoadedRun:
    """Load a finished run's model onto one device of this machine, whatever it was trained on.

    Raises:
        RunError: the run is not finished, or its model is gone or does not fit.
    """
    if folder.status != FINISHED:
        raise RunError(f"{folder.name} is {folder.status}: it has no model yet.", folder.unfinished)
    plan = recorded_plan(folder, {"hardware.device": "auto", "hardware.gpus": 0})
    kind, _ = choose_device(plan.config.hardware)
    torch.set_num_threads(threads_of(plan.config.hardware, 1))
    owner = model_owner(folder)
    here = World(0, 1, torch.device(kind))
    with enough_memory(plan):
        session = Session.begin(plan, here, folder.path, owner=owner.path, with_data=False)
        session.load_model(owner, folder.identity["train_hash"])
    session.load_calibration(folder, owner)
    return LoadedRun(folder, session)


@contextmanager
def remake(folder: RunFolder) -> Iterator[None]:
    """Errors about the model that a run has trained say how it is made again, if they say nothing else."""
    try:
        yield
    except RunError as error:
        error.hint = error.hint or f"Make it again from its checkpoints with: reason resume {folder.path}"
        raise


def check_model(folder: RunFolder) -> None:
    """Read the model that a run has trained. Costs what reading and hashing the file cost.

    Raises:
        RunError: absent, corrupt, altered, or of another configuration.
    """
    with remake(folder):
        load_tensors(folder / MODEL, train_hash=folder.identity["train_hash"])


def model_owner(folder: RunFolder) -> RunFolder:
    """The run folder that holds the model this run used: its own or the one it was trained by.

    Raises:
        RunError: the run that trained it is not beside it.
    """
    owner = folder.identity.get("trained_by")
    if owner is None:
        return folder
    beside = RunFolder(folder.path.parent / owner)
    if not (beside / "run.json").is_file():
        raise RunError(
            f"The model of {folder.name} was trained by {owner}, which is not in the same folder.",
            f"Copy {owner} into {folder.path.parent}.",
        )
    return beside
