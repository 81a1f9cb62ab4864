"""Finished runs as sources: a recursive language model that was trained here, unrolled into a vanilla one.

Read from the files of its folder: ``run.json``, ``result.json`` (there when it is finished),
``network.json`` (sizes and sharing), ``tokenizer/`` and ``model/model.safetensors``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reason.backbones.config import RecursiveConfig
from reason.backbones.decoder import RecursiveDecoder
from reason.backbones.shape import Scaling, Shape
from reason.backbones.tokens import Tokens
from reason.backbones.weights import read_tensors
from reason.errors import ConfigError, DataError
from reason.files import is_locked, read_json, write_json

NETWORK, TOKENIZER, MODEL = "network.json", "tokenizer", "model/model.safetensors"


def write_network(
    folder: Path, decoder: RecursiveDecoder, tokens: Tokens, *, lora: int, routing: str
) -> None:
    """Write into a run's folder what ``read_network`` and ``unrolled`` read beside the model, if it is not there."""
    if not (folder / TOKENIZER / "tokenizer.json").is_file():
        (folder / TOKENIZER).mkdir(exist_ok=True)
        tokens.save(folder / TOKENIZER)
    if not (folder / NETWORK).is_file():
        sharing = decoder.sharing
        info = {"sharing": sharing.scheme, "recursions": sharing.recursions, "lora": lora, "routing": routing}
        info |= {"tokenizer": tokens.digest}
        write_json(folder / NETWORK, {"shape": dataclasses.asdict(decoder.shape), **info})


def read_network(folder: Path) -> tuple[Shape, int, Tokens] | None:
    """Sizes, rank of the corrections and tokenizer of the model that a run trained; None where the folder has none.

    So a finished run no longer needs its source.

    Raises:
        DataError: files that are damaged, or a tokenizer that is not the one it was trained with.
    """
    if not ((folder / MODEL).is_file() and (folder / NETWORK).is_file() and (folder / TOKENIZER).is_dir()):
        return None
    where = f"run {folder.name}"
    info = read_file(folder, NETWORK, where, again(folder))
    return _shape(info["shape"]), info["lora"], _tokens(folder, info, where)


def unrolled(folder: Path, where: str) -> tuple[Shape, Mapping[str, Tensor], Tokens]:
    """The vanilla network that does what the run's does, and its tokenizer. Layers that are one share their tensors.

    Raises:
        ConfigError: a run that trained no language model, or one that routes its tokens.
        DataError: no run, an unfinished one, or files are missing or broken.
    """
    identity = identity_of(folder, where)
    if not (folder / NETWORK).is_file():
        raise ConfigError(
            f"{where} holds no language model that can be a source: it has no {NETWORK}.",
            "Name a run that trained one, such as a run of mor.",
        )
    info = read_file(folder, NETWORK, where, again(folder))
    if info["routing"] != "none":
        raise ConfigError(
            f"{where} routes its tokens (mor.routing={info['routing']}): its depth depends on the token, so no "
            "plain stack of layers is equivalent.",
            "Name a run that was trained with mor.routing=none or train_depth=0.",
        )
    shape = _shape(info["shape"])
    config = RecursiveConfig(sharing=info["sharing"])
    decoder = RecursiveDecoder(config, shape=shape, recursions=info["recursions"], lora=info["lora"])
    _load(decoder, model_file(folder, identity, where), where)
    if not (folder / TOKENIZER / "tokenizer.json").is_file():
        raise DataError(f"{where} has no tokenizer.", again(folder))
    return shape, decoder.float().unrolled(), _tokens(folder, info, where)


def _tokens(folder: Path, info: Mapping[str, Any], where: str) -> Tokens:
    """The tokenizer of a run, if it is the one that its network was trained with."""
    try:
        tokens = Tokens.from_folder(folder / TOKENIZER)
    except DataError as error:
        raise DataError(error.message, again(folder)) from error
    if tokens.digest != info.get("tokenizer", tokens.digest):
        raise DataError(
            f"The tokenizer of {where} is not the one that its model was trained with: its ids stand for other text.",
            again(folder),
        )
    return tokens


def identity_of(folder: Path, where: str) -> dict[str, Any]:
    """run.json of a finished run.

    Raises:
        DataError: no run, or one that is not finished.
    """
    identity = read_file(folder, "run.json", where, "It is not the folder of a run.")
    if not (folder / "result.json").is_file():
        if is_locked(folder / "lock"):
            raise DataError(f"{where} is running and has no model yet.", "Wait until it has finished.")
        raise DataError(f"{where} is not finished.", f"Finish it with: reason resume {folder}")
    return identity


def model_file(folder: Path, identity: dict[str, Any], where: str) -> Path:
    """Where the weights are: in the folder of the run which trained them. identity: run.json."""
    name = identity.get("trained_by")
    if name is not None and not (folder.parent / name).is_dir():
        raise DataError(
            f"The model of {where} belongs to {name}, which is not in the same folder.",
            f"Copy {name} into {folder.parent} too.",
        )
    return (folder if name is None else folder.parent / name) / MODEL


def read_file(folder: Path, name: str, where: str, hint: str) -> dict[str, Any]:
    """A JSON file of a run's folder."""
    try:
        found = read_json(folder / name)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
        return found
    except FileNotFoundError as error:
        raise DataError(f"{where} has no {name}.", hint) from error
    except ValueError as error:
        raise DataError(f"{folder / name} cannot be used: {error}.", hint) from error


def again(folder: Path) -> str:
    return f"Make it again with: reason resume {folder}"


def _shape(info: dict[str, Any]) -> Shape:
    scaling = None if info["scaling"] is None else Scaling(**info["scaling"])
    return dataclasses.replace(Shape(**info), scaling=scaling)


def _load(decoder: RecursiveDecoder, file: Path, where: str) -> None:
    try:
        found, _ = read_tensors(file)
        own = {n.removeprefix("decoder."): t for n, t in found.items() if n.startswith("decoder.")}
        decoder.load_state_dict(own)
    except FileNotFoundError as error:
        raise DataError(f"{where} has no model file.", again(file.parent.parent)) from error
    except Exception as error:  # the library raises many kinds, also for tensors that do not fit
        raise DataError(f"{file} cannot be read: {error}.", again(file.parent.parent)) from error
