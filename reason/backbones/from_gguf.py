"""GGUF files, llama.cpp's format: converted once into a model folder with safetensors.

The library ``gguf`` reads the file and undoes the quantisation, whichever it is; the tokenizer is rebuilt
by transformers. De-quantised weights are kept in float32, so nothing is lost a second time. Reading the
folder takes a hundredth of the time that the file takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reason.backbones.llama import KNOWN, refuse_family
from reason.datasets.fetch import build_once, cache_dir, say
from reason.errors import ConfigError, DataError, MissingExtra
from reason.files import sha256, write_json

RECIPE = 1  # raise it when the same file would give another folder
SHARD = 2**28  # bytes of weights in one file, about

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def unpacked(file: Path, where: str) -> Path:
    """The model folder made of a GGUF file, in the cache; made now if it is not there.

    Raises:
        MissingExtra: the library gguf is not installed.
        ConfigError: an architecture, or a peculiarity of it, that is not supported.
        DataError: the file is broken, or its tokenizer cannot be rebuilt.
    """
    folder = cache_dir() / "models" / f"gguf-{sha256(file)[:32]}-{RECIPE}"
    if not folder.is_dir():
        if find_spec("gguf") is None:
            raise MissingExtra("Reading GGUF files requires the package gguf.", "gguf")
        say(f"Converting {where} (only needed once) to {folder}.")
    return build_once(folder, lambda aside: _convert(file, aside, where))


def _convert(file: Path, folder: Path, where: str) -> None:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        stated = {key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1}
    except Exception as error:  # a damaged header can lead anywhere
        raise DataError(
            f"{where} cannot be read as GGUF: {error}.", "It is damaged or incomplete; download it again."
        ) from error
    config = _config(stated, {tensor.name for tensor in reader.tensors}, where)
    listed = reader.fields.get("tokenizer.ggml.tokens")
    _tokenizer(file, folder, where, len(listed.data) if listed else 0, config["eos_token_id"])
    _write(reader, config, folder, where)
    write_json(folder / "config.json", config)


def _config(stated: dict[str, Any], tensors: set[str], where: str) -> dict[str, Any]:
    """What transformers would call it. stated: the file's own keys."""
    family = str(stated.get("general.architecture"))
    if family not in FAMILIES:
        raise refuse_family(where, family)

    def value(key: str, default: Any = None) -> Any:
        found = stated.get(f"{family}.{key}", default)
        if found is None:
            raise DataError(f"{where} has no value for {family}.{key}.", "Convert the model again.")
        return found

    scaling, split = value("rope.scaling.type", "none"), stated.get("split.count", 1) > 1
    for strange, what in (
        (split, "is split into several files (merge them with gguf-split --merge)"),
        (value("expert_count", 0) > 0, "is a mixture-of-experts model"),
        ("rope_freqs.weight" in tensors, "has its own rotary frequencies (Llama 3.1 and later)"),
        (scaling not in ("none", "linear"), f"uses RoPE scaling of the type {scaling!r}"),
        (value("attention.sliding_window", 0) > 0, "uses sliding-window attention"),
    ):
        if strange:
            raise ConfigError(
                f"{where} {what}, which is not supported in a GGUF file.",
                f"Use the original model that it was converted from, if that is supported. {KNOWN}",
            )
    hidden, heads = value("embedding_length"), value("attention.head_count")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": value("rope.freq_base", 10000.0)}
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": value("rope.scaling.factor")}
    return {
        "architectures": [FAMILIES[family]], "model_type": family, "dtype": "float32",
        "vocab_size": 0,  # as many as the embedding has rows, which are not read yet
        "hidden_size": hidden, "num_hidden_layers": value("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads), "rope_parameters": rope,
        "head_dim": value("attention.key_length", value("rope.dimension_count", hidden // max(heads, 1))),
        "intermediate_size": value("feed_forward_length"), "hidden_act": "silu",
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": stated.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": stated.get("tokenizer.ggml.eos_token_id"),
    }  # fmt: skip


def _tokenizer(file: Path, folder: Path, where: str, count: int, eos: Any) -> None:
    """Rebuild it; ``count`` tokens and the end ``eos`` are what the file says."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
        found.save_pretrained(folder)
        problem = "" if (len(found), found.eos_token_id) == (count, eos) else "some tokens differ"
    except Exception as error:  # transformers raises what its converters come upon
        problem = str(error)
    if problem:
        raise DataError(
            f"The tokenizer in {where} cannot be rebuilt: {problem}.",
            "Use the original model in Hugging Face format, which contains its own tokenizer.",
        )


def _write(reader: Any, config: dict[str, Any], folder: Path, where: str) -> None:
    """All tensors, de-quantised, and an index that says which file each is in."""
    from safetensors.torch import save

    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(reader, config, where)):
        file = f"model-{number:05d}.safetensors"
        (folder / file).write_bytes(save(shard, metadata={"format": "pt"}))
        places |= dict.fromkeys(shard, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def _shards(reader: Any, config: dict[str, Any], where: str) -> Iterator[dict[str, Tensor]]:
    """The tensors under transformers' names, ``SHARD`` bytes at a time."""
    from gguf import dequantize

    shard: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        if sum(4 * value.numel() for value in shard.values()) >= SHARD:
            yield shard
            shard = {}
        try:
            value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        except (NotImplementedError, ValueError) as error:
            raise DataError(
                f"The tensor {tensor.name} in {where} cannot be read: {error}.",
                "Use a file with another quantisation, such as Q8_0.",
            ) from error
        name = _name(tensor.name)
        shard[name] = _unturned(name, value, config)
        if name == "model.embed_tokens.weight":
            config["vocab_size"] = len(value)
    yield shard


def _name(theirs: str) -> str:
    """llama.cpp's name of a tensor to that of transformers; unknown ones are left for the reader to refuse."""
    if theirs in OUTSIDE:
        return OUTSIDE[theirs]
    block, _, rest = theirs.removeprefix("blk.").partition(".")
    part, _, kind = rest.rpartition(".")
    return f"model.layers.{block}.{INSIDE.get(part, part)}.{kind}"


def _unturned(name: str, value: Tensor, config: dict[str, Any]) -> Tensor:
    """Queries and keys of a Llama with their rows in transformers' order.

    llama.cpp turns channels 2i and 2i + 1 together, transformers i and i + d_h / 2, so its converter
    interleaves the halves of each head; Qwen's are left as they are.
    """
    if config["model_type"] != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    heads = config["num_attention_heads" if name.endswith("q_proj.weight") else "num_key_value_heads"]
    return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
