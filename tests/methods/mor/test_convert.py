"""A language model that works becomes a recursive one: exactly it where it can be, as near as told elsewhere.

Tiny networks of chance, saved by transformers; no network and no large model.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from reason.backbones.config import RecursiveConfig
from reason.backbones.decoder import RecursiveDecoder
from reason.backbones.losses import linear_kl
from reason.backbones.pretrained import open_pretrained, opened
from reason.backbones.source import settle
from reason.backbones.tokens import Tokens
from reason.engine import runner
from reason.engine.config import resolve
from reason.engine.evaluation import judge
from reason.engine.parallel import World
from reason.engine.session import load_dataset, open_run, recorded_plan
from reason.engine.stages import source_digests
from reason.errors import ConfigError, DataError
from reason.files import read_json, write_json
from reason.methods.base import Step
from reason.methods.mor import objective
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.config import MorConfig
from reason.methods.mor.convert import Layout, Teacher, convert, evenly
from reason.methods.mor.generate import GenerationRequest, generate
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.scheduler import Scheduler
from reason.methods.mor.token_selection import AboveThreshold, KnownDepths, TopK
from reason.methods.mor.visible_keys import KV_MODES

_spec = importlib.util.spec_from_file_location("mor_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

HERE = World(0, 1, torch.device("cpu"))
TOKENS = Tokens.train(["the rain in Spain stays mainly in the plain"] * 3, "bpe", 270, cache=False)
FAMILIES = ("llama", "qwen2", "qwen3")
ALL = 10**6  # a rank beyond every matrix


def folder(place, family="llama", seed=0, layers=6):
    """A model folder as transformers saves it, its weights large enough that each of them matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family, vocab_size=TOKENS.size, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64, bos_token_id=None,
        eos_token_id=TOKENS.eos, tie_word_embeddings=family == "llama",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(place)
    TOKENS.save(place)
    return place


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {f: open_pretrained(str(folder(tmp_path_factory.mktemp(f) / "model", f))) for f in FAMILIES}


def network(causal, recursions=2, scheme="middle_cycle", init="stepwise", lora=0, **keys):
    layout = Layout.of(causal.shape.layers, scheme, recursions, init)
    make = partial(RecursiveDecoder, RecursiveConfig(sharing=scheme))
    decoder = convert(causal, layout, make, lora)
    return MixtureOfRecursions(decoder, MorConfig(**keys), 0.3, Teacher(causal)).eval()


def text(*size, seed=1):
    return torch.randint(TOKENS.size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def original(causal, tokens):
    config = RecursiveConfig(sharing="cycle")
    decoder = RecursiveDecoder(config, shape=causal.shape, recursions=1).fill(causal.tensors)
    return decoder.logits(decoder(tokens))


@torch.no_grad()
def logits(model, tokens, route=None, **how):
    return model.decoder.logits(model.read(model(tokens, route, **how).states))


# --- which layer becomes which --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "block"),
    [
        ("stepwise", [(1,), (4,), (6,)]),  # 0, 2.5 and 5 of the middle, rounded
        ("average", [(1, 4), (2, 5), (3, 6)]),
        ("lower", [(1,), (2,), (3,)]),
        ("upper", [(4,), (5,), (6,)]),
        ("random", [(), (), ()]),
    ],
)
def test_where_the_shared_layers_begin(init, block):
    layout = Layout.of(8, "middle_cycle", 2, init)
    assert (
        layout.origins == [(0,), *block, (7,)] and layout.counterparts == list(range(8)) and not layout.note
    )
    assert Layout.of(8, "middle_cycle", 1, init).origins == [(i,) for i in range(8)]  # the source itself


def test_schemes_tie_other_layers():
    assert Layout.of(6, "middle_sequence", 2, "average").origins == [(0,), (1, 2), (3, 4), (5,)]
    assert Layout.of(4, "cycle", 2, "average").origins == [(0, 2), (1, 3)]
    assert evenly(6, 1) == [0] and evenly(28, 14)[-1] == 27


def test_layers_that_do_not_divide_are_left_out_or_repeated():
    dropped = Layout.of(12, "middle_cycle", 3)  # 10 between the ends
    assert (dropped.sharing.block, dropped.sharing.layers) == (3, 11)
    assert dropped.counterparts == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert dropped.note == "10 layers of the source became 9: left out, counted from 0: 5"
    repeated = Layout.of(13, "middle_cycle", 3)  # 11
    assert repeated.sharing.block == 4 and repeated.note.startswith(
        "11 layers of the source became 12: repeated"
    )
    assert len(repeated.counterparts) == len(set(repeated.counterparts)) + 1


