"""Causal language models of transformers, unmodified: opened from any source, or a small Llama from scratch.

What a run keeps of one stands in its folder under ``causal/``: sizes and tokenizer as transformers writes them, so
that a run builds it again, and another one opens it (``run:NAME``), without the source it began as.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
from transformers.utils import logging

from reason import registry
from reason.backbones.cache import RowCache
from reason.backbones.config import CausalConfig
from reason.backbones.from_run import MODEL, again, identity_of, model_file, read_file
from reason.backbones.generation import Batch
from reason.backbones.llama import AGAIN, refuse_sizes, stated_config, stored
from reason.backbones.source import folder_of, kind, run_of
from reason.backbones.tokens import Tokens
from reason.backbones.weights import digest_of, read_tensors
from reason.errors import ConfigError, DataError
from reason.files import Altered, write_json
from reason.memory import Budget

FOLDER = "causal"  # in a run's folder
VOLATILE = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures"}
UNKNOWN = 2**20  # tokens of context where a model does not state any


@dataclass(frozen=True)
class CausalSource:
    """A language model that can be opened, not yet in memory."""

    folder: Path  # config.json, generation_config.json and tokenizer
    weights: Path  # a folder of safetensors, or the one file of a run
    tokens: Tokens
    where: str  # where it came from, for people

    @cached_property
    def digest(self) -> str:
        """sha256 of sizes, weights and tokenizer with its chat templates. Reads all weights once."""
        config = stated_config(self.folder, self.where)
        kept = {k: v for k, v in config.items() if k not in VOLATILE}
        digest = hashlib.sha256(json.dumps([kept, self.tokens.templates], sort_keys=True).encode())
        digest.update(self.tokens.digest.encode())
        digest.update(digest_of(self.tensors()).encode())
        return digest.hexdigest()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by their names, read one by one."""
        if self.weights.is_dir():
            found = stored(self.weights, self.where)
            yield from ((name, found[name].read()) for name in sorted(found))
        else:
            yield from _read(self.weights).items()

    def load(self, dtype: torch.dtype) -> Any:
        """The model of transformers, in memory.

        Raises:
            DataError: weights are missing, too many or of other sizes, or cannot be read.
        """
        if not self.weights.is_dir():
            model = _empty(self.folder, self.where, dtype)
            _fill(model, dict(self.tensors()), self.where)
            return model
        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(self.folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype,
                attn_implementation=_attention(self.folder), output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # whatever a file of somebody else's writing can lead a library to
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "ignore_mismatched_sizes" in first:
                first = "its weights have other sizes than its config.json states."
            raise DataError(f"{self.where} cannot be opened by transformers: {first}", AGAIN) from error
        finally:
            if bar:
                logging.enable_progress_bar()
        model, said = loaded
        for kind_, what in (
            ("missing_keys", "has no weights named"),
            ("mismatched_keys", "has weights of other sizes:"),
        ):
            if names := sorted(map(str, said.get(kind_) or ())):
                more = f", and {len(names) - 1} more" if len(names) > 1 else ""
                raise DataError(
                    f"{self.where} {what} {names[0]}{more}.",
                    "Its files do not belong together; download or save it again.",
                )
        return model


def open_source(source: str, offline: bool = False) -> Any:
    """What ``source`` names, checked as far as it can be without its weights.

    Args:
        source: a folder in Hugging Face's format, a .gguf file, a hub id, "smollm2-135m", or "run:NAME" of a finished run
            with this backbone, or of a method that offers its model (``MethodCard.language_model``).
        offline: forbid fetching; what was fetched before is used.

    Returns:
        A ``CausalSource``, or what that method gives in its place: it has digest, tokens, where and load().

    Raises:
        ConfigError: no such source, or a model that is none of transformers' causal language models.
        DataError: it cannot be fetched, or its files are broken or incomplete.
        MissingExtra: a GGUF file, and the library gguf is not installed.
    """
    if kind(source) == "run":
        return _of_run(run_of(source), offline)
    folder, where = folder_of(source, offline)
    _check_kind(folder, where)
    _check_files(folder, where)
    return CausalSource(folder, folder, Tokens.from_folder(folder), where)


class LanguageModel(Protocol):
    """What writes and is not trained: a ``Causal``, or the model that a run of another method offers.

    context: tokens that a text can have. eos: every token that ends a text. width: D of the states its output layer reads.
    """

    tokens: Tokens
    where: str

    @property
    def context(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def eos(self) -> frozenset[int]: ...
    @property
    def flops_per_token(self) -> float: ...
    def batch(self) -> Batch: ...


def open_model(
    config: CausalConfig, *, tokens: Tokens | None = None, kept: Path | None = None, offline: bool = False
) -> Any:  # fmt: skip
    """``Causal``, or the ``LanguageModel`` of a run of another method. Arguments and errors: see ``Causal``."""
    if (
        kept is None
        and config.source
        and not isinstance(found := opened(config.source, offline), CausalSource)
    ):
        return found.load()
    return Causal(config, tokens=tokens, kept=kept, offline=offline)


@lru_cache(maxsize=2)
def opened(source: str, offline: bool = False) -> Any:
    """``open_source``, once per process: a source is assumed not to change."""
    return open_source(source, offline)


class Causal(nn.Module):
    """A causal language model with its tokenizer.

    Args:
        config: sizes, or a source.
        tokens: the tokenizer of a model from scratch; the source has its own.
        kept: the folder of a run that trained one: sizes and tokenizer are read there, and the weights are random until
            they are loaded. Neither source nor ``tokens`` are then read.
        offline: forbid fetching a source.

    Raises:
        ConfigError, DataError, MissingExtra: see ``open_source`` and ``CausalSource.load``.
    """

    def __init__(
        self, config: CausalConfig, *, tokens: Tokens | None = None, kept: Path | None = None, offline: bool = False
    ):  # fmt: skip
        super().__init__()
        dtype: torch.dtype = getattr(torch, config.dtype)
        if kept is not None:
            where = f"run {kept.name}"
            self.tokens = Tokens.from_folder(kept / FOLDER)
            self.model = _empty(kept / FOLDER, where, dtype)
        elif config.source:
            found = opened(config.source, offline)
            where, self.tokens, self.model = found.where, found.tokens.copy(), found.load(dtype)
        else:
            if tokens is None:
                raise ValueError("A model from scratch requires a tokenizer.")
            where, self.tokens, self.model = "the model", tokens.copy(), _from_scratch(config, tokens, dtype)
        if (rows := self.model.get_input_embeddings().weight.shape[0]) < self.tokens.size:
            raise DataError(
                f"{where} has a tokenizer with {self.tokens.size:,} tokens but an embedding with {rows:,} rows.",
                "Its files do not belong together; download or save it again.",
            )
        self.source, self.where = config.source, where
        self.model.eval()
        self.register_state_dict_post_hook(_without_aliases)
        self.register_load_state_dict_pre_hook(_with_aliases)

    @property
    def context(self) -> int:
        """Tokens that a text can have. Below the window of a model that has one, every token sees all before it."""
        config = self.model.config.get_text_config(decoder=True)
        names = (
            "max_position_embeddings",
            "n_positions",
            "max_seq_len",
            "sliding_window",
            "attention_chunk_size",
        )
        stated = [
            value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0
        ]
        if not getattr(config, "use_sliding_window", True) and isinstance(config.sliding_window, int):
            stated.remove(config.sliding_window)
        return min(stated, default=UNKNOWN)

    @property
    def width(self) -> int:
        """D of the states that the output layer reads."""
        return self.model.get_output_embeddings().weight.shape[1]

    @property
    def flops_per_token(self) -> float:
        """Multiply-adds x 2 of one token: two for each weight that it meets. Attention to earlier tokens is left out."""
        weights = sum(p.numel() for p in self.model.parameters())
        table, output = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        return 2.0 * (weights if table is output else weights - table.numel())  # the embedding is looked up

    @property
    def eos(self) -> frozenset[int]:
        """Every token that ends a text: of the tokenizer, of the model, and of how it is meant to generate."""
        found = {self.tokens.eos}
        for config in (self.model.config, self.model.generation_config):
            ids = getattr(config, "eos_token_id", None)
            found |= set(ids if isinstance(ids, list | tuple) else () if ids is None else (ids,))
        return frozenset(found)

    def forward(self, tokens: Tensor, **more: Any) -> Tensor:
        """Logits (B, T, V) of the tokens after tokens (B, T)."""
        return self.model(input_ids=tokens, use_cache=False, **more).logits

    def batch(self) -> Batch:
        """An empty batch to generate in, with a cache of its own."""
        return Batch(RowCache(self.model, self.context), self.tokens, self.eos)

    def add_tokens(self, names: list[str]) -> list[int]:
        """Ids of special tokens; new ones get rows of embedding and head, near the mean of the others."""
        before = self.tokens.size
        ids = self.tokens.add(names)
        new = self.tokens.size - before
        if new:
            tables = {self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight}
            if self.tokens.size > min(len(table) for table in tables):
                self.model.resize_token_embeddings(self.tokens.size, mean_resizing=False)
                tables = {self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight}
            with torch.no_grad():
                for table in tables:
                    mean, spread = table[:before].mean(0), table[:before].std(0)
                    generator = torch.Generator(table.device).manual_seed(before)
                    noise = torch.randn(new, table.shape[1], generator=generator, device=table.device)
                    table[before : self.tokens.size] = (mean + 0.1 * spread * noise).to(table.dtype)
        return ids

    def write(self, folder: Path) -> None:
        """Keep in a run's folder what ``kept`` and ``open_source`` read beside the weights, if it is not there."""
        place = folder / FOLDER
        if (place / "origin.json").is_file():
            return
        place.mkdir(exist_ok=True)
        config = self.model.config.to_dict() | {"architectures": [type(self.model).__name__]}
        write_json(place / "config.json", config)
        write_json(place / "generation_config.json", {"eos_token_id": sorted(self.eos)})
        self.tokens.save(place)
        write_json(place / "origin.json", {"source": self.source})


# --- inside ---------------------------------------------------------------------------------------------


def _aliases(module: nn.Module, prefix: str) -> dict[str, str]:
    """Further names of tied parameters, and the first of each."""
    first: dict[int, str] = {}
    named = module.named_parameters(prefix.removesuffix("."), remove_duplicate=False)
    return {name: kept for name, p in named if (kept := first.setdefault(id(p), name)) != name}


def _without_aliases(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A tied parameter is saved once, and frozen under all its names or none."""
    for name in _aliases(module, prefix):
        state.pop(name, None)


def _with_aliases(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, kept in _aliases(module, prefix).items():
        if kept in state:
            state.setdefault(name, state[kept])


def _from_scratch(config: CausalConfig, tokens: Tokens, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig

    sizes = LlamaConfig(
        vocab_size=tokens.size, hidden_size=config.hidden, intermediate_size=config.ffn, tie_word_embeddings=config.tied,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context, initializer_range=config.init_std, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=tokens.eos, eos_token_id=tokens.eos, pad_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(sizes, attn_implementation="sdpa", dtype=dtype)


def _empty(folder: Path, where: str, dtype: torch.dtype) -> Any:
    """The model of a config.json, with random weights."""
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=_attention(folder), dtype=dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever a damaged file leads a library to
        raise DataError(f"{where} has a damaged {FOLDER}/config.json: {error}.", "Train it again.") from error
    return model


def _attention(folder: Path) -> str:
    """sdpa, where the architecture has it: it knows no soft caps on logits of attention."""
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    found = AutoModelForCausalLM._model_mapping.get(type(config), None)
    found = found[0] if isinstance(found, tuple) else found
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None
    return "sdpa" if getattr(found, "_supports_sdpa", False) and not capped else "eager"


def _check_kind(folder: Path, where: str) -> None:
    """Refuse what is no causal language model, or one that cannot be opened as it is."""
    config = stated_config(folder, where)
    family, made_by = config.get("model_type"), config.get("architectures") or []
    known = CLASSES.get(str(family))
    if known is None and "auto_map" in config:
        raise ConfigError(
            f"{where} brings code of its own, which is not run here.",
            "Use a model whose architecture transformers has itself.",
        )
    known = (known,) if isinstance(known, str) else known or ()
    if not known or (made_by and not set(made_by) & set(known)):
        what = made_by[0] if made_by else f"a model of type {family!r}"
        raise ConfigError(
            f"{where} is no causal language model: it is {what}.",
            "Use a model that continues text, such as HuggingFaceTB/SmolLM2-135M.",
        )
    if config.get("quantization_config") is not None:
        raise ConfigError(
            f"{where} has quantised weights, which are not supported.",
            "Use the original model, or a GGUF file, whose weights are converted.",
        )


def _check_files(folder: Path, where: str) -> None:
    """Refuse a folder without safetensors, a config that asks for far more than they hold, and what memory cannot hold."""
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        raise DataError(
            f"{where} has {'its weights in pickles, which can run code' if pickled else 'no weights'}.",
            "Save it with save_pretrained of transformers, or download model.safetensors.",
        )
    found = stored(folder, where)
    refuse_sizes(stated_config(folder, where), found, where)
    count = sum(tensor.count for tensor in found.values())
    Budget(where, share=1.0).spend(4 * count, f"{count:,} weights as float32")


def _of_run(folder: Path, offline: bool) -> Any:
    where = f"run {folder.name}"
    identity = identity_of(folder, where)
    if not (folder / FOLDER).is_dir():
        method = str(identity.get("method"))
        if method in registry.names("methods") and (
            offered := registry.card("methods", method).language_model
        ):
            return registry.resolve(offered)(folder, offline)
        raise ConfigError(
            f"{where} holds no causal language model: it has no folder {FOLDER}.",
            "Name a run that was made with backbone=causal, or one of mor.",
        )
    origin = read_file(folder / FOLDER, "origin.json", where, again(folder))
    tokens = Tokens.from_folder(folder / FOLDER)
    file = model_file(folder, identity, where)
    if file.is_file() and _prefix(file, folder / FOLDER, where) is not None:
        return CausalSource(folder / FOLDER, file, tokens, where)
    if origin["source"]:  # its weights were not trained
        return open_source(origin["source"], offline)
    raise DataError(f"{where} has no {MODEL} with a language model in it.", again(folder))


def _prefix(file: Path, folder: Path, where: str) -> str | None:
    """What stands in front of the names of the language model in a run's weights; None: it is not among them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened_file:
            names = set(opened_file.keys())
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}.", again(file.parent.parent)) from error
    wanted = _wanted(folder, where)
    return _common_prefix(names, wanted)


def _read(file: Path) -> dict[str, Tensor]:
    """The weights of a run, if they are those that were written."""
    from safetensors import SafetensorError

    try:
        return read_tensors(file)[0]
    except (OSError, ValueError, SafetensorError, Altered) as error:
        raise DataError(f"{file} cannot be read: {error}.", again(file.parent.parent)) from error


def _wanted(folder: Path, where: str) -> set[str]:
    with torch.device("meta"):
        model = _empty(folder, where, torch.float32)
    return {name for name, _ in model.named_parameters()}


def _common_prefix(names: set[str], wanted: set[str]) -> str | None:
    first = min(wanted)
    for name in sorted(names, key=len):
        if name.endswith(f"model.{first}"):
            prefix = name.removesuffix(first)
            if all(prefix + other in names for other in wanted):
                return prefix
    return None


def _fill(model: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """Weights of a run, in which the names of this model have something in front."""
    own = {name for name, _ in model.named_parameters()}
    prefix = _common_prefix(set(tensors), own)
    try:
        assert prefix is not None
        model.load_state_dict({name: tensors[prefix + name] for name in own}, strict=False)
    except (AssertionError, RuntimeError) as error:
        raise DataError(f"The weights of {where} do not fit its sizes.", "Train it again.") from error
