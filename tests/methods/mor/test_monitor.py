"""Health of routers: statistics against hand values and scikit-learn, limits that clean text keeps and faults do not."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from reason.methods.mor.monitor import (
    STATISTICS,
    RoutingSample,
    alerts,
    dead_positions,
    draw_windows,
    fit_reference,
    health,
    observe,
    statistic,
    transitions,
    variance_by_position,
)
from reason.methods.mor.token_selection import AboveThreshold
from reason.metrics.calibration import threshold_for_share

_spec = importlib.util.spec_from_file_location("mor_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

CPU = torch.device("cpu")


# --- statistics ---------------------------------------------------------------------------------------


def test_position_explains_what_it_decides_and_nothing_of_noise():
    rng = np.random.default_rng(0)
    assert variance_by_position(np.tile(rng.integers(1, 4, 50), (16, 1))) == pytest.approx(1)
    noise = [variance_by_position(rng.integers(1, 4, (16, 50))) for _ in range(200)]
    assert abs(np.mean(noise)) < 0.01 and np.quantile(noise, 0.99) < 0.15
    few = np.zeros((3, 4), int)
    few[:, 0] = [1, 2, 3]
    assert variance_by_position(few) == 0 and variance_by_position(np.full((4, 4), 2)) == 0


def test_dead_positions():
    depth = np.ones((10, 6), int)
    depth[3, :4] = 3
    depth[:, 5] = 0
    assert dead_positions(depth, 3) == pytest.approx(1 / 5) and math.isnan(dead_positions(depth[:4], 3))


def test_transitions_by_hand():
    got = transitions(np.array([[1, 2, 1, 1], [2, 2, 0, 0]]), 3)
    assert got[0].tolist() == [0.5, 0.5, 0] and got[1].tolist() == [0.5, 0.5, 0] and not got[2].any()


def test_health_by_hand():
    depth = np.array([[1, 1, 2, 2]], np.int8)
    logits = np.full((1, 2, 4), 3, np.float16)
    logits[0, 1] = [-1, 1, 1, 3]
    observed = RoutingSample(
        depth, logits, np.array([[True, False, False, False]]), np.zeros(1, int), top_k_depth=np.array([[1, 1, 1, 2]]),
        is_target=np.ones((1, 4), bool), nll=np.array([[1.0, 2, 3, 4]]), full_nll=np.array([[0.0, 3, 3, 4]]),
    )  # fmt: skip
    got = health(observed, [0.5, 0.5])
    assert got["mean depth"] == 1.5 and got["entropy of depths"] == pytest.approx(1) and got["imbalance"] == 0
    assert got["PSI"] == pytest.approx(0) and got["fallbacks"] == 0.25 and got["kept 2"] == 0.5
    assert got["agrees with top-k 2"] == 0.75 and got["AUROC 2"] == 1.0 and got["regret"] == 0.25
    assert got["logit RMS 1"] == 3 and got["logit RMS 2"] == pytest.approx(math.sqrt(3))
    assert got["mean logit 2"] == 1 and "dead positions" not in got  # one sequence says nothing of positions
    assert all(statistic(name).meaning for name in got)


def test_positions_are_dead_when_nobody_takes_the_deepest_step_any_more():
    depth = np.full((10, 6), 2, np.int8)
    observed = RoutingSample(
        depth, np.zeros((10, 3, 6), np.float16), np.zeros((10, 6), bool), np.zeros(10, int)
    )
    assert health(observed, [0.2, 0.5, 0.3])["dead positions"] == 1
    assert health(observed, [0.5, 0.5, 0.0])["dead positions"] == 0  # where depth is capped at 2


def test_no_limit_is_where_nothing_can_be():
    """Of few clean windows that differ a lot: what cannot be passed is no limit, rather than one that never alarms."""
    rng = np.random.default_rng(0)
    depth = rng.integers(1, 4, (6, 8)).astype(np.int8)
    depth[::2] = 1
    observed = RoutingSample(depth, rng.normal(size=(6, 3, 8)).astype(np.float16), depth > 9, np.arange(6))
    limits = fit_reference(observed)["limits"]
    assert {name: statistic(name).span(3) for name in limits}["mean depth"] == (1, 3)
    for name, (low, high) in limits.items():
        bottom, top = statistic(name).span(3)
        assert (low is None or low > bottom) and (high is None or high < top), name
    assert any(both == (None, None) for both in limits.values())


def test_windows_hold_documents_and_no_more_than_asked():
    case, length = np.array([0, 0, 1, 1, 2]), np.full(5, 10)
    rows = draw_windows(case, length, 25, np.random.default_rng(0))
    assert len(rows) == 3 and len(set(rows.tolist())) == 3
    assert len(draw_windows(case, length, 1000, np.random.default_rng(0))) == 5


# --- limits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched():
    """A tiny model whose thresholds keep 2/3 and 1/3, what it does with text, and a way to see it under a fault."""
    model = small.network(seed=3)
    rows = torch.tensor([small.text(24, 100 + i) for i in range(96)])
    windows = {
        "tokens": rows, "targets": rows.roll(-1, 1), "length": torch.full((96,), 24),
        "case": torch.arange(96),
    }  # fmt: skip
    thresholds: list[float] = []
    with torch.no_grad():
        for step in (1, 2):
            routing = model(rows, AboveThreshold([*thresholds, -1e30]), cap=step + 1).steps[step]
            thresholds.append(threshold_for_share(routing.logits.numpy(), (3 - step) / (4 - step)))

    def see(part=slice(None), thresholds=thresholds, route=AboveThreshold):
        some = {k: v[part] for k, v in windows.items()}
        return observe(model, some, lambda _: route(thresholds), 3, size=16, device=CPU)

    return model, thresholds, see, fit_reference(see(slice(0, 64)))


def alarms(observed, reference, draws=40):
    rng, length = np.random.default_rng(5), (observed.depth > 0).sum(1)
    rows = [draw_windows(observed.case, length, reference["tokens"], rng) for _ in range(draws)]
    return [alerts(health(observed.select(r), reference["shares"]), reference) for r in rows]


def test_a_reference_is_json_and_knows_every_statistic(watched):
    reference = watched[3]
    assert json.loads(json.dumps(reference))["tokens"] == reference["tokens"] == 64 * 24 // 2
    assert {name.rstrip("0123456789 ") for name in reference["limits"]} == set(STATISTICS)
    assert sum(reference["shares"]) == pytest.approx(1) and reference["drift"] > 0


def test_clean_text_seldom_alarms(watched):
    _, _, see, reference = watched
    rate = np.mean([bool(found) for found in alarms(see(slice(64, 96)), reference)])
    assert rate <= 0.05


class Stuck(AboveThreshold):
    def __call__(self, step, logits, candidates):
        return super().__call__(step, logits.fill_(50.0), candidates)


class ByPosition(AboveThreshold):
    """Scores of clean text, dealt out to positions."""

    def __call__(self, step, logits, candidates):
        if step:
            drawn = torch.randn(64, generator=torch.Generator().manual_seed(step)).sort().values
            drawn = drawn[torch.randperm(64, generator=torch.Generator().manual_seed(9))][:24]
            spread = (
                logits.std() * (drawn - drawn.quantile(step / 3)) / drawn.std() + self.thresholds[step - 1]
            )
            logits.copy_(spread[candidates.position])
        return super().__call__(step, logits, candidates)


@pytest.mark.parametrize(
    "fault", ["zeroed", "flipped", "raised", "lowered", "position", "stuck", "no number"]
)
def test_faults_are_found(watched, fault):
    model, thresholds, see, reference = watched
    part = slice(64, 96)
    change = {"zeroed": 0.0, "flipped": -1.0, "no number": torch.nan}.get(fault, 1.0)
    kept = [router.layers[0].weight.detach().clone() for router in model.by_step]
    with torch.no_grad():
        for router in model.by_step:
            router.layers[0].weight *= change
    try:
        moved = [b + {"raised": 3.0, "lowered": -3.0}.get(fault, 0.0) for b in thresholds]
        observed = see(part, moved, {"stuck": Stuck, "position": ByPosition}.get(fault, AboveThreshold))
    finally:
        with torch.no_grad():
            for router, weight in zip(model.by_step, kept, strict=True):
                router.layers[0].weight.copy_(weight)
    found = alarms(observed, reference)
    assert np.mean([bool(f) for f in found]) >= 0.9
    names = {alert.name for f in found for alert in f}
    telling = {
        "no number": "fallbacks",
        "position": "explained by position",
        "raised": "kept 2",
        "lowered": "kept 2",
    }
    assert telling.get(fault, "PSI") in names
    assert all(alert.sentence and "{" not in alert.sentence for f in found for alert in f)


def test_an_alert_says_which_side():
    reference = {"limits": {"kept 2": [0.5, 0.7], "AUROC 2": [0.8, None]}}
    more, fewer = (alerts({"kept 2": v, "AUROC 2": 0.9}, reference) for v in (0.8, 0.4))
    assert [a.name for a in more] == ["kept 2"] and more[0].limit == 0.7 and "more tokens" in more[0].sentence
    assert fewer[0].limit == 0.5 and "fewer tokens" in fewer[0].sentence
    assert not alerts({"kept 2": 0.6, "AUROC 2": 1.0, "unknown": 5.0}, reference)