def test_more_recursions_than_layers_are_refused():
    with pytest.raises(ConfigError, match="4 layers that can be shared, too few for 5") as caught:
        Layout.of(6, "middle_cycle", 5)
    assert "train_depth=4" in caught.value.hint


@pytest.mark.parametrize("init", ["stepwise", "average", "random"])
def test_layers_hold_what_they_begin_with(sources, init):
    causal = sources["qwen2"]
    model = network(causal, init=init)
    for name in ("query.weight", "query.bias", "norm_feed.weight"):
        source = {i: causal.tensors[f"layers.{i}.{name}"] for i in range(6)}
        got = model.decoder.block[1].get_parameter(name)
        want = {"stepwise": source[4], "average": (source[2] + source[4]) / 2}.get(init)
        assert init == "random" or torch.equal(got, want)
        assert init != "random" or not any(torch.equal(got, s) for s in source.values())
        assert torch.equal(model.decoder.first.get_parameter(name), source[0])
        assert torch.equal(model.decoder.last.get_parameter(name), source[5])
    assert torch.equal(model.decoder.embed.weight, causal.tensors["embed.weight"])


# --- what stays exact -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["cycle", "middle_cycle"])
def test_one_recursion_is_the_source(sources, family, scheme):
    tokens = text(2, 20)
    got = logits(network(sources[family], 1, scheme, routing="none"), tokens)
    assert torch.equal(got, original(sources[family], tokens))


