"""Opening language models: the same logits as transformers, from whatever they are stored in; words otherwise.

No network and no large model: tiny networks of chance, saved by transformers or written as GGUF.
"""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from importlib.util import find_spec

import pytest
import torch

from reason.backbones.causal import Causal
from reason.backbones.config import CausalConfig, RecursiveConfig
from reason.backbones.decoder import RecursiveDecoder
from reason.backbones.pretrained import Pretrained, open_pretrained
from reason.backbones.shape import Scaling
from reason.backbones.source import CARRIED, kind
from reason.backbones.tokens import END, Tokens
from reason.errors import ConfigError, DataError, MissingExtra

TOKENS = Tokens.train(["the rain in Spain stays mainly in the plain"] * 3, "bpe", 280, cache=False)
SIZES = {
    "vocab_size": 290, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 600, "bos_token_id": None, "eos_token_id": TOKENS.eos,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 60,
}  # fmt: skip
NETWORKS = {
    "llama": {},
    "llama-wide-heads": {"head_dim": 16},
    "llama-tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "llama-one-kv": {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
    },
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama-llama3": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen2-tied": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen3": {"head_dim": 8},
    "qwen3-tied": {"head_dim": 16, "tie_word_embeddings": True},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REASON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def theirs(family, **change):
    """A network of transformers with weights of chance, large enough that each of them matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | change))).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def saved(folder, model, tokens=TOKENS, **options):
    model.save_pretrained(folder, **options)
    tokens.save(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A model folder that can be opened, for tests that spoil it."""
    return saved(tmp_path / "model", theirs("llama"))


def change(file, **keys):
    content = json.loads(file.read_text())
    content.update(keys)
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "GONE"}))


def ours(causal):
    config = RecursiveConfig(sharing="cycle")
    return RecursiveDecoder(config, shape=causal.shape, recursions=1).fill(causal.tensors).eval()


def ids(length=200):
    return torch.randint(0, SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1))


def check(causal, model, atol=1e-5):
    with torch.no_grad():
        network = ours(causal)
        torch.testing.assert_close(network.logits(network(ids())), model(ids()).logits, atol=atol, rtol=1e-4)


# --- the same numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_transformers(name, tmp_path):
    model = theirs(name.split("-")[0], **NETWORKS[name])
    causal = open_pretrained(str(saved(tmp_path / "model", model)))
    check(causal, model)
    shape = causal.shape
    assert (shape.vocab, shape.layers, shape.context) == (290, 3, 600)
    assert shape.tied == name.endswith("tied")
    assert causal.tokens.digest == TOKENS.digest and causal.where == str(tmp_path / "model")
    assert sum(t.numel() for t in causal.tensors.values()) == sum(p.numel() for p in model.parameters())
    assert set(causal.tensors) == {n.replace("block.", "layers.") for n in ours(causal).state_dict()}


