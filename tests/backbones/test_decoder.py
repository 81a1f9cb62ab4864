"""The recursive decoder: against plain formulas, against itself unrolled, and counted."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from reason.backbones.config import RecursiveConfig
from reason.backbones.decoder import Layer, RecursiveDecoder, Rotary, causal, rotate
from reason.backbones.shape import Scaling, Shape
from reason.backbones.sharing import SCHEMES
from reason.errors import ConfigError

TINY = Shape(vocab=31, hidden=24, layers=8, heads=6, kv_heads=2, head_dim=4, ffn=40)


def make(scheme="middle_cycle", recursions=3, shape=TINY, seed=0):
    """A decoder with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    model = RecursiveDecoder(RecursiveConfig(sharing=scheme), shape=shape, recursions=recursions).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def some(*size, seed=1):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def tokens(batch=2, length=9):
    return torch.randint(0, TINY.vocab, (batch, length), generator=torch.Generator().manual_seed(2))


# --- one layer, by plain formulas -----------------------------------------------------------------------


def slow_rotation(x, positions, theta):
    """Heads (T, h, d_h) as complex numbers x_i + i x_(i + d_h/2), multiplied by e^(i p w), float64."""
    half = x.shape[-1] // 2
    w = theta ** (-torch.arange(half).double() / half)
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    z = z * torch.polar(torch.ones(()).double(), positions.double()[:, None, None] * w)
    return torch.cat([z.real, z.imag], -1).float()


def slow_norm(x, norm, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def slow_layer(layer, x, shape, positions, seen):
    """Layer on x (T, D); query row i sees key row j where seen[i, j]. One head after the other."""
    T, d = len(x), shape.head_dim
    normed = slow_norm(x, layer.norm_attention, shape.norm_eps)
    q = layer.query(normed).view(T, shape.heads, d)
    k, v = (half.view(T, shape.kv_heads, d) for half in layer.key_value(normed).chunk(2, -1))
    if shape.head_norms:
        q, k = slow_norm(q, layer.norm_query, shape.norm_eps), slow_norm(k, layer.norm_key, shape.norm_eps)
    q, k = (slow_rotation(z, positions, shape.rope_theta) for z in (q, k))
    mixed = []
    for head in range(shape.heads):
        group = head // (shape.heads // shape.kv_heads)
        score = (q[:, head] @ k[:, group].T / math.sqrt(d)).masked_fill(~seen, -torch.inf)
        mixed.append(score.softmax(-1) @ v[:, group])
    x = x + torch.cat(mixed, -1) @ layer.out.weight.T
    normed = slow_norm(x, layer.norm_feed, shape.norm_eps)
    gate = normed @ layer.gate.weight.T
    return x + (gate * gate.sigmoid() * (normed @ layer.up.weight.T)) @ layer.down.weight.T


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kv_heads": 6},
        {"kv_heads": 1},
        {"biases": True},
        {"head_norms": True, "head_dim": 8},
        {"rope_theta": 50.0},
    ],
)
def test_a_layer_is_its_formula(change):
    shape = replace(TINY, **change)
    layer = make(shape=shape).block[0]
    x, positions = some(7, 24), torch.arange(7)
    with torch.no_grad():
        got = layer(x, Rotary(shape)(positions))
        wanted = slow_layer(layer, x, shape, positions, torch.ones(7, 7).tril().bool())
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_grouped_queries_equal_heads_repeated():
    q, k, v = some(2, 5, 6, 4), some(2, 5, 2, 4, seed=3), some(2, 5, 2, 4, seed=4)
    repeated = causal(q, k.repeat_interleave(3, -2), v.repeat_interleave(3, -2))
    torch.testing.assert_close(causal(q, k, v), repeated)
    swapped = causal(
        q, k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1)
    )  # the other order of heads is another thing
    assert not torch.allclose(repeated, swapped, atol=1e-2)


def test_parts_of_a_layer_make_the_layer():
    layer, x = make().block[0], some(2, 7, 24)
    rope = Rotary(TINY)(torch.arange(7))
    with torch.no_grad():
        apart = layer.finish(x, causal(layer.queries(x, rope), *layer.keys_values(x, rope)))
        assert torch.equal(layer(x, rope), apart)
    assert layer.queries(x, rope).shape == (2, 7, 6, 4)
    assert [z.shape for z in layer.keys_values(x, rope)] == [(2, 7, 2, 4)] * 2


# --- rotary positions -----------------------------------------------------------------------------------


