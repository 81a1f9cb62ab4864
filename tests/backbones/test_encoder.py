"""The encoder against a plain reference that recomputes everything, and what must hold of its states."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reason.backbones.config import SasrecConfig
from reason.backbones.encoder import SequenceEncoder
from reason.errors import ConfigError

N, D, K = 40, 16, 3


def make(steps=K, layers=2, seed=0, text=None, **sizes):
    torch.manual_seed(seed)
    config = SasrecConfig(
        **({"hidden": D, "layers": layers, "ffn": 24, "max_length": 12, "dropout": 0.0} | sizes)
    )
    model = SequenceEncoder(config, num_items=N, steps=steps, text=text).eval()
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
    table = (
        model.table.weight
        if model.text is None
        else torch.cat([model.item_vectors(), model.table.weight[N:]])
    )
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
            score = score.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
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


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_cached_steps_equal_recomputing_the_whole_sequence(layers):
    model = make(layers=layers)
    items, length = padded([10, 1, 4, 7], 10)
    states = cached(model, items, length, K)
    for row in range(len(items)):
        wanted = recompute(model, items[row, : length[row]], K)
        torch.testing.assert_close(states[row], wanted, atol=1e-5, rtol=0)


def test_all_prefixes_at_once_equal_each_prefix_alone():
    model = make()
    items, length = padded([8, 3, 1], 8)
    noise = torch.randn(K, 3, 8, D)
    clean, noisy = model.reason(items, noise=noise)
    assert noisy is not None
    for b in range(3):
        for t in range(length[b]):
            prefix = items[b, : t + 1]
            torch.testing.assert_close(clean[b, t], recompute(model, prefix, K), atol=1e-5, rtol=0)
            wanted = recompute(model, prefix, K, noise[:, b, t])
            torch.testing.assert_close(noisy[b, t], wanted[1:], atol=1e-5, rtol=0)


def test_noise_never_touches_items_nor_the_clean_branch():
    model = make()
    items, _ = padded([6, 6], 6)
    clean, none = model.reason(items)
    assert none is None
    loud, noisy = model.reason(items, noise=torch.full((K, 2, 6, D), 5.0).normal_())
    assert torch.equal(clean[:, :, 0], loud[:, :, 0])  # r_0 knows nothing of latent tokens
    torch.testing.assert_close(clean, loud, atol=1e-6, rtol=0)
    assert noisy is not None and (noisy - clean[:, :, 1:]).abs().max() > 0.1
    _, silent = model.reason(items, noise=torch.zeros(K, 2, 6, D))
    torch.testing.assert_close(silent, clean[:, :, 1:], atol=1e-6, rtol=0)


def test_fewer_steps_are_a_prefix_of_more():
    model = make()
    items, length = padded([9, 2, 5], 9)
    whole = cached(model, items, length, K)
    for k in range(K):
        assert torch.equal(cached(model, items, length, k), whole[:, : k + 1])


def test_no_steps_is_the_plain_backbone_bit_for_bit():
    model, plain = make(), make(steps=0)
    weights = {k: v for k, v in model.state_dict().items() if k != "step_position"}
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    items, length = padded([9, 2, 5], 9)
    assert torch.equal(cached(model, items, length, 0), cached(plain, items, length, 0))
    assert torch.equal(model.encode(items).states, plain.reason(items)[0][:, :, 0])


def test_padding_is_irrelevant():
    model = make()
    items, length = padded([6, 2, 4], 6)
    before, trunk = cached(model, items, length, K), model.reason(items)[0]
    other = items.clone()
    other[items == N] = 7  # any item in place of padding
    with torch.no_grad():
        model.table.weight[N] = 100.0
    assert torch.equal(cached(model, items, length, K), before)
    assert torch.equal(cached(model, other, length, K), before)
    real = torch.arange(6) < length[:, None]
    assert torch.equal(model.reason(items)[0][real], trunk[real])
    wide = torch.nn.functional.pad(items, (0, 5), value=N)
    torch.testing.assert_close(cached(model, wide, length, K), before, atol=1e-5, rtol=0)


def test_rows_do_not_depend_on_their_batch():
    model = make()
    items, length = padded([10, 1, 4, 7], 10)
    states = cached(model, items, length, K)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        cached(model, items[order], length[order], K), states[order], atol=1e-5, rtol=0
    )
    for row, n in enumerate(length.tolist()):
        alone = cached(model, items[row : row + 1, :n], length[row : row + 1], K)
        torch.testing.assert_close(alone[0], states[row], atol=1e-5, rtol=0)


def test_item_keys_and_values_never_depend_on_latent_tokens():
    model = make()
    items, length = padded([5, 3], 5)
    with torch.no_grad():
        thought = model.start(items, length)
        before = [(k.clone(), v.clone()) for k, v in thought.items]
        for _ in range(K):
            model.advance(thought)
    for (k, v), (k0, v0) in zip(thought.items, before, strict=True):
        assert torch.equal(k, k0) and torch.equal(v, v0)


def test_attention_weights_are_those_that_mix():
    model = make()
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


def test_gradient_matches_finite_differences():
    model = make(hidden=8, ffn=8, steps=2).double()
    items, _ = padded([4, 2], 4)
    weight = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    parameters = [
        model.step_position,
        model.blocks[0].project.weight,
        model.position.weight,
        model.norm.weight,
    ]

    def value(*_):
        return (model.reason(items)[0] * weight).sum()

    assert torch.autograd.gradcheck(value, parameters, atol=1e-6, fast_mode=True)


def test_gradient_of_a_step_position_stops_where_its_step_is_not_read():
    model = make()
    items, _ = padded([5, 5], 5)
    for k in range(K + 1):
        states = model.reason(items)[0]
        (grad,) = torch.autograd.grad(
            (states[:, :, k] * torch.randn(D)).sum(), model.step_position, allow_unused=True
        )
        reached = [] if grad is None else [bool(g.any()) for g in grad]
        assert reached == ([True] * k + [False] * (K - k) if k else [False] * K)


def test_steps_train_items_and_attention():
    model = make()
    items, _ = padded([5, 5], 5)
    shared = [model.table.weight, model.blocks[0].project.weight, model.blocks[1].project.weight]
    ways = torch.randn(D)
    without = torch.autograd.grad((model.reason(items, 0)[0][:, :, -1] @ ways).sum(), shared)
    through = torch.autograd.grad((model.reason(items)[0][:, :, -1] @ ways).sum(), shared)
    for a, b in zip(without, through, strict=True):
        assert b.any() and (a - b).abs().max() > 1e-2 * a.abs().max()


@pytest.mark.parametrize("steps", [0, K])
def test_every_parameter_gets_a_gradient(steps):
    model = make(steps=steps, text=torch.randn(N, 5)).train()
    items, _ = padded([5, 2], 5)
    read = model.reason(items)[0][items < N]  # (7, steps + 1, d)
    (read @ model.item_vectors().T).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert not model.table.weight.grad[N].any()  # padding is never learned


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


def test_one_item_and_a_full_window_and_what_is_refused():
    model = make()
    items, length = padded([12, 1], 12)
    assert cached(model, items, length, K).isfinite().all()
    with pytest.raises(ValueError, match="max_length=12"):
        model.encode(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="empty history"):
        model.start(items, torch.tensor([12, 0]))
    with pytest.raises(ValueError, match="4 latent steps"):
        model.start(items, length, K + 1)
    with torch.no_grad():
        done = model.start(items, length, K)
        done.step = K
        with pytest.raises(ValueError, match="trained for 3"):
            model.advance(done)


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"heads": 0}, {"layers": 0}, {"max_length": 0}])
def test_sizes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ConfigError):
        SequenceEncoder(SasrecConfig(**({"hidden": 16} | wrong)), num_items=N, steps=1)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("steps", [0, 2])
def test_flops_are_those_that_torch_counts(layers, steps):
    model, n = make(layers=layers, steps=2), 7
    items, length = padded([n], n)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        thought = model.start(items, length, steps)
        for _ in range(steps):
            model.advance(thought)
        thought.state @ model.item_vectors().T
    hidden_pairs = n * n - n * (n + 1) // 2  # a causal kernel need not visit them; torch's plain one does
    wanted = counter.get_total_flops() - (layers - 1) * hidden_pairs * 2 * D * 2
    assert float(model.flops(length, steps)[0]) == wanted


def test_half_precision_stays_finite():
    model = make()
    items, _ = padded([6, 1], 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, _ = model.reason(items)
    assert states.isfinite().all()
    torch.testing.assert_close(states.float(), model.reason(items)[0], atol=0.3, rtol=0)


def test_state_survives_a_round_trip():
    model, other = make(text=torch.randn(N, 5)), make(seed=5, text=torch.zeros(N, 5))
    other.load_state_dict(model.state_dict())
    items, length = padded([6, 2], 6)
    assert torch.equal(cached(model, items, length, K), cached(other, items, length, K))
