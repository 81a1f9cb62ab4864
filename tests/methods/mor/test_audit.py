"""The misrouting audit against sums by hand, and against a network run depth by depth."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from reason.methods.mor.audit import COLUMNS, audit, overall, sample_documents, shuffle_depths, sums
from reason.methods.mor.outcomes import routed_outcomes
from reason.methods.mor.token_selection import AboveThreshold, KnownDepths

_spec = importlib.util.spec_from_file_location("mor_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

CPU = torch.device("cpu")


def test_sums_by_hand():
    depth = np.array([[1, 2, 3, 2, 0]])
    nll = np.array([[2.0, 1.0, 1.0, 3.0, 0.0]])
    at_depth = np.array([[[2.0, 1.01, 4, 1, 0]], [[1.5, 1.0, 0.5, 3, 0]], [[1.0, 1.5, 1.0, 3.0, 0]]])
    shuffled, shuffled_nll = depth[:, [3, 2, 1, 0, 4]], nll + 1
    is_target = np.array([[True, True, True, True, False]])
    got = sums(depth, nll, at_depth, shuffled, shuffled_nll, is_target, np.zeros(1, int))
    got = {name: float(value[0]) for name, value in got.items()}
    assert got["audit_targets"] == 4 and got["audited"] == 1
    assert got["audit_cost"] == pytest.approx(1 - 0.5 + 0 + 0) and got["audit_regret"] == pytest.approx(1)
    assert got["audit_random_cost"] == pytest.approx(4.5) and got["audit_random_regret"] == pytest.approx(4.5)
    assert got["audit_under"] == 1  # only the first lost more than half a nat
    assert got["audit_over"] == 3  # 1.01 is close enough to 1; 0.5 is below 1; 1 is below 3
    assert got["audit_wasted"] == 0 + 0 + 1 + 1  # best depths 3, 2, 2, 1
    assert got["audit_rank"] == pytest.approx(spearmanr([1, 2, 3, 2], [3, 2, 2, 1]).statistic)
    ratios = overall(lambda name: got[name])
    assert ratios["audit regret"] == 0.25 and ratios["audit over-computed"] == 0.75 and ratios["audited"] == 1
    assert overall(lambda name: 0.0) == {}


def test_documents_are_summed_apart():
    rng = np.random.default_rng(0)
    depth, nll, at_depth = rng.integers(1, 4, (3, 6)), rng.random((3, 6)), rng.random((3, 3, 6))
    is_target, case = rng.random((3, 6)) < 0.8, np.array([0, 1, 1])
    both = sums(depth, nll, at_depth, depth, nll, is_target, case)
    for document in (0, 1):
        rows = case == document
        one = sums(
            depth[rows], nll[rows], at_depth[:, rows], depth[rows], nll[rows], is_target[rows], case[rows] * 0
        )
        assert {name: float(both[name][document]) for name in COLUMNS} == pytest.approx(
            {name: float(one[name][0]) for name in COLUMNS}
        )


@pytest.mark.parametrize("keys", [{}, {"routing": "token"}, {"kv": "sharing"}])
def test_an_audit_is_the_network_run_depth_by_depth(keys):
    model = small.network(**keys)
    tokens = torch.tensor([small.text(14, 1), small.text(14, 2)])
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    length = torch.tensor([14, 9])
    targets[1, 9:] = -100
    batch = {"tokens": tokens, "targets": targets, "length": length, "case": torch.tensor([0, 1])}
    kv_mode = model.config.kv_mode
    route = None if "routing" in keys else AboveThreshold([-0.3, 0.1])
    with torch.no_grad():
        routed = routed_outcomes(model, model(tokens, route, lengths=length, kv_mode=kv_mode), targets)
        at_depth = np.stack([
            routed_outcomes(model, model(tokens, KnownDepths(d), lengths=length, kv_mode=kv_mode), targets).nll for d in (1, 2, 3)
        ])  # fmt: skip
        got = audit(model, batch, routed, 3, size=1, device=CPU, seed=0)
    is_target = targets.numpy() >= 0
    want = sums(routed.depth, routed.nll, at_depth, routed.depth, routed.nll, is_target, np.arange(2))
    for name in COLUMNS:
        if "random" not in name:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert (got["audit_random_regret"] >= 0).all()


def test_full_depth_costs_nothing():
    model = small.network()
    tokens = torch.tensor([small.text(10)])
    targets = tokens.roll(-1, 1)
    batch = {"tokens": tokens, "targets": targets, "length": torch.tensor([10]), "case": torch.tensor([0])}
    with torch.no_grad():
        routed = routed_outcomes(model, model(tokens, KnownDepths(3)), targets)
    got = audit(model, batch, routed, 3, size=4, device=CPU, seed=0)
    assert got["audit_regret"][0] == pytest.approx(0, abs=1e-5) and got["audit_under"][0] == 0
    assert got["audit_rank"][0] == 0  # depths that do not vary follow nothing


def test_depths_are_dealt_out_within_documents():
    depth = np.array([[1, 2, 3, 0], [3, 3, 1, 2], [1, 1, 1, 0]])
    got = shuffle_depths(depth, np.array([0, 0, 1]), np.random.default_rng(0))
    assert ((got > 0) == (depth > 0)).all() and not (got == depth).all()
    assert sorted(got[:2].ravel()) == sorted(depth[:2].ravel()) and (got[2] == depth[2]).all()


def test_a_share_of_the_documents_is_sampled_at_least_one():
    chosen = np.arange(100, 140)
    assert len(sample_documents(chosen, 0.05, 0)) == 2 and len(sample_documents(chosen, 0.001, 0)) == 1
    assert len(sample_documents(chosen, 0, 0)) == 0 and (sample_documents(chosen, 1, 0) == chosen).all()
    assert (sample_documents(chosen, 0.2, 1) == sample_documents(chosen, 0.2, 1)).all()
