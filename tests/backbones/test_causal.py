"""Causal language models: the numbers of transformers from every source, and refusals that say why."""

import json
import shutil
import warnings

import pytest
import torch

from reason.backbones.causal import FOLDER, Causal, open_source
from reason.backbones.config import CausalConfig
from reason.backbones.generation import Sampling, Stop, generate
from reason.backbones.tokens import Tokens
from reason.errors import ConfigError, DataError
from reason.files import write_json

TEXTS = ["The rain in Spain stays mainly in the plain.\n\n12+3=15\n"] * 3
TOKENS = Tokens.train(TEXTS, "bpe", 290, cache=False)
SIZES = {
    "vocab_size": 290, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": [TOKENS.eos, 7],
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REASON_CACHE", str(tmp_path / "cache"))


def saved(folder, family="llama", tokens=TOKENS, **change):
    """A model folder, and the model in it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = (
            AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | change))).float().eval()
        )
        model.save_pretrained(folder)
    tokens.save(folder)
    return folder, model


def change(file, **keys):
    write_json(file, {k: v for k, v in (json.loads(file.read_text()) | keys).items() if v != "GONE"})


def opened(source) -> Causal:
    return Causal(CausalConfig(source=str(source)))


IDS = torch.tensor([[5, 80, 3, 200, 41, 7]])


def same(causal, model):
    with torch.no_grad():
        torch.testing.assert_close(causal(IDS), model(IDS).logits, atol=1e-5, rtol=1e-5)


# --- from every source ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_a_folder_is_opened_as_transformers_does(family, tmp_path):
    keys = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} if family == "gpt2" else {}
    folder, model = saved(tmp_path / "model", family, **keys)
    causal = opened(folder)
    same(causal, model)
    assert causal.tokens.digest == TOKENS.digest and causal.context == 64
    assert causal.eos == {TOKENS.eos, 7}
    (chunk,) = generate(causal.batch(), [[1, 2]], Sampling(), Stop(length=5), [0])
    assert len(chunk.tokens) <= 5


def test_shards_bfloat16_and_digests(tmp_path):
    folder, model = saved(tmp_path / "model")
    cut = tmp_path / "cut"
    model.save_pretrained(cut, max_shard_size="20KB")
    TOKENS.save(cut)
    assert len(list(cut.glob("*.safetensors"))) > 1
    same(opened(cut), model)
    assert open_source(str(cut)).digest == open_source(str(folder)).digest
    half = Causal(CausalConfig(source=str(folder), dtype="bfloat16"))
    assert half.model.dtype == torch.bfloat16
    (chunk,) = generate(half.batch(), [[1, 2]], Sampling(0.8), Stop(length=5), [0])
    assert torch.isfinite(torch.tensor(chunk.logp)).all() and chunk.hidden.dtype == torch.float32
    digests = {open_source(str(folder)).digest}
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    digests.add(open_source(str(folder)).digest)
    change(folder / "config.json", rms_norm_eps=1e-3)
    digests.add(open_source(str(folder)).digest)
    saved(tmp_path / "other", initializer_range=0.3)
    digests.add(open_source(str(tmp_path / "other")).digest)
    assert len(digests) == 4


def test_ends_are_collected_from_everywhere(tmp_path):
    folder, _ = saved(tmp_path / "model", eos_token_id=9)
    change(folder / "generation_config.json", eos_token_id=[11, 12])
    assert opened(folder).eos == {TOKENS.eos, 9, 11, 12}


def test_a_window_bounds_the_context(tmp_path):
    keys = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 0}
    assert opened(saved(tmp_path / "a", "qwen2", **keys)[0]).context == 20
    keys["use_sliding_window"] = False
    assert opened(saved(tmp_path / "b", "qwen2", **keys)[0]).context == 64
    assert opened(saved(tmp_path / "c", "mistral", sliding_window=24)[0]).context == 24
    causal = opened(saved(tmp_path / "d", "mistral", sliding_window=None)[0])
    assert causal.context == 64


# --- from scratch, and what a run keeps -----------------------------------------------------------------


def scratch(**keys) -> Causal:
    torch.manual_seed(3)
    return Causal(
        CausalConfig(hidden=32, heads=4, kv_heads=2, ffn=48, layers=2, context=40, **keys), tokens=TOKENS
    )


def test_from_scratch_it_is_a_small_llama():
    from transformers import LlamaForCausalLM

    causal = scratch(tied=False, rope_theta=500.0, init_std=0.5)
    assert type(causal.model) is LlamaForCausalLM and causal.context == 40 and causal.eos == {TOKENS.eos}
    config = causal.model.config
    assert (config.hidden_size, config.num_key_value_heads, config.vocab_size) == (32, 2, TOKENS.size)
    assert config.rope_parameters["rope_theta"] == 500.0 and not config.tie_word_embeddings
    assert abs(causal.model.model.layers[0].mlp.up_proj.weight.std().item() - 0.5) < 0.05


class Policy(torch.nn.Module):
    """What a method wraps one in."""

    def __init__(self, causal):
        super().__init__()
        self.policy, self.value = causal, torch.nn.Linear(32, 1)


def run_of(folder, causal, *, trained=True, finished=True, wrapped=True):
    """The folder of a run with this model."""
    from reason.engine.checkpoint import save_model

    (folder / "model").mkdir(parents=True)
    causal.write(folder)
    write_json(folder / "run.json", {"trained_by": None})
    if finished:
        write_json(folder / "result.json", {})
    if trained:
        save_model(Policy(causal) if wrapped else causal, folder / "model/model.safetensors", {})
    return folder


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_run_is_built_again_and_is_a_source(wrapped, tmp_path):
    causal = scratch()
    marks = causal.add_tokens(["<step>"])
    folder = run_of(tmp_path / "runs/first", causal, wrapped=wrapped)
    assert open_source("run:first").digest == open_source(f"run:{folder}").digest
    again = Causal(CausalConfig(source="run:first"))
    same(again, causal.model)
    assert again.tokens.digest == causal.tokens.digest and again.tokens.add(["<step>"]) == marks
    assert (again.eos, again.context) == (causal.eos, causal.context)
    kept = Causal(CausalConfig(source="nothing/there"), kept=folder)  # needs neither source nor tokenizer
    kept.load_state_dict(causal.state_dict())  # strictly
    same(kept, causal.model)
    assert kept.tokens.digest == causal.tokens.digest


def test_a_run_that_trained_no_weights_is_what_it_began_as(tmp_path):
    folder, model = saved(tmp_path / "model")
    run_of(tmp_path / "runs/frozen", opened(folder), trained=False)
    same(opened("run:frozen"), model)


def test_runs_that_are_no_source_are_refused(tmp_path):
    run_of(tmp_path / "runs/half", scratch(), finished=False)
    with pytest.raises(DataError, match="not finished"):
        open_source("run:half")
    run_of(tmp_path / "runs/lost", scratch(), trained=False)
    with pytest.raises(DataError, match=r"has no model/model\.safetensors"):
        open_source("run:lost")
    done = run_of(tmp_path / "runs/other", scratch())
    shutil.rmtree(done / FOLDER)
    with pytest.raises(ConfigError, match="holds no causal language model"):
        open_source("run:other")
    with pytest.raises(DataError, match="There is no run"):
        open_source("run:nowhere")


def test_a_frozen_model_is_no_part_of_what_was_trained():
    from reason.engine.checkpoint import trained_state

    network = Policy(scratch())
    assert len(trained_state(network)) == 2 + len(list(network.policy.parameters()))  # the tied head once
    network.policy.requires_grad_(False)
    assert sorted(trained_state(network)) == ["value.bias", "value.weight"]


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_rows_and_the_others_keep_theirs(tied):
    causal = scratch(tied=tied)
    before = causal.model.get_output_embeddings().weight.clone()
    with torch.no_grad():
        logits = causal(IDS)
    size = causal.tokens.size
    assert causal.add_tokens(["<a>", "<b>", "<a>"]) == [size, size + 1, size]
    assert causal.add_tokens(["<b>"]) == [size + 1]
    tables = causal.model.get_input_embeddings().weight, causal.model.get_output_embeddings().weight
    assert all(len(table) == size + 2 for table in tables) and (tables[0] is tables[1]) == tied
    assert causal.model.config.vocab_size == size + 2
    torch.testing.assert_close(tables[1][:size], before)
    with torch.no_grad():
        torch.testing.assert_close(causal(IDS)[..., :size], logits)
    assert not torch.equal(tables[0][-1], tables[0][-2])


# --- what cannot be opened ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, said",
    [
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "no causal language model: it is BertForMaskedLM",
        ),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "no causal language model"),
        ({"model_type": "vit", "architectures": None}, "a model of type 'vit'"),
        ({"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "m.M"}}, "brings code of its own"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised weights"),
    ],
)
def test_models_of_other_kinds_are_refused_with_the_reason(keys, said, tmp_path):
    folder, _ = saved(tmp_path / "model")
    change(folder / "config.json", **keys)
    with pytest.raises(ConfigError, match=said):
        open_source(str(folder))


def test_broken_folders_are_refused(tmp_path):
    def broken(name, spoil, said, error=DataError):
        folder, _ = saved(tmp_path / name)
        spoil(folder)
        with pytest.raises(error, match=said):
            opened(folder)

    broken("tokenizer", lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json")
    broken("weights", lambda f: (f / "model.safetensors").unlink(), "no weights")
    broken("pickle", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickles")
    broken("config", lambda f: (f / "config.json").write_text("{"), "not valid JSON")
    broken("torn", lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 99), "cannot be read")
    broken(
        "many",
        lambda f: change(f / "config.json", num_hidden_layers=10**9),
        "states num_hidden_layers 1,000,000,000",
    )
    broken(
        "wide",
        lambda f: change(f / "config.json", hidden_size=2**40, num_attention_heads=4),
        "weights have other sizes",
    )
    broken(
        "one more",
        lambda f: change(f / "config.json", num_hidden_layers=3),
        "has no weights named model.layers.2",
    )
    broken("size", lambda f: change(f / "config.json", intermediate_size=40), "weights have other sizes")

    def more_tokens(folder):
        tokens = Tokens.train(TEXTS, "bpe", 290, cache=False)
        tokens.add(["<a>"] + [f"<{i}>" for i in range(20)])
        tokens.save(folder)

    broken("vocabulary", more_tokens, "tokenizer with .* tokens but an embedding")
