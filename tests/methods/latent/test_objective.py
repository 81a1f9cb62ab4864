"""The losses: over the trie against every prefix as a row of its own, and what the paper asks of each term."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from reason.backbones.config import SasrecConfig
from reason.backbones.encoder import SequenceEncoder
from reason.methods.base import Step
from reason.methods.latent.config import LatentConfig
from reason.methods.latent.method import Latent
from reason.methods.latent.objective import IGNORED, contrast, losses, read, temperatures, terms

N, D, K = 30, 16, 2


def make(steps=K, **sizes):
    torch.manual_seed(0)
    config = SasrecConfig(**({"hidden": D, "ffn": 24, "max_length": 8, "dropout": 0.0} | sizes))
    model = SequenceEncoder(config, num_items=N, steps=steps)
    with torch.no_grad():
        model.table.weight.mul_(5)
        model.position.weight.mul_(20)
        for block in model.blocks:
            block.project.weight.mul_(10)
        if steps:
            model.step_position.mul_(30)
    return model


def batch_of(lengths=(6, 4, 6, 1), users=(0, 1, 0, 2), width=6):
    torch.manual_seed(1)
    items = torch.randint(0, N, (len(lengths), width))
    targets = torch.randint(0, N, (len(lengths), width))
    pads = torch.arange(width) >= torch.tensor(lengths)[:, None]
    items[pads], targets[pads] = N, IGNORED
    return {"items": items, "targets": targets, "user": torch.tensor(users)}


# --- the reference: one row per prefix ----------------------------------------------------------------


def row_states(model, items, noise):
    """Clean states (K + 1, d) and noisy ones (K, d) of one prefix (n,); caches grow by concatenation."""

    def run(x, caches):
        grown = []
        for block, cache in zip(model.blocks, caches, strict=True):
            heads, width = block.heads, D // block.heads
            query, key, value = (
                p.view(len(x), heads, width).transpose(0, 1) for p in block.project(x).chunk(3, -1)
            )
            if cache is not None:
                key, value = torch.cat([cache[0], key], 1), torch.cat([cache[1], value], 1)
            score = query @ key.transpose(1, 2) / math.sqrt(width)
            future = torch.ones(len(x), key.shape[1]).triu(key.shape[1] - len(x) + 1).bool()
            mixed = score.masked_fill(future, -torch.inf).softmax(-1) @ value
            x = block.norm_attention(x + block.out(mixed.transpose(0, 1).reshape(len(x), D)))
            x = block.norm_feed(x + block.down(F.gelu(block.up(x))))
            grown.append((key, value))
        return x, grown

    x = model.norm(model.table(items) + model.position.weight[: len(items)])
    out, caches = run(x, [None] * len(model.blocks))
    clean, noisy, loud = [out[-1]], [], caches
    for k in range(model.steps):
        fed = clean[-1] + model.step_position[k]
        out, caches = run(model.norm(fed)[None], caches)
        other, loud = run(model.norm(fed + noise[k])[None], loud)
        clean.append(out[0])
        noisy.append(other[0])
    return torch.stack(clean), noisy


def reference(config, model, batch, noise):
    """The total loss (mean over prefixes), written from the formulas."""
    rows = []  # (user, place, target, clean, noisy)
    for b in range(len(batch["items"])):
        for t in range(batch["items"].shape[1]):
            if batch["targets"][b, t] != IGNORED:
                clean, noisy = row_states(model, batch["items"][b, : t + 1], noise[:, b, t])
                rows.append((int(batch["user"][b]), b, t, batch["targets"][b, t], clean, noisy))
    items, steps, total = model.table.weight[:N], model.steps, 0.0
    for user, _, t, target, clean, noisy in rows:
        z = clean @ items.T  # (K + 1, N)
        if config.loss == "erl":
            log_p = (z / config.tau).log_softmax(-1)
            pairs = [
                (log_p[j].exp() * (log_p[j] - log_p[i].detach())).sum().clamp(max=config.kl_bound)
                for i in range(steps + 1)
                for j in range(steps + 1)
                if i != j
            ]
            total = total + F.cross_entropy(z.mean(0) / config.tau, target)
            if pairs:
                total = total - config.kl_weight * sum(pairs) / len(pairs)
            continue
        total = total + F.cross_entropy(z[-1] / config.tau, target)
        if config.loss == "ce" or not steps:
            continue
        for k in range(steps):
            tau = config.tau * config.alpha ** (steps - k)
            total = total + config.step_weight * F.cross_entropy(z[k] / tau, target) / steps
            rivals = [clean[k + 1]]
            rivals += [other[4][k + 1] for other in rows if other[2] == t and other[0] != user]
            alike = (
                (lambda a, c: F.cosine_similarity(a, c, dim=0))
                if config.similarity == "cosine"
                else torch.dot
            )
            score = torch.stack([alike(noisy[k], r) for r in rivals]) / config.contrast_tau
            total = total + config.contrast_weight * -score.log_softmax(0)[0] / steps
    return total / len(rows)


CASES = {
    "base": (0, {}),
    "ce": (K, {"loss": "ce"}),
    "prl": (K, {"loss": "prl"}),
    "prl, dot": (
        K,
        {"loss": "prl", "similarity": "dot", "contrast_tau": 4.0, "alpha": 2.0, "step_weight": 0.3},
    ),
    "erl": (K, {"loss": "erl", "kl_weight": 0.3}),
    "erl at K=0": (0, {"loss": "erl"}),
}


@pytest.mark.parametrize("case", CASES)
def test_trie_training_equals_a_row_per_prefix(case):
    steps, keys = CASES[case]
    config, model, batch = LatentConfig(tau=0.5, **keys), make(steps), batch_of()
    noise = 0.3 * torch.randn(steps, *batch["items"].shape, D)
    contrasted = "contrast" in terms(config, steps)
    ours = sum(
        total / count for total, count in losses(config, model, batch, noise if contrasted else None).values()
    )
    grads = torch.autograd.grad(ours, list(model.parameters()))
    wanted = reference(config, model, batch, noise)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    for grad, expected in zip(grads, torch.autograd.grad(wanted, list(model.parameters())), strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)
    assert all(g.any() for g in grads)


def test_gradient_matches_finite_differences():
    model, batch = make(hidden=8, ffn=8).double(), batch_of((3, 2), (0, 1), 3)
    noise = 0.3 * torch.randn(K, 2, 3, 8, dtype=torch.float64)
    for config in (
        LatentConfig(loss="prl", tau=0.5),
        LatentConfig(loss="ce", tau=0.5, anytime=0.5, readout="mean"),
    ):

        def value(*_, config=config):
            return sum(s / c for s, c in losses(config, model, batch, noise, stop=1).values())

        inputs = [model.step_position, model.position.weight, model.blocks[1].out.weight, model.table.weight]
        assert torch.autograd.gradcheck(value, inputs, atol=1e-5, fast_mode=True)


# --- temperatures, readouts, terms ----------------------------------------------------------------------


def test_temperatures_anneal_towards_tau():
    tau = temperatures(LatentConfig(loss="prl", tau=0.07, alpha=5.0), 3)
    assert tau[-1] == 0.07 and len(tau) == 4
    assert [a / b for a, b in itertools.pairwise(tau)] == pytest.approx([5.0] * 3)
    assert temperatures(LatentConfig(loss="prl", alpha=1.0), 2) == [0.07] * 3
    assert temperatures(LatentConfig(loss="erl", alpha=5.0), 2) == [0.07] * 3


def test_readout_of_erl_is_the_mean_of_all_states():
    states = torch.randn(4, 3, D)
    assert torch.equal(read(LatentConfig(loss="prl"), states), states[:, 2])
    assert torch.allclose(read(LatentConfig(loss="erl"), states), states.sum(1) / 3, atol=1e-6)
    assert torch.equal(read(LatentConfig(loss="erl", readout="last"), states), states[:, 2])


def test_labels_go_with_their_samples():
    model, batch = make(), batch_of()
    config = LatentConfig(loss="prl", contrast_weight=0.0)
    before = losses(config, model, batch)["steps"][0]
    real = batch["targets"] != IGNORED
    batch["targets"][real] = batch["targets"][real].flip(0)
    assert abs(before - losses(config, model, batch)["steps"][0]) > 1e-3


def test_padding_inside_the_item_table_is_no_candidate():
    model, batch = make(0), batch_of()
    before = losses(LatentConfig(), model, batch)["rec"][0]
    with torch.no_grad():
        model.table.weight[N] = 100.0
    assert torch.equal(before, losses(LatentConfig(), model, batch)["rec"][0])


@pytest.mark.parametrize("steps", [0, K])
@pytest.mark.parametrize("loss", ["prl", "erl", "ce"])
@pytest.mark.parametrize("off", [False, True])
def test_counts_can_be_read_off_the_batch(steps, loss, off):
    latent = LatentConfig(loss=loss, anytime=0.0 if off else 0.5)
    if off:
        latent.contrast_weight = latent.step_weight = latent.kl_weight = 0.0

    class Run:
        pass

    run = Run()
    run.latent = latent
    method, model, batch = Latent(run), make(steps), batch_of()
    step = Step(0, 0, 0.0, torch.Generator().manual_seed(3))
    found = method.loss(model, batch, step)
    assert method.counts(model, batch, step) == {name: float(count) for name, (_, count) in found.items()}
    assert set(found) == set(terms(latent, steps))
    assert {count for _, count in found.values()} == {17}
    sum(total for total, _ in found.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_noise_and_stops_come_from_the_generator():
    class Run:
        latent = LatentConfig(loss="prl", anytime=0.5, noise=0.5)

    method, model, batch = Latent(Run()), make(), batch_of()

    def total(seed):
        found = method.loss(model, batch, Step(0, 0, 0.0, torch.Generator().manual_seed(seed)))
        return {name: value.item() for name, (value, _) in found.items()}

    first = total(3)
    torch.manual_seed(99)
    assert total(3) == first
    others = [total(seed) for seed in range(10, 20)]
    assert all(o["contrast"] != first["contrast"] and o["rec"] == first["rec"] for o in others)
    assert len({o["anytime"] for o in others}) == K + 1  # every number of steps is drawn


# --- the diversity of ERL -------------------------------------------------------------------------------


def test_diversity_is_bounded_and_rewards_states_that_differ():
    model, batch = make(), batch_of()
    mild = LatentConfig(loss="erl", kl_weight=1.0, kl_bound=2.0, tau=1.0)
    sharp = LatentConfig(loss="erl", kl_weight=1.0, kl_bound=2.0, tau=1e-3)  # far beyond where exp underflows
    near, far = losses(mild, model, batch)["diversity"], losses(sharp, model, batch)["diversity"]
    assert 0 > near[0] / near[1] > far[0] / far[1] >= -2.0 - 1e-5
    grads = torch.autograd.grad(far[0], list(model.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)


# --- the contrast of PRL --------------------------------------------------------------------------------


def stacks(B=4, T=3, seed=0):
    torch.manual_seed(seed)
    return (
        torch.randn(B, T, K, D),
        torch.randn(B, T, K, D),
        torch.arange(B),
        torch.ones(B, T, dtype=torch.bool),
    )


@pytest.mark.parametrize("cosine", [True, False])
def test_contrast_is_the_diagonal_of_a_softmax_over_the_gram_matrix(cosine):
    _, clean, user, real = stacks()
    value = contrast(clean, clean, user, real, tau=0.7, cosine=cosine)  # no noise: the anchor is its positive
    states = F.normalize(clean, dim=-1) if cosine else clean
    wanted = 0.0
    for t in range(3):
        for k in range(K):
            gram = states[:, t, k] @ states[:, t, k].T / 0.7
            wanted = wanted - gram.log_softmax(-1).diagonal().sum() / K
    torch.testing.assert_close(value, wanted)


def test_contrast_does_not_depend_on_the_order_of_histories():
    noisy, clean, user, real = stacks()
    real[1, 2] = False
    order = torch.tensor([2, 0, 3, 1])
    value = contrast(noisy, clean, user, real, tau=0.5, cosine=True)
    again = contrast(noisy[order], clean[order], user[order], real[order], tau=0.5, cosine=True)
    torch.testing.assert_close(value, again)


def test_contrast_without_rivals_is_exactly_zero():
    noisy, clean, user, real = stacks(B=1)
    assert contrast(noisy, clean, user, real, tau=0.1, cosine=True) == 0.0
    noisy, clean, user, real = stacks(B=3)
    assert contrast(noisy, clean, torch.zeros_like(user), real, tau=0.1, cosine=True) == 0.0  # one user only
    real[:] = torch.eye(3, dtype=torch.bool)  # no place that two histories reach
    assert contrast(noisy, clean, user, real, tau=0.1, cosine=True) == 0.0


def test_windows_of_one_user_are_no_rivals():
    noisy, clean, user, real = stacks()
    real[1:3] = False  # only rows 0 and 3 are left
    assert contrast(noisy, clean, user, real, tau=0.5, cosine=True) > 0.1
    user[3] = user[0]
    assert contrast(noisy, clean, user, real, tau=0.5, cosine=True) == 0.0


def test_noise_below_the_scale_of_states_is_survived_at_any_temperature():
    noisy, clean, user, real = stacks(B=8)
    clean = F.layer_norm(clean, (D,)).requires_grad_()  # norm sqrt(d), as the encoder's states
    for cosine in (True, False):
        value = contrast(clean + 0.01 * noisy, clean, user, real, tau=0.01, cosine=cosine)
        (grad,) = torch.autograd.grad(value, clean)
        assert 0 <= value < 1e4 and grad.isfinite().all()