def test_only_distances_matter():
    layer, x, rope = make().block[0], some(2, 7, 24), Rotary(TINY)
    with torch.no_grad():
        here, there = layer(x, rope(torch.arange(7))), layer(x, rope(torch.arange(7) + 100))
        stretched = layer(x, rope(torch.arange(7) * 2))
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    assert (here - stretched).abs().max() > 1e-2


def test_some_of_the_tokens_keep_the_positions_they_had():
    """A step over a subset equals the layer over all in which only the subset is seen."""
    layer, x = make().block[0], some(9, 24)
    kept = torch.tensor([0, 2, 3, 7])
    seen = torch.zeros(9, 9, dtype=torch.bool)
    for i in kept:
        seen[i, kept[kept <= i]] = True
    seen |= torch.eye(9, dtype=torch.bool)  # rows that are left out must see something
    with torch.no_grad():
        whole = slow_layer(layer, x, TINY, torch.arange(9), seen)[kept]
        rope = Rotary(TINY)
        torch.testing.assert_close(layer(x[kept], rope(kept)), whole, atol=1e-5, rtol=1e-5)
        packed = layer(x[kept], rope(torch.arange(4)))
    assert (packed - whole).abs().max() > 1e-2


def test_each_row_may_have_positions_of_its_own():
    layer, x, rope = make().block[0], some(2, 5, 24), Rotary(TINY)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 3, 4, 8, 9]])
    with torch.no_grad():
        alone = torch.stack([layer(x[i], rope(positions[i])) for i in (0, 1)])
        torch.testing.assert_close(layer(x, rope(positions)), alone, atol=1e-5, rtol=1e-5)


def test_rotation_keeps_lengths_and_the_first_token_as_it_is():
    x = some(6, 3, 8)
    turned = rotate(x, Rotary(replace(TINY, head_dim=8))(torch.arange(6)))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[0], x[0]) and not torch.allclose(turned[1], x[1])


def test_scaled_frequencies():
    shape = replace(TINY, head_dim=64, rope_theta=500000.0)
    one = torch.ones(1, dtype=torch.long)
    plain = torch.atan2(*Rotary(shape)(one)[::-1])  # angle of position 1 = the frequency itself
    linear = torch.atan2(*Rotary(replace(shape, scaling=Scaling(4.0)))(one)[::-1])
    torch.testing.assert_close(linear, plain / 4)
    scaling = Scaling(8.0, low=1.0, high=4.0, original=8192)
    bands = torch.atan2(*Rotary(replace(shape, scaling=scaling))(one)[::-1])
    wave = 2 * math.pi / plain
    short, long = wave < 8192 / 4, wave > 8192
    torch.testing.assert_close(bands[short], plain[short])
    torch.testing.assert_close(bands[long], plain[long] / 8)
    between = ~short & ~long
    assert short.any() and long.any() and between.any()
    assert ((bands < plain) & (bands > plain / 8))[between].all()


def test_angles_stay_in_float32_and_survive_building_on_meta():
    positions = torch.arange(3000)
    wanted = Rotary(TINY)(positions)
    model = make().bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(model.rope(positions), wanted, strict=True))
    with torch.device("meta"):
        hollow = RecursiveDecoder(RecursiveConfig(), shape=TINY, recursions=3)
    hollow.to_empty(device="cpu").load_state_dict(make().state_dict())
    torch.testing.assert_close(hollow(tokens()), make()(tokens()))


# --- the whole network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("recursions", [1, 2, 3])
def test_layers_are_run_in_the_order_of_the_map(scheme, recursions):
    ends = 2 if scheme.startswith("middle") else 0
    model = make(scheme, recursions, replace(TINY, layers=ends + 6))
    ids, positions, seen = tokens(1)[0], torch.arange(9), torch.ones(9, 9).tril().bool()
    with torch.no_grad():
        x = model.embed.weight[ids]
        for index in model.sharing.physical:
            x = slow_layer(model.physical[index], x, TINY, positions, seen)
        wanted = slow_norm(x, model.norm, TINY.norm_eps)
        torch.testing.assert_close(model(ids[None])[0], wanted, atol=2e-4, rtol=2e-4)
        logits = model.logits(model(ids[None]))
        torch.testing.assert_close(logits[0], model(ids[None])[0] @ model.embed.weight.T)


