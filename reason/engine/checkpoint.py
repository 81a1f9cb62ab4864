"""States of training on disk: safetensors for tensors, JSON for the rest, whole or absent.

A checkpoint is a folder ``step-<n>`` written aside and renamed, so a kill or a full disk leaves
the one before. The last two are kept. Randomness needs no saving: every random number of a step
is drawn from generators seeded by (seed, step, rank, micro-batch).

Parameters that do not train (``requires_grad`` off) are not written: building the network brings them
back. The header of a model's file says which they were by a digest, so that a model is never put on others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import Optimizer

from reason.backbones.weights import digest_of, read_tensors, write_tensors
from reason.engine.parallel import World
from reason.errors import RunError
from reason.files import Altered, read_json, sealed

FORMAT = 1
KEEP = 2
# strict: what is frozen is not in a checkpoint
_FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def save_tensors(path: Path, tensors: Mapping[str, Any], meta: dict[str, Any]) -> None:
    """One safetensors file with its meaning and its digest in the header."""
    write_tensors(path, tensors, {"format": FORMAT, **meta})


def load_tensors(path: Path, **expected: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what ``save_tensors`` wrote, tensors and meaning, and check that it is what we think it is.

    Raises:
        RunError: absent, corrupt, altered, not ours, or made by another run's configuration.
    """
    try:
        tensors, meta = read_tensors(path)
    except FileNotFoundError as error:
        raise RunError(f"There is no {path}.") from error
    except Altered as error:
        raise RunError(f"{path} {error}.") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} is corrupt: {error}.") from error
    if meta is None:
        raise RunError(f"{path} was not written by reason.")
    for key, value in {"format": FORMAT, **expected}.items():
        if meta.get(key) != value:
            raise RunError(
                f"{path} belongs to another configuration: its {key} is {str(meta.get(key))[:12]}, expected {str(value)[:12]}."
            )
    return tensors, meta


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """Parameters that train, and buffers: all of a network that building it anew does not bring back."""
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def frozen_digest(network: nn.Module) -> str:
    """sha256 over names, types and bytes of the parameters that do not train; "" where all do."""
    frozen = [(n, p) for n, p in network.named_parameters() if not p.requires_grad]
    return digest_of(frozen) if frozen else ""


def save_model(network: nn.Module, path: Path, meta: dict[str, Any]) -> None:
    """What was trained of a network, atomically, and what it stands on."""
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    save_tensors(aside, trained_state(network), {**meta, "frozen": frozen_digest(network)})
    aside.rename(path)


def load_model(network: nn.Module, path: Path, train_hash: str) -> None:
    """Put what ``save_model`` wrote into a network that was built anew.

    Raises:
        RunError: absent, corrupt, of another configuration, or names, shapes or frozen weights differ.
    """
    tensors, meta = load_tensors(path, train_hash=train_hash)
    own = trained_state(network)
    wrong = sorted(own.keys() ^ tensors.keys()) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        raise RunError(
            f"{path} does not fit this network: {', '.join(wrong[:4])} differ.",
            "The code or the backbone has changed since training; train again.",
        )
    if meta.get("frozen", "") != frozen_digest(network):
        raise RunError(
            f"{path} was trained on top of different frozen weights.",
            "Restore the model that training started from, or train again.",
        )
    network.load_state_dict(tensors, strict=False)


def network_state(wrapped: nn.Module) -> dict[str, Tensor]:
    """The whole weights of the network inside a wrapped objective, on CPU; every rank calls, rank 0 gets them."""
    state = dcp.get_model_state_dict(wrapped, options=_FULL)
    return {name.removeprefix("network."): cast(Tensor, tensor) for name, tensor in state.items()}