def test_scaling_is_read(tmp_path):
    model = theirs("llama", **NETWORKS["llama-llama3"])
    causal = open_pretrained(str(saved(tmp_path / "model", model)))
    assert causal.shape.scaling == Scaling(8.0, 1.0, 4.0, 60)
    change(tmp_path / "model/config.json", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with pytest.raises(AssertionError):  # and it is not nothing
        check(open_pretrained(str(tmp_path / "model")), model)


def test_a_config_of_earlier_years_is_understood(folder):
    """The spellings of transformers 4: rope_theta and rope_scaling, head_dim left out."""
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    change(
        folder / "config.json",
        rope_parameters="GONE",
        head_dim="GONE",
        rope_theta=500.0,
        rope_scaling=scaling,
    )
    shape = open_pretrained(str(folder)).shape
    assert (shape.rope_theta, shape.head_dim, shape.scaling) == (500.0, 8, Scaling(8.0, 1.0, 4.0, 60))


def test_shards_half_precision_and_pickles_give_the_same(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = open_pretrained(str(folder))
    cut = open_pretrained(str(saved(tmp_path / "cut", model, max_shard_size="40KB")))
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    for other in (cut, open_pretrained(str(pickled))):
        assert other.digest == whole.digest
        check(other, model)
    half = open_pretrained(str(saved(tmp_path / "half", model.bfloat16())))
    assert half.digest != whole.digest and half.tensors["norm.weight"].dtype == torch.float32
    check(half, AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32))


def test_what_older_files_hold_beside_the_weights_is_left_out(tmp_path):
    from safetensors.torch import load_file, save_file

    model = theirs("llama", tie_word_embeddings=True)
    file = saved(tmp_path / "model", model) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, file)
    check(open_pretrained(str(tmp_path / "model")), model)
    save_file({n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"}, file)
    check(open_pretrained(str(tmp_path / "model")), model)  # saved without a head


def test_the_digest_is_of_sizes_weights_and_tokenizer(folder, tmp_path):
    digest = open_pretrained(str(folder)).digest
    shutil.copytree(folder, tmp_path / "copy")
    assert open_pretrained(str(tmp_path / "copy")).digest == digest
    change(folder / "config.json", rms_norm_eps=0.5)
    other = open_pretrained(str(folder)).digest
    Tokens.train(["other words"], "bpe", 280, cache=False).save(tmp_path / "copy")
    assert len({digest, other, open_pretrained(str(tmp_path / "copy")).digest}) == 3


def test_weights_are_read_when_asked_for(folder):
    causal = open_pretrained(str(folder))
    assert isinstance(causal, Pretrained) and len(causal.tensors) == len(list(causal.tensors)) == 3 * 8 + 3
    assert causal.tensors["layers.2.key_value.weight"].shape == (2 * 2 * 8, 32)
    with pytest.raises(KeyError):
        causal.tensors["layers.3.key_value.weight"]


# --- GGUF -----------------------------------------------------------------------------------------------


def usual(tokens):
    """The same tokenizer with an end as models have it: our own holds spaces, which GGUF cannot spell."""
    tokenizer = tokens.tokenizer.from_str(tokens.tokenizer.to_str().replace(END, "<|endoftext|>"))
    return Tokens(tokenizer, tokens.eos)


def write_gguf(file, family, model, quantise=None, extra=(), tokens=None):
    """What llama.cpp's converter writes of a network."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(file), family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    for name, value in extra:
        getattr(writer, name)(value)
    tokenizer = (tokens or usual(TOKENS)).tokenizer
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if i == TOKENS.eos else 1 for i in range(len(vocab))])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(TOKENS.eos)
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[
            family
        ],
        9,
    )
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows = len(tensor) // heads // 2
            tensor = tensor.reshape(heads, 2, rows, -1).swapaxes(1, 2).reshape(tensor.shape)
        stem, _, kind = name.rpartition(".")
        value, to = tensor.contiguous().numpy(), f"{names.get_name(stem)}.{kind}"
        if quantise and tensor.dim() == 2:
            writer.add_tensor(to, gguf.quantize(value, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(to, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_the_network_it_was_made_of(family, tied, tmp_path, own_cache, capfd):
    model = theirs(family, tie_word_embeddings=tied, **({"head_dim": 16} if family == "qwen3" else {}))
    file = write_gguf(tmp_path / "m.gguf", family, model)
    causal = open_pretrained(str(file))
    check(causal, model)
    text = "the rain in\n Spain Zoë 🙂 123"
    assert causal.tokens.encode([text]) == TOKENS.encode([text]) and causal.tokens.eos == TOKENS.eos
    assert "Converting" in capfd.readouterr().err
    whole = Causal(CausalConfig(source=str(file)))
    with torch.no_grad():
        torch.testing.assert_close(whole(ids()), model(ids()).logits, atol=1e-5, rtol=1e-4)
    again = open_pretrained(str(file))
    assert "Converting" not in capfd.readouterr().err and again.digest == causal.digest
    # transformers reads what we made of it
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (made,) = (p for p in (own_cache / "models").iterdir() if p.is_dir())
    with torch.no_grad():
        theirs_again = AutoModelForCausalLM.from_pretrained(made)
        torch.testing.assert_close(theirs_again(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(made)(text)["input_ids"] == TOKENS.encode([text])[0][0]


def test_quantised_weights_come_back_as_near_as_they_were_kept(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    from reason.backbones import from_gguf

    monkeypatch.setattr(from_gguf, "SHARD", 10_000)  # several files
    model = theirs("llama", hidden_size=64, intermediate_size=64)
    file = write_gguf(tmp_path / "m.gguf", "llama", model, gguf.GGMLQuantizationType.Q8_0)
    causal = open_pretrained(str(file))
    for name, size in (("layers.1.down.weight", 64 * 64), ("embed.weight", 290 * 64)):
        exact = model.get_submodule(
            {"layers.1.down.weight": "model.layers.1.mlp.down_proj", "embed.weight": "model.embed_tokens"}[
                name
            ]
        ).weight
        error = (causal.tensors[name] - exact).abs()
        assert exact.numel() == size and 0 < error.max() < 0.01
    folder = next(p for p in (tmp_path / "cache/models").iterdir() if p.is_dir())
    assert len(list(folder.glob("*.safetensors"))) > 3


def test_peculiar_gguf_files_are_refused(tmp_path, own_cache):
    model = theirs("llama")
    for name, value, said in (
        ("add_rope_scaling_type", "yarn", "RoPE scaling of the type 'yarn'"),
        ("add_expert_count", 8, "mixture-of-experts"),
        ("add_sliding_window", 64, "sliding-window"),
    ):
        if name == "add_rope_scaling_type":
            gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
            value = gguf.RopeScalingType.YARN
        with pytest.raises(ConfigError, match=said) as caught:
            open_pretrained(str(write_gguf(tmp_path / f"{name}.gguf", "llama", model, extra=[(name, value)])))
        assert "Supported: Llama" in caught.value.hint
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    writer = gguf.GGUFWriter(str(tmp_path / "bloom.gguf"), "bloom")
    writer.add_block_count(1)
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    with pytest.raises(ConfigError, match="'bloom'"):
        open_pretrained(str(tmp_path / "bloom.gguf"))
    strange = write_gguf(tmp_path / "strange.gguf", "llama", model, tokens=TOKENS)
    with pytest.raises(DataError, match="cannot be rebuilt: some tokens differ"):
        open_pretrained(str(strange))
    (tmp_path / "broken.gguf").write_bytes(b"GGUFnot really")
    with pytest.raises(DataError, match="cannot be read as GGUF"):
        open_pretrained(str(tmp_path / "broken.gguf"))
    assert not [p for p in (own_cache / "models").iterdir() if p.is_dir()]  # nothing half-made


def test_without_the_library_a_gguf_file_asks_for_it(tmp_path, monkeypatch):
    from reason.backbones import from_gguf

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(from_gguf, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(MissingExtra) as caught:
        open_pretrained(str(tmp_path / "m.gguf"))
    assert "reason-lab[gguf]" in caught.value.hint and caught.value.exit_code == 4


# --- the hub --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub on this machine that has one model, owner/tiny, as much of one as fetching asks for."""
    from huggingface_hub import constants

    files = {p.name: p.read_bytes() for p in folder.iterdir()} | {
        "modeling_evil.py": b"raise SystemExit('run')"
    }
    commit = "0123456789abcdef0123456789abcdef01234567"

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            if path in ("/api/models/owner/tiny/revision/main", "/api/models/owner/tiny"):
                siblings = [{"rfilename": name} for name in files]
                return self.answer(
                    json.dumps({"id": "owner/tiny", "sha": commit, "siblings": siblings}).encode()
                )
            if path.startswith("/api/models/owner/tiny/revision/"):
                return self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
            if path == f"/api/models/owner/tiny/tree/{commit}":
                listed = [
                    {"type": "file", "path": name, "size": len(content), "oid": str(number)}
                    for number, (name, content) in enumerate(files.items())
                ]
                return self.answer(json.dumps(listed).encode())
            name = path.removeprefix(f"/owner/tiny/resolve/{commit}/")
            if name in files:
                asked.append(name)
                return self.answer(files[name], 200, {"ETag": f'"{name}"', "X-Repo-Commit": commit})
            refused = {"X-Error-Code": "GatedRepo" if "gated" in path else "RepoNotFound"}
            return self.answer(b"", 403 if "gated" in path else 404, refused)

        do_HEAD = do_GET

        def answer(self, body, status=200, headers=()):
            self.send_response(status)
            for key, value in dict(headers).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield asked
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_fetched_once_and_found_offline(hub, folder):
    with pytest.raises(DataError, match="--offline forbids downloading"):
        open_pretrained("owner/tiny", offline=True)
    causal = open_pretrained("owner/tiny")
    assert (
        causal.digest == open_pretrained(str(folder)).digest
        and causal.where == "owner/tiny at revision 0123456789ab"
    )
    assert "modeling_evil.py" not in hub and "model.safetensors" in hub
    hub.clear()
    assert open_pretrained("owner/tiny", offline=True).digest == causal.digest and hub == []


def test_what_a_hub_refuses_is_told(hub):
    for source, said in (
        ("owner/absent", "is no model 'owner/absent'"),
        ("owner/gated", "accept its terms"),
        ("owner/tiny@v9", "has no revision 'v9'"),
        ("owner/a--b", "not a hub id"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            open_pretrained(source)
        assert caught.value.hint


def test_a_hub_that_does_not_answer_is_told(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(DataError, match="owner/tiny cannot be downloaded") as caught:
        open_pretrained("owner/tiny")
    assert "HF_ENDPOINT" in caught.value.hint


# --- what cannot be opened ------------------------------------------------------------------------------


def test_sources_are_told_apart(tmp_path):
    (tmp_path / "owner/name").mkdir(parents=True)
    kinds = {
        "smollm2-135m": "carried", "run:abc": "run", "owner/other": "hub", "owner/other@v1.0": "hub",
        "owner/name": "local", "./owner/other": "local", "~/model": "local", str(tmp_path): "local", "x.gguf": "local",
    }  # fmt: skip
    assert {source: kind(source) for source in kinds} == kinds
    for source in ("", "smollm", "a/b/c", "two words"):
        with pytest.raises(ConfigError, match="is not a language model") as caught:
            kind(source)
        assert "a hub id such as" in caught.value.hint


def test_near_names_are_suggested(folder, tmp_path):
    with pytest.raises(ConfigError, match="'smollm-135m'") as caught:
        open_pretrained("smollm-135m")
    assert "Did you mean 'smollm2-135m'?" in caught.value.hint
    with pytest.raises(DataError, match="There is no") as caught:
        open_pretrained(str(tmp_path / "modle"))
    assert f"Did you mean {folder}?" in caught.value.hint
    with pytest.raises(DataError, match="There is no"):
        open_pretrained(str(tmp_path / "not/there/model.gguf"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"neither a folder nor a \.gguf file"):
        open_pretrained("./notes.txt")


def test_carried_models_are_parcels_and_obey_offline():
    from reason.datasets.fetch import PARCELS

    for name in CARRIED:
        assert name in PARCELS
        with pytest.raises(DataError, match=f"{name} is not in the cache"):
            open_pretrained(name, offline=True)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model_type": "gpt2"}, "type 'gpt2'"),
        ({"model_type": "my-own", "auto_map": {"AutoConfig": "evil.Config"}}, "type 'my-own'"),
        ({"model_type": "GONE"}, "type None"),
        ({"hidden_act": "gelu"}, "activation function 'gelu'"),
        ({"attention_bias": True}, "biases in all attention projections"),
        ({"mlp_bias": True}, "biases in its feed-forward"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights"),
        ({"num_key_value_heads": 3}, "3 key-value heads for 4 query heads"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "scaling of the type 'dynamic'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "scaling of the type 'yarn'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial rotary embeddings",
        ),
        ({"model_type": "mistral", "sliding_window": 128}, "sliding-window attention over 128"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "sliding-window attention over 64",
        ),
    ],
)
def test_networks_of_other_kinds_are_refused_with_those_that_can_be_opened(folder, keys, said):
    change(folder / "config.json", **keys)
    with pytest.raises(ConfigError, match=said) as caught:
        open_pretrained(str(folder))
    assert str(folder) in caught.value.message
    assert "Qwen3" in caught.value.hint or "llama3" in caught.value.hint


def test_broken_folders_say_what_is_missing(folder, tmp_path):
    def said(spoil):
        other = tmp_path / "spoilt"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(folder, other)
        spoil(other)
        with pytest.raises(DataError) as caught:
            open_pretrained(str(other))
        assert caught.value.hint
        return str(caught.value)

    assert "no config.json" in said(lambda f: (f / "config.json").unlink())
    assert "valid JSON" in said(lambda f: (f / "config.json").write_text("{"))
    assert "valid JSON" in said(lambda f: (f / "config.json").write_text("[]"))
    assert "config.json of" in said(lambda f: change(f / "config.json", hidden_size="wide"))
    assert "no tokenizer.json" in said(lambda f: (f / "tokenizer.json").unlink())
    assert "no weights" in said(lambda f: (f / "model.safetensors").unlink())
    assert "damaged" in said(lambda f: (f / "model.safetensors").write_bytes(b"short"))
    assert "290 x 32, but its config requires 300 x 32" in said(
        lambda f: change(f / "config.json", vocab_size=300)
    )
    assert "no weights named model.layers.3" in said(lambda f: change(f / "config.json", num_hidden_layers=4))
    assert "does not account for: model.layers.2" in said(
        lambda f: change(f / "config.json", num_hidden_layers=2)
    )
    assert "tokenizer with 280 tokens" in said(lambda f: big_tokenizer(f))
    assert "an adapter" in said(lambda f: (f / "config.json").rename(f / "adapter_config.json"))
    assert "m.gguf" in said(lambda f: (f / "config.json").rename(f / "m.gguf"))


def big_tokenizer(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:270].clone()
    save_file(tensors, folder / "model.safetensors")
    change(folder / "config.json", vocab_size=270)


def test_shards_that_are_missing_or_elsewhere(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    cut = saved(tmp_path / "cut", AutoModelForCausalLM.from_pretrained(folder), max_shard_size="40KB")
    index = cut / "model.safetensors.index.json"
    kept, files = index.read_text(), sorted(cut.glob("model-*.safetensors"))
    files[1].rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(DataError, match=f"{files[1].name} is missing"):
        open_pretrained(str(cut))
    index.write_text(kept.replace(files[1].name, "../elsewhere.safetensors"))
    with pytest.raises(DataError, match="refers to a file outside its folder"):
        open_pretrained(str(cut))
    index.write_text("{}")
    with pytest.raises(DataError, match="is not a valid index"):
        open_pretrained(str(cut))


class Evil:
    def __reduce__(self):
        return exec, ("open('ran', 'w')",)


def test_a_pickle_never_runs_code(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(32), "x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be read"):
        open_pretrained(str(folder))
    assert not (tmp_path / "ran").exists()


class TestSizesThatCannotBe:
    """What config.json states is held against the weights before a library makes lists of it."""

    @pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels"])
    @pytest.mark.parametrize("family", ["llama", "qwen3"])
    def test_a_billion(self, tmp_path, family, key):
        saved(tmp_path / "m", theirs(family, **NETWORKS.get(family, {})))
        told = json.loads((tmp_path / "m" / "config.json").read_text())
        (tmp_path / "m" / "config.json").write_text(json.dumps(told | {key: 10**9}))
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(DataError, match="1,000,000,000") as caught:
            open_pretrained(str(tmp_path / "m"))
        assert "tensors" in caught.value.message
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB

    @pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size"])
    def test_a_width(self, tmp_path, key):
        saved(tmp_path / "m", theirs("llama"))
        told = json.loads((tmp_path / "m" / "config.json").read_text())
        (tmp_path / "m" / "config.json").write_text(json.dumps(told | {key: 10**9, "head_dim": 8}))
        with pytest.raises(DataError, match="1000000000"):
            open_pretrained(str(tmp_path / "m"))

    def test_weights_that_do_not_fit_into_memory(self, tmp_path, monkeypatch):
        saved(tmp_path / "m", theirs("llama"))
        monkeypatch.setenv("REASON_MEMORY_GB", "0.0001")
        for at_fault in ("tokenizer.json", "weights as float32"):
            with pytest.raises(DataError, match="REASON_MEMORY_GB allows"):
                open_pretrained(str(tmp_path / "m"))
            if at_fault == "tokenizer.json":
                (tmp_path / "m" / "tokenizer.json").write_text("{}")

    def test_a_pickle_that_is_compressed(self, tmp_path):
        import zipfile

        model = theirs("llama")
        saved(tmp_path / "m", model)
        (tmp_path / "m" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "plain.bin")
        target = tmp_path / "m" / "pytorch_model.bin"
        with (
            zipfile.ZipFile(tmp_path / "plain.bin") as plain,
            zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for member in plain.namelist():
                packed.writestr(member, plain.read(member))
        with pytest.raises(DataError, match="compressed"):
            open_pretrained(str(tmp_path / "m"))