@pytest.mark.parametrize("scheme", ["cycle", "middle_cycle"])
def test_less_depth_is_a_shorter_network(scheme):
    ends = 2 if scheme == "middle_cycle" else 0
    model = make(scheme, 3, replace(TINY, layers=ends + 6))
    outputs = []
    for depth in (1, 2, 3):
        short = make(scheme, depth, replace(TINY, layers=ends + 2 * depth), seed=9)
        short.load_state_dict(model.state_dict())
        with torch.no_grad():
            outputs.append(model(tokens(), depth))
            torch.testing.assert_close(outputs[-1], short(tokens()), atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs[2], model(tokens()))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2 < (outputs[1] - outputs[2]).abs().max()
    with pytest.raises(ValueError, match="1 to 3"):
        model(tokens(), 4)


def test_schemes_that_cannot_stop_early_say_so():
    model = make("middle_sequence", 3)
    assert torch.equal(model(tokens(), 3), model(tokens()))
    with pytest.raises(ValueError, match="cannot stop early"):
        model(tokens(), 2)


@pytest.mark.parametrize("scheme", ["cycle", "middle_cycle"])
def test_a_loop_of_ones_own_gives_the_same(scheme):
    model = make(scheme, 3, replace(TINY, layers=8 if scheme == "middle_cycle" else 6))
    rope = model.rope(torch.arange(9))
    with torch.no_grad():
        x = model.begin(tokens(), rope)
        for _ in range(3):
            x = model.recurse(x, rope)
        assert torch.equal(model.finish(x, rope), model(tokens()))


@pytest.mark.filterwarnings("default")  # torch's own, while it traces
def test_a_compiler_sees_one_graph():
    model = make()
    traced = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for depth in (None, 2):
            torch.testing.assert_close(traced(tokens(), depth), model(tokens(), depth))


def test_no_token_sees_those_after_it():
    model, ids = make(), tokens()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % TINY.vocab
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_is_reached(scheme):
    ends = 2 if scheme.startswith("middle") else 0
    model = make(scheme, 2, replace(TINY, layers=ends + 4, tied=False, biases=True, head_norms=True))
    model.logits(model(tokens())).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


# --- weights: how many, where, and those of another network ---------------------------------------------

BASES = {  # layers, D, h, h_kv, d_h, F of the SmolLM sizes that the paper uses; V = 49,152
    "135M": (30, 576, 9, 3, 64, 1536),
    "360M": (32, 960, 15, 5, 64, 2560),
    "730M": (26, 1536, 24, 8, 64, 4096),
    "1.7B": (24, 2048, 32, 32, 64, 8192),
}
# (recursions, layers in the block) of middle-cycle, or (1, None) for vanilla: millions outside the embedding
COUNTS = {
    "135M": {(1, None): 106.2, (2, 14): 56.6, (3, 10): 42.5, (3, 9): 38.9, (4, 7): 31.9},
    "360M": {(1, None): 314.6, (2, 15): 167.2, (3, 10): 118.0, (4, 8): 98.3},
    "730M": {(1, None): 654.4, (2, 12): 352.4, (3, 8): 251.7, (4, 6): 201.4},
    "1.7B": {(1, None): 1610.7, (2, 11): 872.5, (3, 8): 671.1, (4, 6): 536.9},
}


@pytest.mark.parametrize("base", BASES)
def test_parameter_counts_are_those_of_the_paper(base):
    L, D, h, h_kv, d_h, F = BASES[base]
    for (recursions, block), millions in COUNTS[base].items():
        layers = L if block is None else 2 + block * recursions
        shape = Shape(vocab=49152, hidden=D, layers=layers, heads=h, kv_heads=h_kv, head_dim=d_h, ffn=F)
        scheme = "cycle" if block is None else "middle_cycle"
        with torch.device("meta"):
            model = RecursiveDecoder(RecursiveConfig(sharing=scheme), shape=shape, recursions=recursions)
        embedding = model.embed.weight.numel()
        assert embedding == 49152 * D
        found = sum(p.numel() for p in model.parameters()) - embedding
        layer = 2 * D * h * d_h + 2 * D * h_kv * d_h + 3 * D * F + 2 * D
        assert found == (L if block is None else 2 + block) * layer + D
        assert round(found / 1e6, 1) == millions


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_weight_has_two_names_and_all_survive_safetensors(scheme, tmp_path):
    ends = 2 if scheme.startswith("middle") else 0
    model = make(scheme, 3, replace(TINY, layers=ends + 6))
    state = model.state_dict()
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)
    assert len(state) == len(list(model.parameters())) == 2 + 8 * model.sharing.unique
    assert len({id(layer) for layer in model.physical}) == model.sharing.unique == 2 + ends
    save_file(state, tmp_path / "model.safetensors")
    again = make(scheme, 3, replace(TINY, layers=ends + 6), seed=5)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(tokens()), model(tokens()))
    assert torch.equal(copy.deepcopy(model)(tokens()), model(tokens()))


