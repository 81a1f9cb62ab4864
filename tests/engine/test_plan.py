"""What a plan judges and what it is called by: depths, and what the hashes see."""

from __future__ import annotations

import dataclasses

import pytest

from reason import registry
from reason.engine.config import resolve
from reason.methods.base import DepthAxis


def axis(**keys):
    return DepthAxis(**{"unit": "particles", "least": 1, "default": 8, "zero": "one sample"} | keys)


@pytest.mark.parametrize(
    ("keys", "deepest", "depths"),
    [
        ({"least": 0}, 3, [0, 1, 2, 3]),
        ({}, 3, [1, 2, 3]),
        ({"curve": "powers"}, 8, [1, 2, 4, 8]),
        ({"curve": "powers"}, 12, [1, 2, 4, 8, 12]),
        ({"curve": "powers"}, 1, [1]),
        ({"curve": "powers", "least": 0}, 5, [0, 1, 2, 4, 5]),
        ({"curve": "powers", "least": 3}, 9, [3, 4, 8, 9]),
    ],
)
def test_the_axis_says_how_a_curve_is_laid_out(keys, deepest, depths):
    assert axis(**keys).depths(deepest) == depths


def plan(*words, **changes):
    found = resolve("latent", words, environ={})
    card = dataclasses.replace(found.card, **changes)
    return dataclasses.replace(found, card=card)


def test_a_run_without_a_curve_judges_its_depth_alone():
    powers = dataclasses.replace(registry.card("methods", "latent").depth, curve="powers")
    assert plan("depth=5", depth=powers).depths == [0, 1, 2, 4, 5]
    assert plan("depth=5", "eval.curve=false", depth=powers).depths == [5]


def test_an_unbound_depth_does_not_shape_the_model():
    unbound = dataclasses.replace(registry.card("methods", "latent").depth, bound=False)
    for words in (["train_depth=2"], ["depth=1", "train_depth=4"]):
        assert plan(*words, depth=unbound).hashes("d")[0] == plan("depth=2", depth=unbound).hashes("d")[0]
    assert plan("train_depth=4", "depth=2").hashes("d")[0] != plan("depth=2").hashes("d")[0]


def test_another_version_is_another_model_and_another_result():
    old, new = plan().hashes("d"), plan(version=99).hashes("d")
    assert old[0] != new[0] and old[1] != new[1]


def test_a_source_is_known_by_its_digest():
    mor = resolve("mor", ["backbone.source=smollm2-135m", "train_depth=2"], environ={})
    assert mor.sources == {"backbone.source": "smollm2-135m"}
    hashes = {mor.hashes("d", {"backbone.source": digest}) for digest in ("a", "b")}
    assert len(hashes) == 2
    elsewhere = resolve("mor", ["backbone.source=some/where", "train_depth=2"], environ={})
    assert elsewhere.hashes("d", {"backbone.source": "a"}) in hashes
