"""What does not fit is refused in words before anything is loaded."""

from __future__ import annotations

import pytest

from reason.errors import ConfigError
from reason.methods.mor.config import MorConfig


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"capacities": "1,0.5,0.6"}, "rises"),
        ({"capacities": "0.9,0.5"}, "every token takes the first"),
        ({"capacities": "1,zero"}, "no list of numbers"),
        ({"capacities": "1,0"}, "above 0"),
        ({"combine": "replace", "aux": "none"}, "anything to learn from"),
        ({"gate": "softmax"}, "one step at a time"),
        ({"elastic": 1.5}, "from 0 to 1"),
        ({"aux_weight": -1.0}, "below 0"),
        ({"explore": 1.0, "routing": "token"}, "none does"),
    ],
)
def test_refused(keys, said):
    with pytest.raises(ConfigError, match=said):
        MorConfig(**keys)


def test_profile():
    assert MorConfig().shares(4) == [1, 0.75, 0.5, 0.25]
    assert MorConfig(capacities="1, 0.5").shares(2) == [1, 0.5]
    with pytest.raises(ConfigError, match="2 shares for 3 recursions"):
        MorConfig(capacities="1,0.5").shares(3)


def test_what_a_token_sees_when_judged():
    assert MorConfig(kv="hybrid").memory == "hybrid"
    assert MorConfig(gap="share_first").memory == "sharing" and MorConfig(gap="skip").memory == "recursion"