def vanilla(layers=8, **change):
    """A network without sharing, and its weights by the names under which others are opened."""
    model = make("cycle", 1, replace(TINY, layers=layers, **change), seed=7)
    return model, {name.replace("block.", "layers."): t for name, t in model.state_dict().items()}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tied", [True, False])
def test_one_recursion_is_the_network_itself(scheme, tied):
    model, tensors = vanilla(tied=tied)
    other = make(scheme, 1, replace(TINY, tied=tied)).fill(tensors)
    with torch.no_grad():
        assert torch.equal(other.logits(other(tokens())), model.logits(model(tokens())))


def test_layers_come_from_where_they_are_told():
    model, tensors = vanilla()
    looped = make("middle_cycle", 3).fill(tensors, [[0], [1, 3, 5], [4], [7]])
    first, one, two, last = looped.physical
    for name, found in one.named_parameters():
        mean = sum(tensors[f"layers.{i}.{name}"] for i in (1, 3, 5)) / 3
        torch.testing.assert_close(found, mean)
    for layer, index in ((first, 0), (two, 4), (last, 7)):
        for name, found in layer.named_parameters():
            assert torch.equal(found, tensors[f"layers.{index}.{name}"])
    assert torch.equal(looped.embed.weight, model.embed.weight)
    before = tensors["layers.0.out.weight"].clone()
    with torch.no_grad():
        looped.physical[0].out.weight.zero_()
    assert torch.equal(tensors["layers.0.out.weight"], before)  # a copy, not a view


def test_weights_begin_as_configured():
    torch.manual_seed(0)
    shape = replace(TINY, hidden=64, ffn=256, head_dim=16, vocab=400, biases=True, tied=False)
    model = RecursiveDecoder(RecursiveConfig(init_std=0.05), shape=shape, recursions=3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.std().item() - 0.05) < 0.003, name


# --- settings -------------------------------------------------------------------------------------------


def test_the_card_leads_to_the_class_and_the_defaults_make_a_network():
    from reason import registry

    card = registry.card("backbones", "recursive")
    assert card.kind == "recursive decoder" and registry.resolve(card.target) is RecursiveDecoder
    config = card.Config()
    model = RecursiveDecoder(config, shape=config.shape(257), recursions=3)
    assert sum(p.numel() for p in model.block.parameters()) == 2 * 393_600  # spec'd size of a CPU layer
    assert isinstance(model.first, Layer) and model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 192)


@pytest.mark.parametrize(
    ("keys", "said", "mend"),
    [
        ({"heads": 5}, "heads=5", "backbone.heads=4"),
        ({"hidden": 6, "heads": 6, "kv_heads": 1}, "even width", "backbone.heads=3"),
        ({"hidden": 7, "heads": 1, "kv_heads": 1}, "even width", "backbone.hidden=8"),
        ({"kv_heads": 4}, "kv_heads=4 does not divide backbone.heads=6", "backbone.kv_heads=3"),
        ({"ffn": 0}, "ffn is 0", ""),
        ({"context": -1}, "context is -1", ""),
        ({"rope_theta": 0.0}, "rope_theta is 0.0", ""),
        ({"init_std": float("nan")}, "init_std", ""),
        ({"vocab": 256}, "too few", "tokenizer=word"),
    ],
)
def test_settings_that_cannot_be_are_refused(keys, said, mend):
    with pytest.raises(ConfigError) as caught:
        RecursiveConfig(**keys)
    assert said in caught.value.message and mend in caught.value.hint


def test_few_tokens_are_enough_for_words():
    assert RecursiveConfig(vocab=20, tokenizer="word").vocab == 20


def test_a_source_means_the_same_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    assert RecursiveConfig(source="model").source == str(tmp_path / "model")
    for kept in ("", "smollm2-135m", "owner/name", "owner/name@v1.0", "run:abc", str(tmp_path / "model")):
        assert RecursiveConfig(source=kept).source == kept
    assert RecursiveConfig(source="./gone").source == str(tmp_path / "gone")


def test_recursions_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="4 does not divide 6"):
        RecursiveDecoder(RecursiveConfig(), shape=TINY, recursions=4)
