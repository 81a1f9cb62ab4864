"""The encoders against a plain reference that recomputes everything, and what must hold of their states."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reason import registry
from reason.backbones.bidirectional import Bert4Rec
from reason.backbones.config import SasrecConfig
from reason.backbones.encoder import SequenceEncoder
from reason.errors import ConfigError

N, D, K = 40, 16, 3
KINDS = ("sasrec", "bert4rec", "unisrec")
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind="sasrec", steps=K, layers=2, seed=0, text=None, **sizes):
    torch.manual_seed(seed)
    card = registry.card("backbones", kind)
    config = card.Config(
        **({"hidden": D, "layers": layers, "ffn": 24, "max_length": 12, "dropout": 0.0} | sizes)
    )
    if kind == "unisrec" and text is None:
        text = torch.randn(N, 5)
    model = registry.resolve(card.target)(config, num_items=N, steps=steps, text=text).eval()
    with torch.no_grad():
        for (
            name,
            parameter,
        ) in model.named_parameters():  # far from the start, so that nothing is small by chance
            if "norm" not in name:
                parameter.mul_(15)
    return model


def padded(lengths, width, seed=1):
    items = torch.randint(0, N, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    length = torch.tensor(lengths)
    items[torch.arange(width) >= length[:, None]] = N
    return items, length


def recompute(model, history, steps, noise=None):
    """States r_0..r_K of one history (n,) by running the whole sequence anew after every step.

    With ``noise`` (K, d): the noisy branch, whose inputs are the clean states plus noise.
    """
    table, n = model.item_vectors(), len(history)
    tokens = [*(table[i] + model.position.weight[t] for t, i in enumerate(history.tolist()))]
    clean = recompute(model, history, steps) if noise is not None else None
    states = []
    for k in range(steps + 1):
        x = model.norm(torch.stack(tokens))  # (n + k, d)
        for block in model.blocks:
            heads, width = block.heads, x.shape[1] // block.heads
            query, key, value = (
                p.view(len(x), heads, width).transpose(0, 1) for p in block.project(x).chunk(3, -1)
            )
            score = query @ key.transpose(1, 2) / width**0.5
            future = torch.ones(len(x), len(x)).triu(1).bool()
            if isinstance(model, Bert4Rec):
                future[:n, :n] = False  # an item sees all items
            score = score.masked_fill(future, -torch.inf)
            mixed = (score.softmax(-1) @ value).transpose(0, 1).reshape(len(x), -1)
            x = block.norm_attention(x + block.out(mixed))
            x = block.norm_feed(x + block.down(torch.nn.functional.gelu(block.up(x))))
        states.append(x[-1])
        if k < steps:
            fed = x[-1] if clean is None else clean[k] + noise[k]
            tokens.append(fed + model.step_position[k])
    return torch.stack(states)


def cached(model, items, length, steps):
    """(B, steps + 1, d) by ``start`` and ``advance``."""
    with torch.no_grad():
        thought = model.start(items, length, steps)
        return torch.stack([thought.state, *(model.advance(thought) for _ in range(steps))], 1)


@every_kind
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_cached_steps_equal_recomputing_the_whole_sequence(kind, layers):
    model = make(kind, layers=layers)
    items, length = padded([10, 1, 4, 7], 10)
    states = cached(model, items, length, K)
    for row in range(len(items)):
        wanted = recompute(model, items[row, : length[row]], K)
        torch.testing.assert_close(states[row], wanted, atol=1e-5, rtol=1e-5)


@every_kind
def test_all_prefixes_at_once_equal_each_prefix_alone(kind):
    model = make(kind)
    items, length = padded([8, 3, 1], 8)
    noise = torch.randn(K, 3, 8, D)
    clean, noisy = model.reason(items, noise=noise)
    assert noisy is not None
    for b in range(3):
        for t in range(length[b]):
            prefix = items[b, : t + 1]
            torch.testing.assert_close(clean[b, t], recompute(model, prefix, K), atol=1e-5, rtol=1e-5)
            wanted = recompute(model, prefix, K, noise[:, b, t])
            torch.testing.assert_close(noisy[b, t], wanted[1:], atol=1e-5, rtol=1e-5)


@every_kind
def test_noise_never_touches_items_nor_the_clean_branch(kind):
    model = make(kind)
    items, _ = padded([6, 6], 6)
    clean, none = model.reason(items)
    assert none is None
    loud, noisy = model.reason(items, noise=torch.full((K, 2, 6, D), 5.0).normal_())
    assert torch.equal(clean[:, :, 0], loud[:, :, 0])  # r_0 knows nothing of latent tokens
    torch.testing.assert_close(clean, loud, atol=1e-5, rtol=0)
    assert noisy is not None and (noisy - clean[:, :, 1:]).abs().max() > 0.1
    _, silent = model.reason(items, noise=torch.zeros(K, 2, 6, D))
    torch.testing.assert_close(silent, clean[:, :, 1:], atol=1e-5, rtol=0)


@every_kind
def test_fewer_steps_are_a_prefix_of_more(kind):
    model = make(kind)
    items, length = padded([9, 2, 5], 9)
    whole = cached(model, items, length, K)
    for k in range(K):
        assert torch.equal(cached(model, items, length, k), whole[:, : k + 1])


@every_kind
def test_no_steps_is_the_plain_backbone_bit_for_bit(kind):
    model, plain = make(kind), make(kind, steps=0)
    weights = {k: v for k, v in model.state_dict().items() if k != "step_position"}
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    items, length = padded([9, 2, 5], 9)
    assert torch.equal(cached(model, items, length, 0), cached(plain, items, length, 0))
    assert torch.equal(model.reason(items, 0)[0], plain.reason(items)[0])


@every_kind
def test_padding_is_irrelevant(kind):
    model = make(kind)
    items, length = padded([6, 2, 4], 6)
    before, every = cached(model, items, length, K), model.reason(items)[0]
    other = items.clone()
    other[items == N] = 7  # any item in place of padding
    if kind != "unisrec":  # where PAD has a row in the table
        with torch.no_grad():
            model.table.weight[N] = 100.0
    assert torch.equal(cached(model, items, length, K), before)
    assert torch.equal(cached(model, other, length, K), before)
    real = torch.arange(6) < length[:, None]
    assert torch.equal(model.reason(items)[0][real], every[real])
    wide = torch.nn.functional.pad(items, (0, 5), value=N)
    torch.testing.assert_close(cached(model, wide, length, K), before, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.reason(wide)[0][:, :6][real], every[real], atol=1e-5, rtol=0)


@every_kind
def test_rows_do_not_depend_on_their_batch(kind):
    model = make(kind)
    items, length = padded([10, 1, 4, 7], 10)
    states = cached(model, items, length, K)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        cached(model, items[order], length[order], K), states[order], atol=1e-5, rtol=0
    )
    for row, n in enumerate(length.tolist()):
        alone = cached(model, items[row : row + 1, :n], length[row : row + 1], K)
        torch.testing.assert_close(alone[0], states[row], atol=1e-5, rtol=0)


@every_kind
def test_item_keys_and_values_never_depend_on_latent_tokens(kind):
    model = make(kind)
    items, length = padded([5, 3], 5)
    with torch.no_grad():
        thought = model.start(items, length)
        before = [(k.clone(), v.clone()) for k, v in thought.items]
        for _ in range(K):
            model.advance(thought)
    for (k, v), (k0, v0) in zip(thought.items, before, strict=True):
        assert torch.equal(k, k0) and torch.equal(v, v0)


@every_kind
def test_a_later_item_reaches_earlier_ones_only_where_attention_goes_both_ways(kind):
    model = make(kind)
    items, length = padded([5, 5], 5)
    other = items.clone()
    other[:, 4] = (other[:, 4] + 1) % N
    with torch.no_grad():
        kept, changed = model.start(items, length).items, model.start(other, length).items
    for layer in range(2):
        for before, after in zip(kept[layer], changed[layer], strict=True):
            reached = not torch.equal(before[:, :, :4], after[:, :, :4])
            assert reached == (kind == "bert4rec" and layer > 0)  # the first layer projects single items
            assert not torch.equal(before[:, :, 4], after[:, :, 4])


@every_kind
def test_attention_weights_are_those_that_mix(kind):
    model = make(kind)
    items, length = padded([5, 3], 5)
    with torch.no_grad():
        thought = model.start(items, length)
        for k in range(K):
            weights = []
            model.advance(thought, weights)
            assert [w.shape for w in weights] == [(2, 2, 5 + k + 1)] * 2
            for w in weights:
                torch.testing.assert_close(w.sum(-1), torch.ones(2, 2))
                assert not w[1, :, 3:5].any()  # padding


@every_kind
def test_gradient_matches_finite_differences(kind):
    model = make(kind, hidden=8, ffn=8, steps=2).double()
    items, _ = padded([4, 2], 4)
    weight = torch.randn(2, 4, 3, 8, dtype=torch.float64) * (items < N)[..., None, None]
    parameters = [
        model.step_position,
        model.blocks[0].project.weight,
        model.position.weight,
        model.norm.weight,
        *([model.table.shift, model.table.weight, model.table.gate.weight] if kind == "unisrec" else []),
    ]

    def value(*_):
        return (model.reason(items)[0] * weight).sum()

    assert torch.autograd.gradcheck(value, parameters, atol=1e-6, fast_mode=True)


@every_kind
def test_gradient_of_a_step_position_stops_where_its_step_is_not_read(kind):
    model = make(kind)
    items, _ = padded([5, 5], 5)
    for k in range(K + 1):
        states = model.reason(items)[0]
        (grad,) = torch.autograd.grad(
            (states[:, :, k] * torch.randn(D)).sum(), model.step_position, allow_unused=True
        )
        reached = [] if grad is None else [bool(g.any()) for g in grad]
        assert reached == ([True] * k + [False] * (K - k) if k else [False] * K)


@every_kind
def test_steps_train_items_and_attention(kind):
    model = make(kind)
    items, _ = padded([5, 5], 5)
    shared = [model.table.weight, model.blocks[0].project.weight, model.blocks[1].project.weight]
    ways = torch.randn(D)
    without = torch.autograd.grad((model.reason(items, 0)[0][:, :, -1] @ ways).sum(), shared)
    through = torch.autograd.grad((model.reason(items)[0][:, :, -1] @ ways).sum(), shared)
    for a, b in zip(without, through, strict=True):
        assert b.any() and (a - b).abs().max() > 1e-2 * a.abs().max()


@pytest.mark.parametrize("steps", [0, K])
@pytest.mark.parametrize("kind, sizes", [*((kind, {}) for kind in KINDS), ("unisrec", {"ids": True})])
def test_every_parameter_gets_a_gradient(kind, sizes, steps):
    model = make(kind, steps=steps, text=torch.randn(N, 5), **sizes).train()
    items, _ = padded([5, 2], 5)
    vectors = model.item_vectors()
    read = model.reason(items, vectors=vectors)[0][items < N]  # (7, steps + 1, d)
    (read @ vectors.T).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    if kind != "unisrec":
        assert not model.table.weight.grad[N].any()  # padding is never learned


@every_kind
def test_items_are_looked_up_in_vectors_that_are_given(kind):
    model = make(kind, text=torch.randn(N, 5))
    items, length = padded([6, 2], 6)
    vectors = model.item_vectors().detach()
    states, every = cached(model, items, length, K), model.reason(items)[0]
    assert torch.equal(model.start(items, length, vectors=vectors).state, states[:, 0])
    assert torch.equal(model.reason(items, vectors=vectors)[0], every)
    vectors = vectors.clone()
    vectors[items[0, 3]] += 1.0
    assert not torch.equal(model.start(items, length, vectors=vectors).state[0], states[0, 0])


def test_text_moves_input_and_scores_alike():
    text = torch.randn(N, 5)
    model = make(text=text)
    assert torch.allclose(
        model.item_vectors(), model.table.weight[:N] + text @ model.text_map.weight.T, atol=1e-6
    )
    items, length = padded([6, 2], 6)
    for row in range(2):
        wanted = recompute(model, items[row, : length[row]], K)
        torch.testing.assert_close(cached(model, items, length, K)[row], wanted, atol=1e-5, rtol=0)
    assert "text" in model.state_dict() and not model.text.requires_grad


@every_kind
def test_one_item_and_a_full_window_and_what_is_refused(kind):
    model = make(kind)
    items, length = padded([12, 1], 12)
    assert cached(model, items, length, K).isfinite().all()
    with pytest.raises(ValueError, match="max_length=12"):
        model.reason(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="4 latent steps"):
        model.reason(items, K + 1)
    with pytest.raises(ValueError, match="empty history"):
        model.start(items, torch.tensor([12, 0]))
    with pytest.raises(ValueError, match="4 latent steps"):
        model.start(items, length, K + 1)
    with torch.no_grad():
        done = model.start(items, length, K)
        done.step = K
        with pytest.raises(ValueError, match="trained for 3"):
            model.advance(done)


@every_kind
@pytest.mark.parametrize(
    "wrong", [{"heads": 3}, {"heads": 0}, {"layers": 0}, {"max_length": 0}, {"text_dim": 0}]
)
def test_sizes_that_do_not_fit_are_refused(kind, wrong):
    with pytest.raises(ConfigError, match=f"backbone.{next(iter(wrong))}"):
        registry.card("backbones", kind).Config(**({"hidden": 16} | wrong))


def test_texts_must_be_those_of_the_items():
    with pytest.raises(ConfigError, match="3 text vectors for 40 items"):
        SequenceEncoder(SasrecConfig(), num_items=N, steps=1, text=torch.zeros(3, 5))


def test_both_ways_there_is_no_trunk_to_share():
    with pytest.raises(TypeError, match="share no trunk"):
        make("bert4rec").encode(torch.zeros(1, 3, dtype=torch.int64))


@every_kind
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("steps", [0, 2])
def test_flops_are_those_that_torch_counts(kind, layers, steps):
    model, n = make(kind, layers=layers, steps=2), 7
    items, length = padded([n], n)
    vectors = model.item_vectors().detach()  # made once, whatever is asked
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        thought = model.start(items, length, steps, vectors)
        for _ in range(steps):
            model.advance(thought)
        thought.state @ vectors.T
    hidden_pairs = n * n - n * (n + 1) // 2  # a causal kernel need not visit them; torch's plain one does
    hidden_pairs *= kind != "bert4rec"
    wanted = counter.get_total_flops() - (layers - 1) * hidden_pairs * 2 * D * 2
    assert float(model.flops(length, steps)[0]) == wanted


@every_kind
def test_half_precision_stays_finite(kind):
    model = make(kind)
    items, _ = padded([6, 1], 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, _ = model.reason(items)
    assert states.isfinite().all()
    real = items < N
    torch.testing.assert_close(states.float()[real], model.reason(items)[0][real], atol=0.4, rtol=0)


@every_kind
def test_state_survives_a_round_trip(kind):
    model, other = make(kind, text=torch.randn(N, 5)), make(kind, seed=5, text=torch.randn(N, 5))
    other.load_state_dict(model.state_dict())
    items, length = padded([6, 2], 6)
    assert torch.equal(cached(model, items, length, K), cached(other, items, length, K))