class Checkpoints:
    """The checkpoints of one run, in its folder. Every rank calls; rank 0 writes."""

    def __init__(self, folder: Path, world: World, train_hash: str):
        self.folder, self.world, self.train_hash = folder, world, train_hash

    def save(self, step: int, wrapped: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> str:
        """Write ``step-<step>``. Returns '' or why it could not be written (the one before stands)."""
        model = dcp.get_model_state_dict(wrapped, options=_FULL)
        optim = dcp.get_optimizer_state_dict(wrapped, optimizer, options=_FULL)
        problem = ""
        if self.world.is_main:
            aside = self.folder / f".step-{step}.tmp"
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                tensors, scalars = _flatten_optimizer(optim)
                meta = {"train_hash": self.train_hash, "step": step}
                save_tensors(aside / "model.safetensors", model, meta)
                save_tensors(aside / "optimizer.safetensors", tensors, meta)
                text = json.dumps(sealed({"format": FORMAT, **meta, "optimizer": scalars, **state}), indent=1)
                (aside / "state.json").write_text(text, encoding="utf-8")
                for file in aside.iterdir():
                    with open(file, "rb") as f:
                        os.fsync(f.fileno())
                final = self.folder / f"step-{step}"
                shutil.rmtree(final, ignore_errors=True)
                aside.rename(final)
                self._prune(state)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(aside, ignore_errors=True)
                problem = str(getattr(error, "strerror", None) or error)
        return self.world.same(problem)

    def load(self, wrapped: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
        """Restore the newest checkpoint that is whole; its state, or None where there is none."""
        chosen = self.world.same(self._newest() if self.world.is_main else None)
        if chosen is None:
            return None
        path = self.folder / chosen
        model, _ = load_tensors(path / "model.safetensors", train_hash=self.train_hash)
        tensors, _ = load_tensors(path / "optimizer.safetensors", train_hash=self.train_hash)
        state = read_json(path / "state.json")
        optim = _unflatten_optimizer(tensors, state.pop("optimizer"))
        dcp.set_model_state_dict(wrapped, model, options=_FULL)
        dcp.set_optimizer_state_dict(wrapped, optimizer, optim, options=_FULL)
        return state

    def save_best(self, step: int, wrapped: nn.Module) -> str:
        """Keep these weights as the best so far, under a name that the next checkpoint refers to."""
        model = dcp.get_model_state_dict(wrapped, options=_FULL)
        problem = ""
        if self.world.is_main:
            final = self.folder / f"best-{step}.safetensors"
            aside = final.with_name(f".{final.name}.tmp")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_tensors(aside, model, {"train_hash": self.train_hash, "step": step})
                aside.rename(final)
            except (OSError, SafetensorError) as error:
                aside.unlink(missing_ok=True)
                problem = str(error)
        return self.world.same(problem)

    def load_best(self, step: int, wrapped: nn.Module) -> None:
        model, _ = load_tensors(self.folder / f"best-{step}.safetensors", train_hash=self.train_hash)
        dcp.set_model_state_dict(wrapped, model, options=_FULL)

    def _newest(self) -> str | None:
        """The newest checkpoint that reads; a corrupt one is passed over for the one before."""
        steps = [int(p.name.split("-")[1]) for p in self.folder.glob("step-*") if p.is_dir()]
        problems = []
        for step in sorted(steps, reverse=True):
            path = self.folder / f"step-{step}"
            try:
                state = read_json(path / "state.json")
                for file in ("model.safetensors", "optimizer.safetensors"):
                    load_tensors(path / file, train_hash=self.train_hash)
                if (best := state["best_step"]) is not None:
                    load_tensors(self.folder / f"best-{best}.safetensors", train_hash=self.train_hash)
                return path.name
            except (RunError, OSError, ValueError, KeyError, TypeError) as error:
                text = error.message if isinstance(error, RunError) else f"{path / 'state.json'}: {error}."
                problems.append(text)
        if problems:
            raise RunError(
                "No checkpoint of this run can be used: " + " ".join(problems),
                f"Delete {self.folder}, then train from scratch with: reason resume {self.folder.parent}",
            )
        return None

    def _prune(self, state: dict[str, Any]) -> None:
        steps = sorted(int(p.name.split("-")[1]) for p in self.folder.glob("step-*"))
        kept = steps[-KEEP:]
        for step in steps[:-KEEP]:
            shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)
        needed = {state.get("best_step")}
        for step in kept:
            with suppress(
                OSError, ValueError, KeyError, TypeError
            ):  # a damaged one is passed over on loading too
                needed.add(read_json(self.folder / f"step-{step}" / "state.json")["best_step"])
        for path in self.folder.glob("best-*.safetensors"):
            if int(path.stem.split("-")[1]) not in needed:
                path.unlink(missing_ok=True)


def _flatten_optimizer(optim: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser state dict as tensors by name, and the plain rest."""
    tensors, rest = {}, {}
    for parameter, values in optim["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}|{key}"] = value
            else:
                rest[f"{parameter}|{key}"] = value
    return tensors, {"param_groups": optim["param_groups"], "rest": rest}


def _unflatten_optimizer(tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *scalars["rest"].items()]:
        parameter, _, key = name.rpartition("|")
        state.setdefault(parameter, {})[key] = value
    return {"state": state, "param_groups": scalars["param_groups"]}
