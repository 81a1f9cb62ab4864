"""A method brought to life: data loaded, network built, ready to train, judge or answer.

The runner uses it inside a run; ``open_run`` uses it on a finished one, for `predict`, `inspect`
and ``reason.load``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reason import registry
from reason.engine.checkpoint import load_network, load_tensors, network_state, save_tensors
from reason.engine.config import restore
from reason.engine.meter import silent
from reason.engine.parallel import World, choose_device, threads_of
from reason.engine.plan import Plan, check_depth
from reason.errors import RunError
from reason.files import read_json, sha256, write_json
from reason.methods.base import Context, Method
from reason.methods.figures import Figure
from reason.tracking.folder import FINISHED, RunFolder

MODEL = "model/model.safetensors"
CALIBRATION = "calibration.json"


@dataclass
class Session:
    """One method on one dataset in one world."""

    plan: Plan
    world: World
    dataset: Any
    method: Method
    ctx: Context
    network: nn.Module

    @classmethod
    def begin(
        cls, plan: Plan, world: World, workdir: Path, log: Callable[[str, float, int], None] = lambda *_: None,
        owner: Path | None = None,
    ) -> Session:  # fmt: skip
        """Load the data and build the network, its initial weights a function of the seed alone.

        owner: the folder of the run whose model this is to be; None: ``workdir``.
        """
        config = plan.config
        dataset = load_dataset(plan)
        method: Method = registry.resolve(plan.card.target)(config)
        backbone = registry.card("backbones", config.backbone.name)
        ctx = Context(
            config=config,
            backbone=lambda **sizes: registry.resolve(backbone.target)(config.backbone, **sizes),
            dataset=dataset,
            data=None,
            device=world.device,
            rank=world.rank,
            world_size=world.size,
            log=log,
            workdir=workdir,
            owner=owner or workdir,
            meter=silent(world.device),
        )
        ctx.data = method.data(ctx)
        torch.manual_seed(config.seed)
        network = method.build(ctx)
        return cls(plan, world, dataset, method, ctx, network.to(world.device))

    def keep_trained(self, wrapped: nn.Module, folder: RunFolder, train_hash: str) -> None:
        """Write what was trained under the run's ``model/``. Every rank calls.

        A network that FSDP2 has cut up is replaced by a whole one with the same weights.
        """
        if self.world.mode == "fsdp2":
            tensors = network_state(wrapped)
            torch.manual_seed(self.plan.config.seed)
            self.network = self.method.build(self.ctx).to(self.world.device)
            for name, tensor in self.network.state_dict().items():
                if self.world.is_main:
                    tensor.copy_(tensors[name])
                self.world.broadcast(tensor)
        if self.world.is_main:
            path = folder / MODEL
            path.parent.mkdir(exist_ok=True)
            aside = path.with_name(".model.tmp")
            save_tensors(
                aside, self.network.state_dict(), {"train_hash": train_hash, "method": self.plan.card.name}
            )
            aside.rename(path)

    def load_model(self, folder: RunFolder, train_hash: str) -> None:
        """Weights that another run trained.

        Raises:
            RunError: absent, corrupt, or of another configuration.
        """
        path = folder / MODEL
        load_network(self.network, load_tensors(path, train_hash=train_hash), path)

    def calibrate(self, folder: RunFolder, owner: RunFolder) -> None:
        """Fit to validation what the method fits after training, and keep it in ``folder``. Every rank calls.

        owner: the run whose model this is.
        """
        self.network.eval()
        with torch.no_grad():
            fitted = self.method.calibrate(self.ctx, self.network, self.ctx.data.valid)
        fitted = self.world.same(fitted)
        self.ctx.calibration = fitted
        if self.world.is_main and fitted is not None:
            write_json(
                folder / CALIBRATION,
                {"model": sha256(owner / MODEL), "data_digest": self.dataset.digest, "fitted": fitted},
            )

    def load_calibration(self, folder: RunFolder, owner: RunFolder) -> None:
        """What ``calibrate`` kept.

        Raises:
            RunError: it cannot be read, or was fitted to another model or other data.
        """
        path = folder / CALIBRATION
        if not path.exists():
            return
        try:
            kept = read_json(path)
            fitted = kept["fitted"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} cannot be read as a calibration: {error}",
                f"Fit it anew: reason evaluate {folder.name}",
            ) from error
        for key, what, mine in (
            ("model", "model", sha256(owner / MODEL)),
            ("data_digest", "dataset", self.dataset.digest),
        ):
            if kept.get(key) != mine:
                raise RunError(
                    f"{path} was fitted to another {what} ({str(kept.get(key))[:8]}, here {mine[:8]}): "
                    "its thresholds mean nothing here.",
                    f"Fit it anew: reason evaluate {folder.name}",
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


def source_digest(plan: Plan) -> str:
    """Of the model that the weights begin as; "" = from scratch."""
    if not plan.source:
        return ""
    from reason.backbones.pretrained import opened

    return opened(plan.source, plan.config.offline).digest


class LoadedRun:
    """A finished run, its model in memory: what ``reason.load`` returns."""

    def __init__(self, folder: RunFolder, session: Session):
        self.folder = folder
        self.session = session

    @property
    def result(self) -> dict[str, Any]:
        """The run's result.json."""
        return self.folder.result or {}

    def predict(self, requests: Sequence[dict[str, Any]], depth: int | None = None) -> list[dict[str, Any]]:
        """Answer requests at ``depth`` (default: the run's). One answer per request, in order."""
        s = self.session
        with torch.inference_mode():
            return s.method.predict(s.ctx, s.network.eval(), requests, self._depth(depth))

    def inspect(self, example: str = "") -> list[Figure]:
        """Figures of what happened on one example."""
        s = self.session
        with torch.no_grad():
            return s.method.inspect(s.ctx, s.network.eval(), example)

    def _depth(self, depth: int | None) -> int:
        if depth is None:
            return self.session.plan.config.depth
        plan = self.session.plan
        check_depth(depth, plan.config.train_depth, plan.card.depth)
        return depth


def recorded_plan(folder: RunFolder, overrides: dict[str, Any] | None = None) -> Plan:
    """The plan that a run was made by, with ``overrides`` on top."""
    return restore(folder.identity["experiment"], folder.config, overrides)


def open_run(folder: RunFolder) -> LoadedRun:
    """Load a finished run's model onto one device of this machine, whatever it was trained on.

    Raises:
        RunError: the run is not finished, or its model is gone or does not fit.
    """
    if folder.status != FINISHED:
        raise RunError(
            f"{folder.name} is {folder.status}: it has no model yet.",
            f"Finish it with `reason resume {folder.path}`.",
        )
    plan = recorded_plan(folder, {"hardware.device": "auto", "hardware.gpus": 0})
    kind, _ = choose_device(plan.config.hardware)
    torch.set_num_threads(threads_of(plan.config.hardware, 1))
    owner = model_owner(folder)
    session = Session.begin(plan, World(0, 1, torch.device(kind)), folder.path, owner=owner.path)
    session.load_model(owner, folder.identity["train_hash"])
    session.load_calibration(folder, owner)
    return LoadedRun(folder, session)


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
            f"The model of {folder.name} belongs to {owner}, which is not beside it.",
            f"Bring {owner} into {folder.path.parent} too.",
        )
    return beside
