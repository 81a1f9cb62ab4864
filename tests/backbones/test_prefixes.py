"""A row for every prefix: the same states as over the trie, however the rows are cut and recomputed."""

import pytest
import torch

from reason.backbones import prefixes
from reason.backbones.bidirectional import Bert4Rec
from reason.backbones.config import Bert4recConfig, SasrecConfig
from reason.backbones.encoder import SequenceEncoder

N, D, K, T = 30, 16, 2, 9
LENGTHS = [9, 1, 6, 4]


def make(cls=SequenceEncoder, dropout=0.0):
    torch.manual_seed(0)
    config = (Bert4recConfig if cls is Bert4Rec else SasrecConfig)(
        hidden=D, ffn=24, max_length=T, dropout=dropout
    )
    model = cls(config, num_items=N, steps=K).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(15)
    return model


def batch():
    items = torch.randint(0, N, (len(LENGTHS), T), generator=torch.Generator().manual_seed(1))
    items[torch.arange(T) >= torch.tensor(LENGTHS)[:, None]] = N
    return items, torch.randn(K, len(LENGTHS), T, D, generator=torch.Generator().manual_seed(2)).double()


def cut(monkeypatch, groups=8, room=2**13, held=2**16):
    monkeypatch.setattr(prefixes, "GROUPS", groups)
    monkeypatch.setattr(prefixes, "ROOM", room)
    monkeypatch.setattr(prefixes, "HELD", held)


def run(way, model):
    """Clean and noisy states of the real places, and every gradient of a loss on them."""
    items, noise = batch()
    ways = torch.randn(D, generator=torch.Generator().manual_seed(3)).double()
    vectors = model.item_vectors()
    torch.manual_seed(4)
    clean, noisy = way(items, K, noise, vectors)
    real = items < N
    clean, noisy = clean[real], noisy[real]
    loss = (clean @ ways).square().sum() + (noisy @ ways).sin().sum() + (vectors @ ways).sum()
    return [clean, noisy, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("groups, room, held", [(8, 2**13, 2**16), (1, 7, 2**16), (3, 20, 40), (T, 1, 0)])
def test_rows_of_a_causal_encoder_equal_the_trie(monkeypatch, groups, room, held):
    cut(monkeypatch, groups, room, held)
    model = make()
    rows = run(lambda *given: prefixes.reason_by_prefix(model, *given), model)
    for ours, wanted in zip(rows, run(model.reason, model), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("room", [5, 30])
def test_recomputing_in_the_backward_pass_changes_nothing(monkeypatch, room):
    """Dropout included: what is computed twice draws the same random numbers."""
    model = make(Bert4Rec, dropout=0.4).train()
    cut(monkeypatch, groups=3, room=room, held=10**6)
    kept = run(model.reason, model)
    for held in (0, 20):
        cut(monkeypatch, groups=3, room=room, held=held)
        for ours, wanted in zip(run(model.reason, model), kept, strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-9, rtol=1e-9)


def test_what_waits_for_the_backward_pass_is_bounded(monkeypatch):
    model = make(Bert4Rec)

    def saved(copies):
        items, _ = batch()
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            states = model.reason(items.repeat(copies, 1))[0]
        states.sum().backward()
        return sum(sizes.values())

    cut(monkeypatch, room=64, held=10**6)
    least, most = saved(4), saved(32)
    cut(monkeypatch, room=64, held=sum(n * (n + 1) // 2 for n in LENGTHS) * 4)
    bounded = saved(32)
    assert most > 6 * least  # so that the bound is one
    assert bounded < 1.5 * least


def test_padded_places_are_zeros_and_padding_is_little(monkeypatch):
    model, widths = make(Bert4Rec), []
    last = model.encode_last
    monkeypatch.setattr(
        model, "encode_last", lambda rows, length, v: widths.append((rows, length)) or last(rows, length, v)
    )
    items, noise = batch()
    clean, noisy = model.reason(items, noise=noise)
    assert clean.shape == (4, T, K + 1, D) and noisy is not None and noisy.shape == (4, T, K, D)
    padding = items == N
    assert not clean[padding].any() and not noisy[padding].any()
    assert clean[~padding].any(-1).all() and noisy[~padding].any(-1).all()
    lengths = torch.cat([length for _, length in widths])
    assert sorted(lengths.tolist()) == sorted(t for n in LENGTHS for t in range(1, n + 1))  # each one once
    assert all(int(length.max() - length.min()) <= -(-T // prefixes.GROUPS) for _, length in widths)
    assert all(((rows == N).sum(1) == rows.shape[1] - length).all() for rows, length in widths)
