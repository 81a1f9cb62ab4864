"""Item vectors from texts: the whitening, the mixture of experts, and that input and scores share them."""

import pytest
import torch
import torch.nn.functional as F

from reason.backbones.adaptor import NOISE, TextTable, UniSRec, whiten
from reason.backbones.config import UnisrecConfig
from reason.errors import ConfigError

N, M, D = 50, 6, 16


def texts(count=N, width=M):
    """Unit vectors whose components differ in scale, as those of a PCA do."""
    torch.manual_seed(0)
    return F.normalize(torch.randn(count, width) * 0.5 ** torch.arange(width) + 0.1, dim=1)


def make(text=None, seed=1, **sizes):
    torch.manual_seed(seed)
    config = UnisrecConfig(
        **({"hidden": D, "ffn": 24, "max_length": 8, "dropout": 0.0, "experts": 4} | sizes)
    )
    model = UniSRec(config, num_items=N, steps=2, text=texts() if text is None else text).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


# --- whitening ----------------------------------------------------------------------------------------


def moments(x):
    x = x.double()
    return x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)


def test_whitened_texts_have_zero_mean_and_unit_covariance():
    mean, covariance = moments(whiten(texts()))
    torch.testing.assert_close(mean, torch.zeros(M).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(covariance, torch.eye(M).double(), atol=1e-5, rtol=0)


def test_whitening_keeps_what_the_covariance_tells_apart():
    """Distances after it are Mahalanobis distances before it, whatever axes are chosen."""
    text = texts()
    mean, covariance = moments(text)
    apart = text.double() - mean
    wanted = apart @ torch.linalg.inv(covariance) @ apart.T
    white = whiten(text).double()
    torch.testing.assert_close(white @ white.T, wanted, atol=1e-4, rtol=1e-4)


def test_components_that_do_not_vary_are_left_out():
    text = F.pad(texts() @ torch.randn(M, 8), (0, 2))  # ten columns, rank six
    white = whiten(text)
    _, covariance = moments(white)
    torch.testing.assert_close(covariance, torch.diag(torch.tensor([1.0] * 6 + [0] * 4)).double(), atol=1e-3, rtol=0)  # fmt: skip
    assert not white[:, 6:].any()
    few = whiten(texts(4))  # four items span three axes
    assert few[:, :3].any(0).all() and not few[:, 3:].any()


def test_items_without_text_count_as_average_and_leave_the_rest_alone():
    text = texts()
    text[[3, 17]] = 0.0
    white, known = whiten(text), text.any(1)
    assert not white[[3, 17]].any()
    assert torch.equal(white[known], whiten(text[known]))


def test_axes_point_the_same_way_everywhere():
    """An eigenvector is one up to its sign, and libraries differ in it."""
    text = texts()
    white = whiten(text)
    solved = torch.linalg.eigh

    def flipped(x):
        values, vectors = solved(x)
        return values, -vectors

    torch.linalg.eigh = flipped
    try:
        torch.testing.assert_close(whiten(text), white)
    finally:
        torch.linalg.eigh = solved


@pytest.mark.parametrize("text", [torch.zeros(N, M), torch.ones(N, M) / M**0.5, F.pad(torch.ones(1, M), (0, 0, 0, 9))])  # fmt: skip
def test_texts_that_tell_nothing_apart_are_refused(text):
    with pytest.raises(ConfigError, match="do not tell them apart"):
        whiten(text)


# --- the mixture of experts ---------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [False, True])
def test_vectors_are_mixtures_of_shifted_projections(ids):
    table = make(ids=ids).table
    assert isinstance(table, TextTable) and (table.ids is not None) == ids
    with torch.no_grad():
        vectors = table()
        for item in range(0, N, 7):
            x = table.text[item]
            share = (table.gate.weight @ x).softmax(0)
            wanted = sum(share[e] * ((x - table.shift[e]) @ table.weight[e]) for e in range(4))
            wanted = wanted + table.ids.weight[item] if ids else wanted
            wanted = wanted / wanted.norm() / D**0.5
            torch.testing.assert_close(vectors[item], wanted, atol=1e-5, rtol=1e-5)


def test_scores_are_cosines_while_the_last_layer_norm_is_as_it_began():
    model = make()
    items = torch.randint(0, N, (3, 7))
    with torch.no_grad():
        states, vectors = model.reason(items)[0], model.item_vectors()
        cosine = F.cosine_similarity(states[..., None, :], vectors, dim=-1)  # (B, T, K + 1, N)
        torch.testing.assert_close(states @ vectors.T, cosine, atol=1e-4, rtol=0)


def test_an_item_without_text_can_be_learned():
    text = texts()
    text[3] = 0.0
    torch.manual_seed(1)
    model = UniSRec(UnisrecConfig(hidden=D, ffn=24), num_items=N, steps=0, text=text).eval()
    vectors = model.item_vectors()
    assert not vectors[3].any()  # at first nothing is known of it
    (gradient,) = torch.autograd.grad(vectors[3].sum(), model.table.shift)
    assert gradient.any() and gradient.abs().max() < 100
    with torch.no_grad():
        model.table.shift.sub_(gradient)
    assert model.item_vectors()[3].norm().item() == pytest.approx(D**-0.5, rel=0.01)


def test_gates_sum_to_one_and_are_noisy_in_training_only():
    table = make().table
    with torch.no_grad():
        still = table.gates()
        assert torch.equal(still, table.gates()) and torch.equal(table(), table())
        table.train()
        torch.manual_seed(5)
        first, second = table.gates(), table.gates()
        torch.manual_seed(5)
        assert torch.equal(table.gates(), first)  # randomness is torch's own
    assert not torch.equal(first, second) and not torch.equal(first, still)
    for gates in (still, first, second):
        assert gates.shape == (N, 4) and (gates > 0).all()
        torch.testing.assert_close(gates.sum(1), torch.ones(N))


def test_noise_has_the_learned_spread():
    table = make().table.train()
    with torch.no_grad():
        score = table.gate(table.text)
        deviation = F.softplus(table.spread(table.text)) + NOISE  # (N, E)
        torch.manual_seed(6)
        logs = torch.stack([table.gates().log() for _ in range(4000)])
    gap = logs[..., 0] - logs[..., 1]  # the softmax's own normaliser falls out
    torch.testing.assert_close(gap.mean(0), score[:, 0] - score[:, 1], atol=0.2, rtol=0)
    wanted = (deviation[:, 0] ** 2 + deviation[:, 1] ** 2).sqrt()
    torch.testing.assert_close(gap.std(0), wanted, atol=0, rtol=0.08)


def test_the_text_of_an_item_moves_its_input_and_its_score():
    model = make()
    items = torch.tensor([[3, 9, 4], [9, 4, 1]])
    with torch.no_grad():
        before, states = model.item_vectors(), model.reason(items)[0]
        model.table.text[3] += 1.0
        after, moved = model.item_vectors(), model.reason(items)[0]
    changed = (before != after).any(1)
    assert changed[3] and changed.sum() == 1
    assert not torch.equal(states[0], moved[0]) and torch.equal(states[1], moved[1])


def test_a_loss_that_passes_its_vectors_on_draws_the_noise_once():
    model = make().train()
    items = torch.tensor([[3, 9, 4]])
    with torch.no_grad():
        vectors = model.item_vectors()
        given = model.reason(items, vectors=vectors)[0]
        assert torch.equal(given, model.reason(items, vectors=vectors)[0])
        assert not torch.equal(given, model.reason(items)[0])  # another draw


def test_one_expert_is_refused():
    with pytest.raises(ConfigError, match="at least 2"):
        UnisrecConfig(experts=1)


def test_only_texts_are_stored_and_learned_unless_ids_are_asked_for():
    without, with_ids = (dict(make(ids=ids).table.named_parameters()) for ids in (False, True))
    assert set(with_ids) - set(without) == {"ids.weight"}
    assert sum(p.numel() for p in without.values()) == 2 * 4 * M + 4 * M + 4 * M * D
