"""Model folders in Hugging Face's format: what their sizes are, and their weights under our names.

Llama (SmolLM is one), Mistral without a window, Qwen2 and Qwen3 are one network with small differences,
which ``Shape`` holds. Whatever else a folder asks for is refused rather than ignored. No code of a model
is ever run, and pickled weights are read as tensors only.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reason.backbones.shape import Scaling, Shape
from reason.errors import ConfigError, DataError
from reason.files import read_json
from reason.memory import PARSED, Budget

FAMILIES = {  # model_type: how people call it
    "llama": "Llama (including SmolLM)",
    "mistral": "Mistral without sliding-window attention",
    "qwen2": "Qwen2 and Qwen2.5",
    "qwen3": "Qwen3",
}
AGAIN = "Download or save the model again."
KNOWN = "Supported: " + ", ".join(FAMILIES.values()) + "."


def refuse_family(where: str, family: Any) -> ConfigError:
    """The error for an architecture that is none of ours."""
    return ConfigError(f"{where} is a model of type {family!r}, which is not supported.", KNOWN)


# --- sizes ----------------------------------------------------------------------------------------------


def shape_of(folder: Path, where: str) -> Shape:
    """The sizes that ``config.json`` states.

    Raises:
        ConfigError: an architecture, or a peculiarity of it, that ``RecursiveDecoder`` does not have.
        DataError: the file is missing or broken.
    """
    stated = stated_config(folder, where)
    family = stated.get("model_type")
    if family not in FAMILIES:
        raise refuse_family(where, family)
    refuse_sizes(stated, stored(folder, where), where)
    from transformers import AutoConfig

    try:  # for what the file leaves out, and for the spellings of earlier years
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        rope = dict(config.rope_parameters)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        shape = Shape(
            vocab=config.vocab_size, hidden=config.hidden_size, layers=config.num_hidden_layers, heads=heads,
            kv_heads=kv_heads, head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            ffn=config.intermediate_size, tied=config.tie_word_embeddings, norm_eps=config.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]), scaling=None, biases=family == "qwen2",
            head_norms=family == "qwen3", context=config.max_position_embeddings,
        )  # fmt: skip
    except Exception as error:  # whatever a file of somebody else's writing can lead a library to
        raise DataError(f"config.json of {where} cannot be read: {error}.", AGAIN) from error
    for strange, what in _peculiarities(config, rope, shape):
        if strange:
            raise ConfigError(f"{where} {what}, which is not supported.", KNOWN)
    return shape if rope["rope_type"] == "default" else _scaled(shape, rope, where)


def stated_config(folder: Path, where: str) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise DataError(
                f"{where} holds an adapter, not a model.", "Merge it into its base model and save the result."
            )
        guess = next(iter(sorted(folder.glob("*.gguf"))), None)
        raise DataError(
            f"{where} is not a model folder: it has no config.json.",
            f"Give the file itself: {guess}." if guess else "A model folder has config.json, tokenizer.json "
            "and *.safetensors, as written by save_pretrained of transformers.",
        )  # fmt: skip
    Budget(file).spend(file.stat().st_size * PARSED)
    try:
        found = read_json(file)
        assert isinstance(found, dict)
    except (ValueError, RecursionError, AssertionError) as error:
        raise DataError(f"{file} is not valid JSON: {error}.", AGAIN) from error
    return found


def refuse_sizes(stated: dict[str, Any], found: dict[str, Stored], where: str) -> None:
    """What a library makes a list of, before anything looks at it, is held against the weights that there are."""
    most = {"num_hidden_layers": len(found), "num_labels": sum(s.count for s in found.values())}
    for key, least in most.items():
        if isinstance(size := stated.get(key, 0), int) and size > least:
            raise DataError(
                f"config.json of {where} states {key} {size:,}, but its weights are {len(found):,} tensors "
                f"of {most['num_labels']:,} numbers.",
                "Its files do not belong together; download or save it again.",
            )


def _peculiarities(config: Any, rope: dict[str, Any], shape: Shape) -> Iterator[tuple[bool, str]]:
    """What a model of these families may ask for beyond what ``Layer`` does."""
    window = getattr(config, "sliding_window", None)
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    yield window is not None, f"uses sliding-window attention over {window} tokens"
    yield layers != {"full_attention"}, f"has layers of the types {', '.join(sorted(layers))}"
    yield config.hidden_act not in ("silu", "swish"), f"uses the activation function {config.hidden_act!r}"
    yield bool(getattr(config, "attention_bias", False)), "has biases in all attention projections"
    yield bool(getattr(config, "mlp_bias", False)), "has biases in its feed-forward layers"
    yield rope.get("partial_rotary_factor", 1.0) != 1.0, "uses partial rotary embeddings"
    yield shape.head_dim % 2 == 1, f"has an odd head dimension ({shape.head_dim})"
    uneven = shape.heads % shape.kv_heads > 0
    yield uneven, f"has {shape.kv_heads} key-value heads for {shape.heads} query heads"
    yield getattr(config, "quantization_config", None) is not None, "has quantised weights"


def _scaled(shape: Shape, rope: dict[str, Any], where: str) -> Shape:
    if rope["rope_type"] == "linear":
        return replace(shape, scaling=Scaling(float(rope["factor"])))
    if rope["rope_type"] == "llama3":
        factor, low, high = (float(rope[n]) for n in ("factor", "low_freq_factor", "high_freq_factor"))
        original = int(rope["original_max_position_embeddings"])
        return replace(shape, scaling=Scaling(factor, low, high, original))
    raise ConfigError(
        f"{where} uses RoPE scaling of the type {rope['rope_type']!r}, which is not supported.",
        "Supported: default, linear, llama3.",
    )


# --- weights --------------------------------------------------------------------------------------------


HEAD_NORMS = ("norm_query", "norm_key")
PARTS = {  # of a layer: our name, theirs
    "norm_attention": "input_layernorm",
    "query": "self_attn.q_proj",
    "key_value": "self_attn.k_proj self_attn.v_proj",
    "out": "self_attn.o_proj",
    "norm_feed": "post_attention_layernorm",
    **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    **{part: f"self_attn.{part[5]}_norm" for part in HEAD_NORMS},
}


def names(shape: Shape) -> dict[str, tuple[str, ...]]:
    """{our name: theirs}; several are stacked by rows."""
    found: dict[str, tuple[str, ...]] = {"embed.weight": ("model.embed_tokens.weight",)}
    found["norm.weight"] = ("model.norm.weight",)
    if not shape.tied:
        found["head.weight"] = ("lm_head.weight",)
    inside = [(part, "weight") for part in PARTS if shape.head_norms or part not in HEAD_NORMS]
    inside += [(part, "bias") for part in ("query", "key_value") if shape.biases]
    for i in range(shape.layers):
        for part, kind in inside:
            theirs = tuple(f"model.layers.{i}.{name}.{kind}" for name in PARTS[part].split())
            found[f"layers.{i}.{part}.{kind}"] = theirs
    return found


class Stored(NamedTuple):
    """A tensor on disk."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class Weights(Mapping[str, Tensor]):
    """A folder's weights by our names, float32, read from disk each time they are asked for.

    Raises:
        DataError: weights are missing, too many, of another size, or cannot be read.
    """

    def __init__(self, folder: Path, shape: Shape, where: str):
        self._stored, self._names = stored(folder, where), names(shape)
        wanted = {name: size for ours in self._names for name, size in self._sizes(ours, shape).items()}
        different = (name for name, size in wanted.items() if self._stored[name].shape != size)
        problem = ""
        if missing := sorted(wanted.keys() - self._stored.keys()):
            problem = f"has no weights named {missing[0]}" + _more(missing)
        elif extra := sorted(self._stored.keys() - wanted.keys() - _ignored(shape)):
            problem = f"has weights that its config does not account for: {extra[0]}" + _more(extra)
        elif name := next(different, None):
            found, size = self._stored[name].shape, wanted[name]
            problem = f"has {name} of shape {_size(found)}, but its config requires {_size(size)}"
        if problem:
            raise DataError(
                f"{where} {problem}.", "Its files do not belong together; download or save it again."
            )
        count = sum(s.count for s in self._stored.values())
        Budget(where, share=1.0).spend(4 * count, f"{count:,} weights as float32")

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._stored[theirs].read().float() for theirs in self._names[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _sizes(self, ours: str, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The size of each stored tensor behind one of our names."""
        D, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        short = ours.split(".", 2)[2] if ours.startswith("layers.") else ours
        size: tuple[int, ...] = {
            "embed.weight": (shape.vocab, D), "head.weight": (shape.vocab, D), "norm.weight": (D,),
            "norm_attention.weight": (D,), "norm_feed.weight": (D,), "query.weight": (q, D), "query.bias": (q,),
            "key_value.weight": (kv, D), "key_value.bias": (kv,), "out.weight": (D, q),
            "norm_query.weight": (shape.head_dim,), "norm_key.weight": (shape.head_dim,),
            "gate.weight": (shape.ffn, D), "up.weight": (shape.ffn, D), "down.weight": (D, shape.ffn),
        }[short]  # fmt: skip
        return dict.fromkeys(self._names[ours], size)


def _more(found: list[str]) -> str:
    return f", and {len(found) - 1} more" if len(found) > 1 else ""


def _size(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _ignored(shape: Shape) -> set[str]:
    """What older files hold beside the weights: rotary tables, and a copy of a tied head."""
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(shape.layers)}
    return tables | ({"lm_head.weight"} if shape.tied else set())


def stored(folder: Path, where: str) -> dict[str, Stored]:
    """Every tensor of the folder by the name that transformers gives it."""
    for name, reader in (("model.safetensors", _safetensors), ("pytorch_model.bin", _pickled)):
        if (folder / f"{name}.index.json").is_file():
            files = _shards(folder / f"{name}.index.json", where)
        elif (folder / name).is_file():
            files = [folder / name]
        else:
            continue
        found: dict[str, Stored] = {}
        for file in files:
            try:
                found |= reader(file)
            except Exception as error:  # both readers have many ways to fail on a damaged file
                mend = "It is damaged or incomplete; download or save it again."
                raise DataError(f"{file} cannot be read: {error}.", mend) from error
        # A network saved without its head leaves out the prefix.
        return {n if n.startswith(("model.", "lm_head.")) else f"model.{n}": s for n, s in found.items()}
    raise DataError(
        f"{where} has no weights: it has neither model.safetensors nor model.safetensors.index.json.",
        "Save it with save_pretrained of transformers, or download the whole repository.",
    )


def _shards(index: Path, where: str) -> list[Path]:
    try:
        listed = sorted(set(read_json(index)["weight_map"].values()))
        files = [index.parent / name for name in listed]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{index} is not a valid index: {error!r}.", AGAIN) from error
    for file in files:
        if file.parent != index.parent:
            raise DataError(
                f"{index} refers to a file outside its folder: {file.name!r}.",
                "Do not use this model; its source may be malicious.",
            )
        if not file.is_file():
            raise DataError(f"{where} is incomplete: {file.name} is missing.", "Download the missing files.")
    return files


def _safetensors(file: Path) -> dict[str, Stored]:
    from safetensors import safe_open

    opened = safe_open(str(file), framework="pt")
    return {
        name: Stored(tuple(opened.get_slice(name).get_shape()), lambda name=name: opened.get_tensor(name))
        for name in opened.keys()  # noqa: SIM118  (not a mapping)
    }


def _pickled(file: Path) -> dict[str, Stored]:
    """Tensors of a pickle that holds nothing else: anything that could run code is refused."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as members:
            if any(m.compress_type != zipfile.ZIP_STORED for m in members.infolist()):
                raise ValueError("it is compressed, as torch never writes it")
    found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name: Stored(tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in found.items()}
