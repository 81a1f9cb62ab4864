"""What does not fit is refused in words before anything is loaded."""

from __future__ import annotations

import pytest

from reason.engine.config import resolve
from reason.errors import ConfigError
from reason.methods.mor.config import MorConfig


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"capacities": "1,0.5,0.6"}, "rises"),
        ({"capacities": "0.9,0.5"}, "every token takes the first"),
        ({"capacities": "1,zero"}, "not a list of numbers"),
        ({"capacities": "1,0"}, "lower train_depth"),
        ({"capacities": "0.3,0.5,1"}, "capacities=1,0.5,0.3"),
        ({"gate": "softmax"}, "one step at a time"),
        ({"elastic": 1.5}, "from 0 to 1"),
        ({"aux_weight": -1.0}, "below 0"),
        ({"explore": 1.0, "routing": "token"}, "none does"),
    ],
)
def test_refused(keys, said):
    with pytest.raises(ConfigError, match=said):
        MorConfig(**keys)


@pytest.mark.parametrize(
    "words, said",
    [
        ("mor.combine=replace mor.aux=none", "anything to learn from"),
        ("mor.combine=replace mor.aux=router", "anything to learn from"),
        ("mor.gate=none mor.aux_weight=0", "anything to learn from"),
        ("mor.gate=none mor.routing=token", "anything to learn from"),
        ("mor.combine=replace mor.routing=random mor.aux=none", "anything to learn from"),
        ("mor.shift=nan", "mor.shift=nan is not a number"),
        ("train_depth=0 mor.mean_depth=1.5", "none to spend"),
        ("mor.capacities=1", r"capacities=\[1,0.667,0.333\]"),
        ("train_depth=0 depth=3", "Use depth=1, or train with"),
        ("train.lr=inf", "train.lr=inf is not a number"),
        ("backbone.sharing=middle_sequence mor.routing=none", "no depth but the whole"),
        ("backbone.sharing=middle_sequence mor.routing=none eval.curve=false mor.kv=sharing", "no earlier keys"),
    ],
)  # fmt: skip
def test_refused_with_the_rest_of_a_run(words, said):
    with pytest.raises(ConfigError, match=said):
        resolve("mor", words.split(), environ={})


@pytest.mark.parametrize("words", [
    "mor.combine=replace", "mor.gate=none", "mor.routing=none mor.gate=none",
    "backbone.sharing=middle_sequence mor.routing=none eval.curve=false", "train_depth=0 backbone.sharing=middle_sequence",
])  # fmt: skip
def test_taken(words):
    flat = resolve("mor", words.split(), environ={}).flat
    assert all(str(flat[key]).lower() == value for key, value in (word.split("=") for word in words.split()))


def test_profile():
    assert MorConfig().shares(4) == [1, 0.75, 0.5, 0.25]
    assert MorConfig(capacities="1, 0.5").shares(2) == [1, 0.5]
    with pytest.raises(ConfigError, match="2 shares for 3 recursions"):
        MorConfig(capacities="1,0.5").shares(3)


def test_what_a_token_sees_when_judged():
    assert MorConfig(kv="hybrid").kv_mode == "hybrid"
    assert MorConfig(gap="share_first").kv_mode == "sharing" and MorConfig(gap="skip").kv_mode == "recursion"
