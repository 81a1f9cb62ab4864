"""Calibration of rewards: known answers are recovered, and what cannot be fitted is left as it is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit, logit

from reason.datasets.problems import Problem
from reason.errors import ConfigError
from reason.methods.particle.calibrate import (
    FINISHED,
    Calibrated,
    Calibration,
    fit,
    quality,
    quality_by_depth,
)
from reason.methods.particle.driver import Prefix
from reason.methods.particle.lineage import Node
from reason.methods.particle.noise import Channel, Noise
from reason.methods.particle.rewards import seen
from reason.methods.particle.rollouts import Rollouts

PROBLEM = Problem("p", "a question", "1")


def rollouts(reward, label, step=None, problems: int = 100) -> Rollouts:
    n = len(label)
    return Rollouts(
        torch.zeros(n, 1), np.asarray(label, float), np.ones(n, int) if step is None else np.asarray(step),
        np.arange(n) % problems, np.zeros(n, bool), np.asarray(reward, float), np.zeros((n, 0)),
        tuple(f"f{i}" for i in range(problems)),
    )  # fmt: skip


def through(noise: Noise, depths=(1,), n: int = 6000) -> Rollouts:
    """Prefixes, half of them right, judged through a noisy channel."""
    prefixes, right = [], []
    for i in range(n):
        node = Node(None)
        for t in range(depths[i % len(depths)]):
            node = Node(node, [i, t], "")
        prefixes.append(Prefix(PROBLEM, node, None))  # type: ignore[arg-type]
        right.append(i // len(depths) % 2 == 0)
    z = Channel(noise)(prefixes, np.array(right))
    return rollouts(expit(z), right, [p.node.step for p in prefixes])


@pytest.mark.parametrize(("sigma", "a"), [(1.0, 1.0), (4.0, 1.75), (2.0, 3.0)])
@pytest.mark.parametrize("kind", ["temperature", "platt"])
def test_the_temperature_of_gaussian_noise_is_recovered(kind, sigma, a):
    """Of log-odds +-a with noise of standard deviation sigma it is sigma^2 / (2 a)."""
    found = fit(kind, through(Noise(sigma=sigma, margin=a, margin_last=a)))
    (curve,) = found.curves
    temperature = curve["temperature"] if kind == "temperature" else 1 / curve["slope"]
    assert temperature == pytest.approx(sigma**2 / (2 * a), rel=0.12)
    if temperature > 1.5:  # it was too sure
        assert found.after["nll"] < found.before["nll"] - 0.05
        assert found.after["ece"] < 0.03 < found.before["ece"]


def test_every_depth_has_its_own():
    noise = Noise(sigma=2.0, margin=0.5, margin_last=2.0, margin_steps=4)  # a = .5, 1, 1.5, 2
    found = fit("temperature", through(noise, (1, 2, 3, 4), 16_000), least=1000)
    assert found.first == (1, 2, 3, 4)
    got = [curve["temperature"] for curve in found.curves]
    np.testing.assert_allclose(got, [4 / (2 * a) for a in (0.5, 1, 1.5, 2)], rtol=0.15)
    reward = np.full(6, 0.9)
    np.testing.assert_allclose(
        found(reward, np.array([1, 2, 3, 4, 5, 40])), expit(logit(0.9) / np.array([*got, got[-1], got[-1]]))
    )


def test_depths_with_few_prefixes_share_a_curve():
    step = np.repeat([1, 2, 3, 4, 5, 9], [100, 30, 100, 300, 10, 5])
    label = np.arange(len(step)) % 2
    assert fit("temperature", rollouts(np.full(len(step), 0.6), label, step), least=200).first == (1, 4)
    one_sided = np.where(step == 4, 1, label)  # depth 4 alone would have one outcome
    assert fit("temperature", rollouts(np.full(len(step), 0.6), one_sided, step), least=200).first == (1,)


def test_an_offset_and_a_curve_are_found():
    u = np.random.default_rng(0)
    truth = u.uniform(-3, 3, 20_000)
    label = u.random(20_000) < expit(truth)
    found = fit("platt", rollouts(expit((truth - 1) / 0.5), label))  # too sure by 2, and shifted
    assert found.curves[0] == pytest.approx({"slope": 0.5, "offset": 1.0}, abs=0.06)
    curved = fit("isotonic", rollouts(expit(truth) ** 3, label))
    at = np.array([0.01, 0.2, 0.5, 0.9])
    np.testing.assert_allclose(curved(at, np.ones(4, int)), np.cbrt(at), atol=0.06)
    assert curved.after["ece"] < 0.02
    assert curved(np.zeros(1), np.ones(1, int))[0] > 0 and curved(np.ones(1), np.ones(1, int))[0] < 1


def test_a_reward_that_says_the_contrary_is_left_no_say():
    u = np.random.default_rng(0)
    truth = u.uniform(-3, 3, 4000)
    found = fit("platt", rollouts(expit(-truth), u.random(4000) < expit(truth)))
    assert found.curves[0]["slope"] == 0.0 and abs(found.curves[0]["offset"]) < 0.2


def test_outcomes_that_are_all_alike_teach_nothing():
    found = fit("isotonic", rollouts([0.2, 0.9, 0.4], [0, 0, 0]))
    assert "all 3 prefixes" in found.notes[0]
    assert found(np.array([0.3]), np.array([2])).tolist() == [0.3]


def test_what_is_no_calibration_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'platt'"):
        fit("plat", rollouts([0.5], [1]))
    with pytest.raises(ValueError, match="right or wrong"):
        fit("platt", rollouts([0.5], [0.5]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        fit("platt", rollouts([np.nan], [1]))


@pytest.mark.parametrize("kind", ["temperature", "platt", "isotonic"])
def test_a_calibration_survives_json_and_wraps_a_reward(kind):
    found = fit(kind, through(Noise(sigma=2.0), (1, 2), 2000), least=100)
    again = Calibration.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again == found
    prefixes = [Prefix(PROBLEM, Node(Node(None), [1], ""), None)] * 2  # type: ignore[arg-type]
    plain = Calibrated(lambda p: np.array([0.8, 0.3]), again)
    np.testing.assert_allclose(plain(prefixes), found(np.array([0.8, 0.3]), np.array([1, 1])))
    said = np.array([[0.8, 0.7, 0.9], [0.3, 0.1, 0.2]])
    several = Calibrated(lambda p: said, again)(prefixes)
    np.testing.assert_allclose(several[:, 0], plain(prefixes))
    assert (several[:, 1:] == said[:, 1:]).all()
    assert seen(Calibrated(lambda p: said, again)) == {f"f{i}" for i in range(100)}


def test_quality_by_hand():
    got = quality(np.array([0.8, 0.4]), np.array([1.0, 0.0]))
    assert got["nll"] == pytest.approx(-(np.log(0.8) + np.log(0.6)) / 2)
    assert got["ece"] == pytest.approx(0.3) and got["auroc"] == 1.0
    assert "auroc" not in quality(np.array([0.8]), np.array([1.0]))
    depths = quality_by_depth(rollouts([0.8, 0.4, 0.9], [1, 0, 1], [1, 1, 3]))
    assert list(depths) == [1, 3] and depths[1] == got


def test_finished_solutions_have_a_curve_of_their_own():
    rng = np.random.default_rng(0)
    label = np.arange(4000) % 2
    finished = np.arange(4000) % 4 < 2
    z = np.where(label, 2.0, -2.0) + np.where(finished, 0.5, 4.0) * rng.standard_normal(4000)
    found = fit("platt", replace(rollouts(expit(z), label), finished=finished))
    assert found.first == (1, FINISHED)
    early, late = (curve["slope"] for curve in found.curves)
    offsets = [curve["offset"] for curve in found.curves]
    assert early == pytest.approx(2 * 2 / 16, rel=0.2) and late > 3
    both = found(np.array([0.9, 0.9]), np.array([7, 7]), np.array([False, True]))
    np.testing.assert_allclose(both, expit(logit(0.9) * np.array([early, late]) + offsets))
