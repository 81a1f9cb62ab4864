"""What is trained: every term against its formula, and gradients where they belong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reason.backbones.config import RecursiveConfig
from reason.backbones.decoder import RecursiveDecoder
from reason.methods.base import Step
from reason.methods.mor import objective
from reason.methods.mor.config import MorConfig
from reason.methods.mor.network import MixtureOfRecursions, RoutedOutput
from reason.methods.mor.token_selection import TopK

VOCAB = 19


def network(**keys):
    torch.manual_seed(0)
    config = RecursiveConfig(hidden=16, heads=4, kv_heads=2, ffn=24, layers=5, init_std=0.3)
    decoder = RecursiveDecoder(config, shape=config.shape(VOCAB), recursions=3)
    return MixtureOfRecursions(decoder, MorConfig(**keys), 0.5)


def batch(rows=3, length=9):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (rows, length), generator=generator)
    targets = torch.randint(VOCAB, (rows, length), generator=generator)
    targets[0, :4] = -100
    return {"tokens": tokens, "targets": targets, "length": torch.full((rows,), length)}


def step(at=0, seed=3):
    return Step(0, at, 0.0, torch.Generator().manual_seed(seed))


def test_text_is_cross_entropy_over_the_targets():
    model, data = network(), batch()
    total, count = objective.losses(model.config, model, data, step())["text"]
    routed = model(data["tokens"], TopK([1, 2 / 3, 1 / 3]))
    logits = model.decoder.logits(model.read(routed.states))
    want = F.cross_entropy(logits.flatten(0, 1), data["targets"].flatten(), reduction="sum")
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-5)
    assert count == 3 * 9 - 4


def test_routers_learn_to_foresee_top_k():
    model, data = network(aux_weight=0.5, z_weight=0.1), batch()
    found = objective.losses(model.config, model, data, step())
    routed = model(data["tokens"], TopK([1, 2 / 3, 1 / 3]))
    assert [found[f"foresee {r}"][1] for r in (1, 2, 3)] == [
        27,
        27,
        18,
    ]  # candidates: those of the step before
    for r, routing in enumerate(routed.steps, 1):
        after = (routed.depth.flatten()[routing.candidates.index] >= r).float()
        want = F.binary_cross_entropy_with_logits(routing.logits, after, reduction="sum")
        torch.testing.assert_close(found[f"foresee {r}"][0], 0.5 * want)
        torch.testing.assert_close(found[f"z {r}"][0], 0.1 * (routing.logits**2).sum())


def test_a_router_hears_from_the_text_through_its_gate_and_from_foreseeing():
    model, data = network(), batch()
    found = objective.losses(model.config, model, data, step())
    weights = [r.layers[0].weight for r in model.by_step]
    for name in ("text", "foresee 2"):
        grads = torch.autograd.grad(found[name][0], weights, retain_graph=True, allow_unused=True)
        assert grads[1] is not None and grads[1].abs().sum() > 0


def test_a_router_apart_leaves_the_trunk_alone():
    model, data = network(aux="router"), batch()
    found = objective.losses(model.config, model, data, step())
    trunk = list(model.decoder.parameters()) + list(model.by_step.parameters())
    grads = torch.autograd.grad(
        found["foresee 2"][0], [*trunk, *model.foreseers[1].parameters()], allow_unused=True
    )
    assert all(g is None for g in grads[:-1]) and grads[-1].abs().sum() > 0


def test_balance_of_token_choice():
    model, data = network(routing="token", balance_weight=0.2), batch()
    total, count = objective.losses(model.config, model, data, step())["balance"]
    routed = model(data["tokens"])
    scores = routed.entry.softmax(-1)
    share = torch.bincount(routed.depth.flatten() - 1, minlength=3) / 27
    torch.testing.assert_close(total / count, 0.2 * 3 * (share * scores.mean(0)).sum())
    depth = torch.arange(27).view(3, 9) % 3 + 1  # even loads: the mean of the summed scores, 1 for softmax
    even = RoutedOutput(routed.states, depth, routed.entry)
    total, count = objective.router_losses(model.config, model, even)["balance"]
    assert float((total / count).detach()) == pytest.approx(0.2)


def test_loads_are_noted_for_the_selection_bias_and_it_never_reaches_a_gate():
    model, data = network(routing="token", balance="bias"), batch()
    found = objective.losses(model.config, model, data, step())
    assert "balance" not in found
    load = model.take_load()
    assert load.sum() == 27 and not model.take_load().any()
    before = model(data["tokens"])
    model.bias.fill_(7.0)  # the same for all depths: choices stay, and so must weights
    after = model(data["tokens"])
    assert torch.equal(before.depth, after.depth) and torch.equal(before.states, after.states)


def test_capacities_while_training():
    config = MorConfig(capacity_warmup=80)
    assert objective.training_route(config, 3, step(0)).capacities == pytest.approx([1, 1, 1])
    assert objective.training_route(config, 3, step(80)).capacities == pytest.approx([1, 2 / 3, 1 / 3])
    observed = {tuple(objective.training_route(config, 3, step(at)).capacities) for at in range(100)}
    assert len(observed) == objective.WARMUP_STAGES + 1  # few shapes for a compiler
    free = MorConfig(elastic=1.0)
    for seed in range(20):
        drawn = objective.training_route(free, 3, step(seed=seed)).capacities
        assert drawn[0] == 1 and drawn == sorted(drawn, reverse=True) and drawn[-1] >= 0.1
    assert objective.training_route(MorConfig(routing="token"), 3, step()) is None


def test_exploring_chooses_others_now_and_then_until_it_ends():
    plain, data = network(), batch()
    curious = network(explore=1.0)
    curious.load_state_dict(plain.state_dict())

    def chosen(model, seed, progress):
        now = Step(epoch=0, step=3, progress=progress, generator=step(seed=seed).generator)
        return model(data["tokens"], objective.training_route(model.config, 3, now)).depth

    usual = chosen(plain, 0, 0.0)
    early = [chosen(curious, seed, 0.0) for seed in (1, 2, 1)]
    assert all((d >= 2).sum(1).tolist() == [6, 6, 6] for d in early), "as many as ever"
    assert torch.equal(early[0], early[2])
    assert not torch.equal(early[0], early[1]) and not torch.equal(early[0], usual)
    assert torch.equal(chosen(curious, 1, objective.NOISE_UNTIL), usual)


def test_random_routing_keeps_the_same_numbers_and_other_tokens():
    model, data = network(routing="random"), batch()
    routed = [
        model(data["tokens"], objective.training_route(model.config, 3, step(seed=s))) for s in (1, 2, 1)
    ]
    assert all((r.depth >= 2).sum(1).tolist() == [6, 6, 6] for r in routed)
    assert torch.equal(routed[0].depth, routed[2].depth) and not torch.equal(routed[0].depth, routed[1].depth)


def test_a_loss_after_a_random_recursion():
    model, data = network(exit_weight=0.5), batch()
    found = objective.losses(model.config, model, data, step())
    routed = model(data["tokens"], TopK([1, 2 / 3, 1 / 3]), exits=True)
    per_sequence = [
        0.5 * objective.next_tokens(model, model.read(e).flatten(0, 1), data["targets"])[0]
        for e in routed.exits
    ]
    assert any(torch.allclose(found["exit"][0], e, rtol=1e-5) for e in per_sequence)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {"exit_weight": 0.3, "z_weight": 0.1}, {"aux": "router", "capacity_warmup": 10}, {"elastic": 1.0},
        {"aux": "none", "capacities": "1,0.5,0.05"}, {"routing": "random", "z_weight": 0.1}, {"explore": 1.0},
        {"routing": "token", "z_weight": 0.1}, {"routing": "token", "balance": "bias"}, {"routing": "none"},
    ],
    ids=str,
)  # fmt: skip
def test_counts_are_those_of_the_losses_without_their_cost(keys, ragged):
    model, data = network(**keys), batch()
    if ragged:
        data["length"] = torch.tensor([9, 1, 4])
        data["targets"][1, 1:] = data["targets"][2, 4:] = -100
    for seed in range(4):
        want = {
            n: float(c) for n, (_, c) in objective.losses(model.config, model, data, step(3, seed)).items()
        }
        assert objective.counts(model.config, model, data, step(3, seed)) == want