@pytest.mark.parametrize("routing", ["expert", "token"])
def test_full_capacity_begins_as_the_plain_recursive_model(sources, routing):
    causal, tokens = sources["llama"], text(2, 20)
    model = network(causal, routing=routing)
    assert (model.config.combine, model.config.alpha) == ("delta", 2.0)
    plain = network(causal, routing="none")
    got = model(tokens, TopK([1, 1]) if routing == "expert" else None)
    assert (got.depth == 2).all()  # choices that are equal go deep
    torch.testing.assert_close(got.states, plain(tokens).states, atol=1e-5, rtol=1e-5)
    scratch = MixtureOfRecursions(plain.decoder, MorConfig(routing=routing), 0.3)
    assert scratch.config.combine == "paper" and scratch.config.alpha == (0.1 if routing == "expert" else 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_mode", KV_MODES)
def test_corrections_of_full_rank_give_the_source_back(sources, family, kv_mode):
    """All at once, with a cache, and through the scheduler."""
    causal, tokens = sources[family], text(2, 20)
    want = original(causal, tokens)
    model = network(causal, lora=ALL)
    torch.testing.assert_close(model.decoder.logits(model.decoder(tokens)), want, atol=1e-4, rtol=1e-4)
    if kv_mode != "sharing":  # whose later steps look at the first one's keys
        torch.testing.assert_close(
            logits(model, tokens, KnownDepths(2), kv_mode=kv_mode), want, atol=1e-4, rtol=1e-4
        )
    deep = KnownDepths(2)
    for route in (deep, KnownDepths(torch.tensor([1, 2] * 20))):
        requests = [GenerationRequest(text(3 + i, seed=i).tolist(), 5 + i % 3, route) for i in range(5)]
        alone = [generate(model, r, cache=MoRCache(model, kv_mode)) for r in requests]
        for request, got in zip(requests, alone, strict=True):
            whole = torch.tensor([[*request.prompt, *got.tokens]])
            fixed = KnownDepths(torch.from_numpy(got.depth))
            seen = logits(model, whole[:, :-1], fixed, kv_mode=kv_mode)[0, len(request.prompt) - 1 :]
            assert seen.argmax(-1).tolist() == got.tokens
            if route is deep and kv_mode != "sharing":
                assert (
                    original(causal, whole)[0, len(request.prompt) - 1 : -1].argmax(-1).tolist() == got.tokens
                )
        together = Scheduler(model, MoRCache(model, kv_mode), rows=3, exits=2).run(requests)
        assert [g.tokens for g in together] == [g.tokens for g in alone]


def test_rows_at_several_steps_get_their_own_corrections(sources):
    model = network(sources["qwen3"], lora=3)
    decoder, x = model.decoder, torch.randn(7, 16, generator=torch.Generator().manual_seed(3))
    rope = decoder.rope(torch.arange(7))
    mixed = decoder.at(0, [(2, 0), (1, 0), (3, 1), (1, 0)])
    assert mixed.rows == [3, 3, 1]
    with torch.no_grad():
        for name in ("queries", "keys_values"):
            got, per_sequence = (
                getattr(mixed, name)(x, rope),
                [getattr(decoder.at(0, s), name)(x, rope) for s in (0, 1)],
            )
            for a, b0, b1 in zip(
                *((y,) if name == "queries" else y for y in (got, *per_sequence)), strict=True
            ):
                want = torch.cat([b0[:3], b1[3:6], b0[6:]])
                torch.testing.assert_close(a, want, atol=1e-5, rtol=1e-5)


def test_a_rank_is_spent_as_well_as_it_can_be(sources):
    causal = sources["llama"]
    model = network(causal, lora=5)
    for step, index in ((0, 2), (1, 4)):  # of the block's second layer
        layer, correction = model.decoder.block[1], model.decoder.corrections[step][1]
        for name in ("query", "down", "up"):
            wanted = causal.tensors[f"layers.{index}.{name}.weight"] - getattr(layer, name).weight
            low = getattr(correction, name)
            error = torch.linalg.matrix_norm(wanted - low.outward @ low.inward)
            best = torch.linalg.svdvals(wanted)[5:].norm()
            torch.testing.assert_close(error, best, atol=1e-5, rtol=1e-4)
            if best > 1e-3:
                torch.testing.assert_close(low.inward @ low.inward.T, torch.eye(5), atol=1e-4, rtol=0)
        merged = correction.merged(layer)
        torch.testing.assert_close(
            merged["norm_feed.weight"], causal.tensors[f"layers.{index}.norm_feed.weight"]
        )


def test_without_corrections_nothing_is_added(sources):
    plain = network(sources["llama"])
    assert plain.decoder.corrections is None and not any("corrections" in name for name in plain.state_dict())
    assert plain.decoder.at(0, [(2, 0), (1, 1)]) is plain.decoder.block[0]
    assert network(sources["llama"], 1, lora=3).decoder.corrections is None  # nothing to correct
    scratch = small.network(routing="none")
    torch.manual_seed(0)
    relaxed = RecursiveDecoder(
        RecursiveConfig(init_std=0.3), shape=scratch.decoder.shape, recursions=3, lora=4
    )
    tokens = torch.tensor([small.text(9)])
    with torch.no_grad():  # begins as it would without
        torch.testing.assert_close(relaxed(tokens), scratch.decoder(tokens))


@pytest.mark.parametrize("scheme", ["sequence", "middle_sequence"])
def test_schemes_that_repeat_in_place_are_what_the_decoder_says(sources, scheme):
    """Their steps are b layers each of the unrolled network, whichever those are."""
    causal, tokens = sources["qwen3"], text(2, 20)
    for lora in (0, ALL):
        model = network(causal, 2, scheme, routing="none", lora=lora)
        want = model.decoder.logits(model.decoder(tokens)).detach()
        torch.testing.assert_close(logits(model, tokens), want, atol=1e-5, rtol=1e-5)
        if lora:
            torch.testing.assert_close(want, original(causal, tokens), atol=1e-4, rtol=1e-4)
        got = generate(model, GenerationRequest(tokens[0].tolist(), 6)).tokens
        whole = torch.cat([tokens[0], torch.tensor(got)])[None]
        assert logits(model, whole[:, :-1])[0, 19:].argmax(-1).tolist() == got
    with pytest.raises(ConfigError, match="other layers at each"):
        model.decoder.at(1, [(1, 0), (1, 1)])


# --- training -------------------------------------------------------------------------------------------


def batch(rows=3, length=12):
    tokens, targets = text(rows, length), text(rows, length, seed=2)
    targets[0, :4] = -100
    return {"tokens": tokens, "targets": targets, "length": torch.full((rows,), length)}


def step(at=0):
    return Step(0, at, 0.0, torch.Generator().manual_seed(3))


def test_distilling_is_the_divergence_from_the_source(sources):
    causal, data = sources["qwen2"], batch()
    model = network(causal, distil=0.5, routing="none")
    total, count = objective.losses(model.config, model, data, step())["distil"]
    asked = data["targets"] >= 0
    ours, theirs = logits(model, data["tokens"])[asked], original(causal, data["tokens"])[asked]
    want = 0.5 * F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum")
    torch.testing.assert_close(total, want, atol=1e-4, rtol=1e-5)
    assert count == asked.sum()
    total.backward()
    assert model.decoder.block[0].up.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher._decoder.parameters())
    assert not any("teacher" in name for name in [*model.state_dict(), *dict(model.named_parameters())])
    same = network(causal, 1, distil=1.0, routing="none")
    assert abs(float(objective.losses(same.config, same, data, step())["distil"][0].detach())) < 1e-4


