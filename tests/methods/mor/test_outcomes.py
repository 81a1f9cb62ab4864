"""Judging: losses of tokens, thresholds that keep the share they were fitted to, profiles, costs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from reason.methods.mor.audit import COLUMNS
from reason.methods.mor.calibrate import capacities_with_mean
from reason.methods.mor.flops import DecoderFlops
from reason.methods.mor.method import _overall
from reason.methods.mor.outcomes import RoutedOutcomes, forward_flops, routed_outcomes
from reason.methods.mor.router import above_threshold
from reason.methods.mor.token_selection import (
    AboveThreshold,
    KnownDepths,
    TopK,
    evaluation_route,
    random_depths,
)
from reason.metrics.calibration import threshold_for_share

_spec = importlib.util.spec_from_file_location("mor_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)


def text(rows, length, seed=1):
    return torch.tensor([small.text(length, seed + i) for i in range(rows)])


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40, unique=True), st.floats(0, 1))
def test_a_threshold_keeps_its_share(scores, share):
    kept = above_threshold(
        torch.tensor(scores, dtype=torch.float32), threshold_for_share(np.array(scores), share)
    ).sum()
    assert kept == round(share * len(scores))


def test_all_are_kept_of_any_text_where_all_are_to_be():
    assert above_threshold(torch.tensor([-100.0]), threshold_for_share(np.array([0.5, 0.7]), 1.0)).all()


def test_weights_are_compared_at_the_same_depth_before_thresholds_are_fitted():
    model, tokens = small.network(), text(3, 30)
    route = evaluation_route(model.config, model.recursions, tokens, None, seed=0)
    assert isinstance(route, TopK) and route.capacities == model.config.shares(model.recursions)
    assert isinstance(
        evaluation_route(model.config, model.recursions, tokens, [0.0, 0.0], seed=0), AboveThreshold
    )


@torch.no_grad()
def test_thresholds_spend_what_they_should_on_what_they_were_fitted_to():
    model, tokens, shares, thresholds = small.network(), text(40, 30), [1, 0.7, 0.25], []
    for step in (1, 2):
        routing = model(tokens, AboveThreshold([*thresholds, -1e30]), cap=step + 1).steps[step]
        thresholds.append(threshold_for_share(routing.logits.numpy(), shares[step] / shares[step - 1]))
    depth = model(tokens, AboveThreshold(thresholds)).depth
    for step, share in enumerate(shares):
        assert (depth > step).float().mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("mean", [1, 1.2, 2, 2.7, 3])
def test_a_profile_has_its_mean_and_never_rises(mean):
    got = capacities_with_mean(mean, [1, 2 / 3, 1 / 3])
    assert sum(got) == pytest.approx(mean, abs=1e-4) and got == sorted(got, reverse=True) and got[0] == 1
    if mean == 2:
        assert got == pytest.approx([1, 2 / 3, 1 / 3], abs=1e-4)
    for flat, mean in (([1, 1, 1], 2), ([1, 1, 1], 1.5), ([1, 1], 1.25), ([1, 1, 0.5], 1.5)):
        assert sum(capacities_with_mean(mean, flat)) == pytest.approx(mean, abs=1e-4)
    with pytest.raises(ValueError, match="is not possible"):
        capacities_with_mean(3.5, [1, 0.5, 0.2])


def test_dice_are_random_and_the_same_each_time():
    tokens = torch.randint(50, (40, 100), generator=torch.Generator().manual_seed(0))
    depth = random_depths(tokens, [1, 0.5, 0.25], 3)
    assert torch.equal(depth, random_depths(tokens, [1, 0.5, 0.25], 3))
    assert not torch.equal(depth, random_depths(tokens, [1, 0.5, 0.25], 4))
    share = [(depth > r).double().mean().item() for r in range(3)]
    assert share == pytest.approx([1, 0.5, 0.25], abs=0.03)
    changed = tokens.clone()
    changed[:, 60:] = 7  # causal
    assert torch.equal(
        random_depths(changed, [1, 0.5, 0.25], 3).view(40, 100)[:, :60], depth.view(40, 100)[:, :60]
    )


def test_tell_is_cross_entropy_token_by_token():
    model = small.network()
    tokens = text(3, 8)
    targets = text(3, 8, seed=9)
    targets[1, 5:] = -100
    routed = model(tokens, KnownDepths(2))
    outcomes = routed_outcomes(model, routed, targets)
    logits = model.decoder.logits(model.read(routed.states))
    want = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    np.testing.assert_allclose(outcomes.nll, want.detach().numpy(), rtol=1e-5, atol=1e-5)
    assert (outcomes.correct == ((logits.argmax(-1) == targets) & (targets >= 0)).numpy()).all()
    both = RoutedOutcomes.concatenate([outcomes, outcomes])
    assert both.nll.shape == (6, 8) and (both.depth[:3] == outcomes.depth).all()


def test_cost_counts_what_was_taken():
    model = small.network()
    shape = DecoderFlops(16, 4, 2, 4, 24, 23, 2, 2)
    tokens = text(2, 9)
    routes = (KnownDepths(1), KnownDepths(3), AboveThreshold([0.0, 0.0]))
    shallow, deep, some = (
        forward_flops(model, shape, model(tokens, route).depth.numpy()) for route in routes
    )
    assert shallow < some < deep


def test_how_surely_depth_tells_hard_from_easy():
    from sklearn.metrics import roc_auc_score

    easy, hard = np.array([[5, 2, 1], [3, 0, 2]]), np.array([[1, 2, 4], [0, 3, 1]])
    columns = {f"easy_at_{r + 1}": easy[:, r] for r in range(3)} | {
        f"hard_at_{r + 1}": hard[:, r] for r in range(3)
    }
    more = {name: np.ones(2) for name in ("fallbacks", "tokens", *COLUMNS)}
    depth = [r for both in (easy, hard) for r in range(3) for _ in range(both.sum(0)[r])]
    label = [0] * easy.sum() + [1] * hard.sum()
    outcomes = _overall(pa.table(columns | more))["auroc of depth"]
    assert outcomes == pytest.approx(roc_auc_score(label, depth))