@pytest.mark.parametrize("chunk", [2, 100])
def test_the_divergence_and_its_gradient_in_chunks(chunk):
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 4), (11, 4), (5, 3), (11, 3))
    hidden, weight, other, table = (torch.randn(*size, generator=generator) for size in sizes)
    hidden.requires_grad_(), weight.requires_grad_()
    got = linear_kl(hidden, weight, other, table, chunk=chunk)
    p, q = (other @ table.T).log_softmax(-1), (hidden @ weight.T).log_softmax(-1)
    want = F.kl_div(q, p, log_target=True, reduction="sum")
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y, (hidden, weight)) for y in (3 * got, 3 * want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keys", [{"kv": "sharing"}, {"routing": "token"}, {}])
def test_every_correction_takes_part(sources, keys):
    model = network(sources["qwen3"], lora=2, **keys)
    data = batch(1, 1) if keys.get("routing") else batch()
    losses = objective.losses(model.config, model, data, step())
    sum(s for s, _ in losses.values()).backward()
    assert all(p.grad is not None for p in model.decoder.corrections.parameters())


def test_foreseeing_counts_as_capacities_fall(sources):
    model, data = network(sources["llama"], capacity_warmup=80, aux_weight=0.5), batch()
    at = {n: objective.losses(model.config, model, data, step(n))["foresee 1"][0] for n in (0, 40, 80, 200)}
    assert at[0] == 0 and at[40] == at[80] / 2 and at[80] == at[200] > 0


# --- in runs --------------------------------------------------------------------------------------------

QUICK = (
    "dataset=chains", "dataset.train_documents=40", "dataset.valid_documents=6", "dataset.test_documents=6", "backbone.context=32", "train.batch_size=4", "train.steps=2",
    "train.lr=1e-3", "eval.latency_samples=2", "eval.resamples=100", "eval.limit=4", "hardware.device=cpu",
)  # fmt: skip


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("REASON_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    opened.cache_clear()
    return folder(tmp_path / "model")


def plan(*words):
    return resolve("mor", [*QUICK, *words])


def run(*words):
    made = plan(*words)
    made_in = runner.prepare(made, load_dataset(made).digest)
    runner.execute(made_in, made, "cpu", 1, quiet=True)
    return made_in


def test_a_run_from_a_source_is_a_source(model):
    first = run(
        f"backbone.source={model}", "train_depth=2", "mor.routing=none", "mor.lora=2", "mor.distil=0.5"
    )
    assert first.result.info["source"] == str(model)
    tokens = text(2, 20)
    source = open_pretrained(f"run:{first.name}")
    assert source.tokens.digest == TOKENS.digest and source.where == f"run {first.name}"
    trained = open_run(first).session.network
    torch.testing.assert_close(original(source, tokens), logits(trained, tokens), atol=1e-4, rtol=1e-4)
    assert source.digest == open_pretrained(f"run:{first.path}").digest != opened(str(model)).digest
    second = run(f"backbone.source=run:{first.name}", "train_depth=2", "train.steps=0", "train.epochs=0")
    assert second.config["backbone"]["source"] == f"run:{first.path.absolute()}"
    assert second.result.training.steps == 0 and second.result.metrics["eval/loss"] > 0


def test_no_training_judges_the_model_as_it_begins(model):
    """``train.steps=0 train.epochs=0 train_depth=0`` is the source."""
    found = run(f"backbone.source={model}", "train_depth=0", "train.steps=0", "train.epochs=0")
    tokens = text(2, 20)
    source = original(open_pretrained(str(model)), tokens)
    shutil.rmtree(model)  # a finished run needs it no more
    opened.cache_clear()
    assert torch.equal(logits(open_run(found).session.network, tokens), source)


@pytest.mark.parametrize("routing", ["expert", "token", "random"])
def test_a_routed_run_from_a_source_is_loaded_as_what_was_trained(model, routing):
    found = run(
        f"backbone.source={model}", "train_depth=2", f"mor.routing={routing}", "mor.lora=1", "eval.limit=0"
    )
    loaded = open_run(found).session
    assert loaded.network.config.combine == "delta"
    bits = found.result.curve[-1].metrics["bits per byte"].value
    again = judge(loaded.method, loaded.ctx, HERE, loaded.network, loaded.ctx.data.test, 2)
    rows = again.evaluation.rows
    assert rows["bits"].to_numpy().sum() / rows["bytes"].to_numpy().sum() == pytest.approx(bits, rel=1e-6)
    judged = runner.run(
        recorded_plan(found, {"eval.curve": False}), model=found, quiet=True
    )  # source, tokenizer: as trained
    assert judged.result.curve[-1].metrics["bits per byte"].value == pytest.approx(bits, rel=1e-6)
    assert torch.equal(
        logits(open_run(judged).session.network, text(2, 9)), logits(loaded.network, text(2, 9))
    )


def test_another_tokenizer_and_another_memory_are_refused(model):
    found = run("train_depth=2", "backbone.hidden=16", "backbone.heads=2", "backbone.layers=4")
    with pytest.raises(ConfigError, match=r"mor.kv=sharing \(recorded: recursion\)") as caught:
        runner.run(recorded_plan(found, {"mor.kv": "sharing"}), model=found, quiet=True)
    assert "mor.force" in str(caught.value) and "mor.gap" in str(caught.value)
    TOKENS.save(found / "tokenizer")
    with pytest.raises(DataError, match="not the one that its model was trained with"):
        open_run(found)


def test_what_cannot_be_a_source_says_why(model, tmp_path):
    plain = run(
        "train_depth=2", "mor.routing=none", "backbone.hidden=16", "backbone.heads=2", "backbone.layers=4"
    )
    source = open_pretrained(f"run:{plain.name}")
    assert (
        source.shape.layers == 4
        and source.tensors["layers.1.up.weight"] is not source.tensors["layers.0.up.weight"]
    )
    assert source.tensors["layers.1.up.weight"].data_ptr() == source.tensors["layers.2.up.weight"].data_ptr()

    def spoilt(name, said, error=DataError):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(plain.path, copy)
        name(copy)
        with pytest.raises(error, match=said):
            open_pretrained(f"run:{copy}")

    told = read_json(plain.path / "network.json") | {"routing": "expert"}
    spoilt(lambda c: write_json(c / "network.json", told), "routes its tokens", ConfigError)
    spoilt(lambda c: shutil.rmtree(c / "tokenizer"), "has no tokenizer")
    spoilt(lambda c: (c / "result.json").unlink(), "is not finished")
    spoilt(lambda c: (c / "network.json").unlink(), "it has no network.json", ConfigError)
    spoilt(lambda c: (c / "model/model.safetensors").unlink(), "has no model file")
    spoilt(lambda c: (c / "run.json").unlink(), "has no run.json")
    spoilt(
        lambda c: (c / "run.json").write_text(json.dumps({"method": "mor", "trained_by": "gone"})),
        "not in the same folder",
    )
    with pytest.raises(DataError, match="There is no run"):
        open_pretrained("run:mor-1234")


def test_hashes_know_what_a_source_holds(model, tmp_path):
    def hashes(place):
        made = plan(f"backbone.source={place}", "train_depth=2")
        return made.hashes("data", source_digests(made))

    shutil.copytree(model, tmp_path / "copy")
    other = folder(tmp_path / "other", seed=1)
    assert hashes(model) == hashes(tmp_path / "copy")
    bare = plan("train_depth=2")
    assert source_digests(bare) == {}
    found = [*hashes(model), *hashes(other), *bare.hashes("data")]
    assert len(set(found)) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mor.init=middle"], "stepwise"),
        (["mor.lora=-1"], "below 0"),
        (["mor.distil=0.5", "train_depth=2"], "there is none"),
        (["backbone.source=smollm2-135m", "mor.gate=tanh", "train_depth=2"], "shuts out the layers"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_loaded(words, said):
    with pytest.raises(ConfigError) as caught:
        plan(*words)
    assert said in str(caught.value)


def test_refused_once_the_source_is_known(model):
    for words, said in (
        (["train_depth=5"], "too few for 5"),
        (["backbone.context=65"], "64 tokens at a time"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(f"backbone.source={model}", "train_depth=2", *words)


def test_a_run_means_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mor-1").mkdir(parents=True)
    for name in ("run:mor-1", "run:./runs/mor-1", f"run:{tmp_path}/runs/mor-1"):
        assert settle(name) == f"run:{tmp_path}/runs/mor-1"
    assert settle("run:mor-2") == "run:mor-2"


def test_shapes_survive_being_kept(sources):
    from reason.backbones.from_run import _shape
    from reason.backbones.shape import Scaling

    shape = dataclasses.replace(sources["qwen3"].shape, scaling=Scaling(8.0, original=60))
    assert _shape(json.loads(json.dumps(dataclasses.asdict(shape)))) == shape


def test_thresholds_still_cut_depth(sources):
    """Routers that begin at zero say 0, which is not above 0: the calibrated route decides, not a broken one."""
    got = network(sources["llama"])(text(1, 9), AboveThreshold([0.0]))
    assert (got.depth == 1).all()
